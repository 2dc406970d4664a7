"""The OpenAI endpoints, driven by the `openai` package against `arealite serve` with a real model."""

import json
from typing import Any

import openai
import pytest
from support.forks import servers
from support.inference import WAIT_S, fetch
from transformers import AutoTokenizer

from arealite.api.errors import RequestError
from arealite.inference.core.requests import ServedLimits
from arealite.inference.openai.completions import OpenAICall, Served, model_defaults, parse_completion

MODEL = "smol"
ASK = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def url(smollm2):
    flags = ["--context-length", "2048", "--kv-cache-tokens", "8192", "--served-model-name", MODEL]
    with servers(1, smollm2, *flags, "--weight-version", "7", "--dtype", "bfloat16") as [(_, address)]:
        yield f"http://{address}"


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=WAIT_S)


def greedy(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": ASK, "max_tokens": 12, "temperature": 0, **changes}


def test_a_chat_is_answered_with_usage_and_version(client):
    answer = client.chat.completions.create(**greedy())
    [choice] = answer.choices
    assert "Paris" in (choice.message.content or "") and choice.message.role == "assistant"
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    assert answer.usage is not None and answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == MODEL and answer.object == "chat.completion"
    spans = [{"version": "7", "start": 0, "end": answer.usage.completion_tokens}]
    assert answer.model_dump()["metadata"] == {"weight_version": "7", "weight_versions": spans}
    assert [model.id for model in client.models.list()] == [MODEL]


def test_a_stream_adds_up_to_the_whole(client):
    options = greedy(max_tokens=24, logprobs=True, top_logprobs=2, n=2, stop=["never written"])
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for index, choice in enumerate(whole.choices):
        parts = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        streamed = [entry for part in parts if part.logprobs for entry in part.logprobs.content or []]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [entry.token for entry in streamed] == [entry.token for entry in choice.logprobs.content]
    assert len(chunks) > 10, "it comes piece by piece"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs_name_the_greedy_token_first(client):
    [choice] = client.chat.completions.create(**greedy(logprobs=True, top_logprobs=3)).choices
    assert choice.logprobs is not None and choice.logprobs.content
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-3)
        assert entry.logprob <= 0 and bytes(entry.bytes or []).decode() == entry.token


def test_n_samples_differ_and_a_seed_repeats_them(client):
    options = greedy(temperature=1.0, n=3, seed=5, max_tokens=16)
    texts = [[c.message.content for c in client.chat.completions.create(**options).choices] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


def test_stop_strings_end_the_text_and_never_show_in_a_stream(client):
    options = greedy(messages=[{"role": "user", "content": "Tell me about Paris."}], max_tokens=30)
    [free] = client.chat.completions.create(**options).choices
    stop = (free.message.content or "").split()[4]
    options["stop"] = [stop, "never written"]
    [choice] = client.chat.completions.create(**options).choices
    assert choice.finish_reason == "stop" and (choice.model_extra or {})["matched_stop"] == stop
    assert choice.message.content == (free.message.content or "").partition(stop)[0]
    chunks = client.chat.completions.create(**options, stream=True)
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == choice.message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called(client, stream):
    """The model is small: the prompt begins the call for it."""
    messages = [{"role": "user", "content": "What is the weather in Paris? Use the city name."}]
    choice = {"type": "function", "function": {"name": "get_weather"}}
    options = greedy(messages=messages, tools=[WEATHER], tool_choice=choice, max_tokens=60)
    if stream:
        parts = [c for chunk in client.chat.completions.create(**options, stream=True) for c in chunk.choices]
        [call] = [call for part in parts for call in part.delta.tool_calls or []]
        finish = parts[-1].finish_reason
        assert call.index == 0
    else:
        [made] = client.chat.completions.create(**options).choices
        assert made.message.tool_calls and made.message.content is None
        [call] = made.message.tool_calls
        finish = made.finish_reason
    assert call.function.name == "get_weather" and call.id.startswith("call_") and call.type == "function"
    assert isinstance(json.loads(call.function.arguments), dict)
    assert finish == "tool_calls", "the end of the call ends the answer"


def test_a_conversation_with_tool_results_goes_on(client, smollm2):
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny, 21 degrees"},
    ]
    options = greedy(messages=messages, tools=[WEATHER], extra_body={"return_token_ids": True})
    [choice] = client.chat.completions.create(**options).choices
    prompt = AutoTokenizer.from_pretrained(smollm2).decode((choice.model_extra or {})["prompt_token_ids"])
    asked, called, told = (prompt.find(text) for text in ("Weather in Paris?", '"city": "Paris"', "sunny, 21 degrees"))
    assert "The weather in a city." in prompt and 0 <= asked < called < told, prompt
    assert "sunny" in (choice.message.content or "").lower(), choice.message


