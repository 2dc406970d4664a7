"""Every malformed /generate body is refused with a message that names the field; neutral values pass."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.api.errors import RequestError
from arealite.inference.core.requests import ServedLimits
from arealite.inference.http.generation import parse_generate

LIMITS = ServedLimits(vocab_size=100, context_length=64, kv_cache_tokens=48, encode=lambda text: [1] * len(text))


def parse(body: Any) -> Any:
    return parse_generate(body, LIMITS)


def one(**params: Any) -> Any:
    return parse({"input_ids": [1, 2, 3], "sampling_params": params}).requests[0].params


def prompt(*others: Any, **more: Any) -> dict[str, Any]:
    return {"input_ids": [1, *others], **more}


WRONG_BODIES: dict[str, list[Any]] = {  # named in the refusal
    "body": [[]],
    "text and input_ids": [{}, prompt(text="a")],
    "input_ids[0]": [{"input_ids": [[]]}],
    "input_ids[1]": [{"input_ids": [[1], other]} for other in ([], 2, None)],
    "input_ids": [{"input_ids": ids} for ids in ([], [1, [2]], [1, 100], [-1], [1.0], [True], [10**400], "12")],
    "empty": [{"text": ""}],
    "text": [{"text": []}, {"text": 3}],
    "text[1]": [{"text": ["a", None]}],
    "64 tokens": [{"input_ids": [1] * 64}],
    "48 tokens": [{"input_ids": [1] * 48}],
    "stream": [prompt(stream=1)],
    "top_logprobs_num": [prompt(top_logprobs_num=num) for num in (-1, 10**6)],
    "token_ids_logprob": [prompt(token_ids_logprob=ids) for ids in ([100], [[1]])],
    "num_prompt_tokens": [prompt(2, num_prompt_tokens=num) for num in (3, 0)],
    "66560": [{"input_ids": [[1]] * 65, "sampling_params": {"n": 1024}}],
    "lora_path": [prompt(lora_path="x")],
    "rid": [prompt(rid=3), {"input_ids": [[1], [2]], "rid": ["a", "a"]}],
    "return_logprob": [prompt(return_logprob=1)],
    "logprob_start_len": [prompt(return_logprob=True, logprob_start_len=-2)],
    "sampling_params": [{"input_ids": [[1], [2]], "sampling_params": [{}]}]
    + [prompt(sampling_params=params) for params in ([1], "x")],
}


def pairs(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(key, value) for key, values in table.items() for value in values]


@pytest.mark.parametrize(("named", "body"), pairs(WRONG_BODIES))
def test_wrong_bodies_are_refused_by_name(named, body):
    with pytest.raises(RequestError) as caught:
        parse(body)
    assert named in str(caught.value)


WRONG: dict[str, list[Any]] = {
    "max_new_tokens": [10.0, -1, 46, True],
    "min_new_tokens": [129],
    "temperature": [-0.1, float("nan"), float("inf"), "1", 10**400],
    "top_p": [0, 1.1],
    "top_k": [0, -2, 2.5],
    "min_p": [2],
    "stop": [[1]],
    "stop_token_ids": [5, ["5"]],
    "ignore_eos": [1],
    "sampling_seed": [2**63],
    "n": [0, 10**9, True],
    "frequency_penalty": [2.5],
    "presence_penalty": [-2.1],
    "repetition_penalty": [0],
    "logit_bias": [{"100": 1.0}, {"-1": 1.0}, {"x": 1.0}, {"9" * 5000: 1.0}, {"3": float("-inf")}, [1.0]],
    "stop_regex": ["a+"],
    "regex": ["a"],
    "json_schema": ["{}"],
}


@pytest.mark.parametrize(("key", "value"), pairs(WRONG))
def test_wrong_sampling_values_are_refused_by_name(key, value):
    with pytest.raises(RequestError, match=f"^sampling_params.{key}|{key} {value} pass") as caught:
        one(**{key: value})
    assert len(str(caught.value)) < 400


def test_unknown_sampling_keys_name_the_nearest():
    with pytest.raises(RequestError, match="max_tokens.*max_new_tokens"):
        one(max_tokens=5)


def test_null_and_neutral_values_pass_for_every_key():
    keys = ["temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos", "sampling_seed", "n"]
    keys += ["min_new_tokens", "frequency_penalty", "logit_bias", "regex", "custom_params", "stream_interval"]
    params = one(**dict.fromkeys(keys), max_new_tokens=5)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert params.sampling_seed is None
    one(n=1, frequency_penalty=0, presence_penalty=0.0, repetition_penalty=1, logit_bias={}, top_k=-1, max_new_tokens=5)
    parse({"input_ids": [1], "stream": False, "top_logprobs_num": 0, "lora_path": None, "routing_key": "g", "xyz": 3})


def test_lengths_default_to_the_protocol_and_to_what_fits():
    assert one().max_new_tokens == 45, "128 by default, but the KV cache leaves 48 - 3"
    assert one(max_new_tokens=None).max_new_tokens == 45
    assert one(max_new_tokens=45).max_new_tokens == 45


def test_a_prompt_that_fills_the_context_can_be_scored():
    """The longest trajectory that can be generated has as many tokens as are served."""
    scored = parse({"input_ids": [1] * 48, "sampling_params": {"max_new_tokens": 0}})
    assert scored.requests[0].params.max_new_tokens == 0
    with pytest.raises(RequestError, match="49 tokens"):
        parse({"input_ids": [1] * 49, "sampling_params": {"max_new_tokens": 0}})


def test_tiny_temperatures_are_greedy():
    assert one(temperature=1e-7).temperature == 0.0
    assert one(temperature=1e-5).temperature == 1e-5


def test_batches_get_ids_and_params_of_their_own():
    body = {"input_ids": [[1], [2, 3]], "rid": "r", "sampling_params": [{"top_k": 5}, None], "stream": True}
    call = parse({**body, "return_logprob": [True, False], "token_ids_logprob": [7, 8]})
    assert call.batched and call.stream and [r.rid for r in call.requests] == ["r_0", "r_1"]
    assert [r.params.top_k for r in call.requests] == [5, 0]
    assert [r.return_logprob for r in call.requests] == [True, False]
    assert [r.token_ids_logprob for r in call.requests] == [(7, 8), ()], "only with return_logprob"


def test_samples_of_a_prompt_stand_together_and_draw_differently():
    call = parse({"input_ids": [[1], [2]], "rid": "r", "sampling_params": [{"n": 2, "sampling_seed": 5}, None]})
    assert [r.rid for r in call.requests] == ["r_0_0", "r_0_1", "r_1"]
    assert [r.prompt_ids for r in call.requests] == [[1], [1], [2]]
    assert [r.params.sampling_seed for r in call.requests] == [5, 6, None]
    last = parse({"input_ids": [1], "sampling_params": {"n": 2, "sampling_seed": 2**63 - 1}}).requests
    assert [r.params.sampling_seed for r in last] == [2**63 - 1, -(2**63)]
    assert parse({"input_ids": [1], "sampling_params": {"n": 2}}).batched
    assert not parse({"input_ids": [1], "sampling_params": {"n": 1}}).batched


def test_tokens_of_an_earlier_call_count_as_generated():
    body = {"input_ids": [1, 2, 3, 4], "num_prompt_tokens": 2}
    [request] = parse({**body, "sampling_params": {"min_new_tokens": 5, "max_new_tokens": 3}}).requests
    assert request.num_given == 2
    with pytest.raises(RequestError, match="min_new_tokens"):
        parse({**body, "sampling_params": {"min_new_tokens": 6, "max_new_tokens": 3}})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


keys = ["text", "rid", "return_logprob", "logprob_start_len", "token_ids_logprob", "num_prompt_tokens"]
sampling = st.sampled_from(["max_new_tokens", "top_k", "stop", "min_p", "n", "logit_bias"])
fields = dict.fromkeys(keys, json_values) | {
    "input_ids": json_values | st.just([1, 2]),
    "sampling_params": json_values | st.dictionaries(sampling, json_values),
}


@settings(max_examples=200, deadline=None)
@given(body=json_values | st.fixed_dictionaries({}, optional=fields))
def test_no_body_does_anything_but_pass_or_be_refused(body):
    try:
        requests = parse(json.loads(json.dumps(body))).requests
    except RequestError:
        return
    assert all(r.prompt_ids and len(r.prompt_ids) + r.params.max_new_tokens <= 48 for r in requests)