def test_token_ids_make_the_answer_trainable(client, url):
    asked = {"return_token_ids": True, "return_meta_info": True}
    [choice] = client.chat.completions.create(**greedy(logprobs=True), extra_body=asked).choices
    extra = choice.model_extra or {}
    prompt, output = extra["prompt_token_ids"], extra["response_token_ids"]
    assert [entry[1] for entry in extra["meta_info"]["output_token_logprobs"]] == output
    native = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 12}}
    assert fetch(url + "/generate", native)[1]["output_ids"] == output
    direct = client.chat.completions.create(**greedy(), extra_body={"input_ids": prompt, "return_token_ids": True})
    assert (direct.choices[0].model_extra or {})["response_token_ids"] == output


def test_a_message_can_be_continued(client):
    messages = [*ASK, {"role": "assistant", "content": "The capital of France is"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    [choice] = client.chat.completions.create(**greedy(messages=messages), extra_body=options).choices
    assert "Paris" in (choice.message.content or "")


def test_completions_take_text_tokens_and_lists(client, smollm2):
    prompts: list[Any] = ["The capital of France is", "One, two, three,"]
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 5}
    many = client.completions.create(prompt=prompts, n=2, **options)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text != many.choices[2].text
    ids = AutoTokenizer.from_pretrained(smollm2)(prompts[0]).input_ids
    [single] = client.completions.create(prompt=ids, **options, extra_body={"return_token_ids": True}).choices
    assert single.text == many.choices[0].text and "Paris" in single.text
    extra = single.model_extra or {}
    assert extra["prompt_token_ids"] == ids and len(extra["token_ids"]) == 5
    chunks = list(client.completions.create(prompt=prompts, stream=True, **options))
    for index in (0, 1):
        text = "".join(c.text for chunk in chunks for c in chunk.choices if c.index == index)
        assert text == many.choices[2 * index].text


def test_echo_scores_the_prompt(client):
    """What evaluation suites use: logprobs of a given text, nothing generated."""
    text = "The capital of France is Paris"
    answer = client.completions.create(model=MODEL, prompt=text, echo=True, logprobs=1, max_tokens=0, temperature=0)
    [choice] = answer.choices
    assert choice.text == text and choice.logprobs is not None
    logprobs = choice.logprobs.token_logprobs or []
    assert logprobs[0] is None and "".join(choice.logprobs.tokens or []) == text
    assert all(p is not None and p < 0 for p in logprobs[1:])
    pieces = zip(choice.logprobs.tokens or [], choice.logprobs.text_offset or [], strict=True)
    assert all(text[offset:].startswith(token) for token, offset in pieces)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"top_p": 2}, "top_p"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"model": f"{MODEL}:nobody"}, "nobody"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_raise_bad_request(client, changes, named, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**greedy(stream=stream, **changes))
    assert named in caught.value.message and caught.value.status_code == 400
    assert isinstance(caught.value.body, dict) and named in caught.value.body["message"]


def test_an_unknown_route_is_not_found(client):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")


LIMITS = ServedLimits(100, 64, 64, encode=lambda text, special=True: [1] * len(text), adapters=["ad", "b"])


def parsed(body: dict[str, Any], **defaults: Any) -> OpenAICall:
    return parse_completion({"prompt": "abc", **body}, Served(LIMITS, "base", defaults))


def test_what_is_left_out_comes_from_the_model_or_from_openai():
    asked = model_defaults({"temperature": 0.6, "top_k": 0, "top_p": None, "do_sample": True})
    assert asked == {"temperature": 0.6, "top_k": -1}
    assert parsed({}, **asked).generate.requests[0].params.temperature == 0.6
    assert parsed({"temperature": 0.5}, **asked).generate.requests[0].params.temperature == 0.5
    [request] = parsed({}).generate.requests
    assert (request.params.temperature, request.params.top_p, request.params.max_new_tokens) == (1.0, 1.0, 16)


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], None, 3, {}, ["a", 1], [[1], "a"], [1, "a"], [10**9]])
def test_a_wrong_prompt_is_refused_by_that_name(prompt):
    with pytest.raises(RequestError, match="^prompt"):
        parsed({"prompt": prompt})


def test_an_adapter_is_named_with_its_base_or_alone():
    for body in ({"model": "base:ad"}, {"model": "ad"}, {"lora_path": "ad"}, {"model": "base", "lora_path": "ad"}):
        assert parsed(body).generate.requests[0].lora == "ad", body
    for body in ({}, {"model": "base"}, {"model": "gpt-5"}):
        assert parsed(body).generate.requests[0].lora is None, body
    with pytest.raises(RequestError, match="nobody"):
        parsed({"model": "base:nobody"})
