"""Penalties, biases and the least length do what a plain loop over tokens does, also across an interruption."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import EOS, output_logprobs
from transformers import AutoModelForCausalLM

from arealite.inference.core.logits import adjust
from arealite.inference.core.requests import GenerateRequest, SamplingParams
from arealite.inference.core.sequence import Sequence


def plainly(logits: list[float], prompt: list[int], answer: list[int], wanted: dict[str, Any]) -> list[float]:
    """One row, one token at a time."""
    logits = list(logits)
    for token in range(len(logits)):
        if token in answer:
            logits[token] -= wanted.get("frequency_penalty", 0) * answer.count(token)
            logits[token] -= wanted.get("presence_penalty", 0)
        if token in prompt + answer:
            penalty = wanted.get("repetition_penalty", 1)
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        logits[token] += dict(wanted.get("logit_bias", ())).get(token, 0)
    return logits


tokens = st.lists(st.integers(0, 19), max_size=12)
wishes = st.fixed_dictionaries(
    {},
    optional={
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.1, 2),
        "logit_bias": st.dictionaries(st.integers(0, 19), st.floats(-50, 50), max_size=4).map(
            lambda d: tuple(d.items())
        ),
    },
)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.lists(st.tuples(tokens, tokens, tokens, wishes), min_size=1, max_size=4))
def test_rows_are_adjusted_as_by_a_plain_loop(seed, rows):
    """`given` tokens came with the prompt, and were generated before an interruption."""
    logits = torch.randn(len(rows), 20, generator=torch.Generator().manual_seed(seed)) * 5
    before = logits.tolist()
    sequences = []
    for prompt, given_ids, answer, wanted in rows:
        request = GenerateRequest("r", [1, *prompt, *given_ids], SamplingParams(50, **wanted), num_given=len(given_ids))
        sequences.append(Sequence(request))
        sequences[-1].tokens += answer
    after = adjust(sequences, logits)
    for row, values, (prompt, given_ids, answer, wanted) in zip(after.tolist(), before, rows, strict=True):
        assert row == pytest.approx(plainly(values, [1, *prompt], given_ids + answer, wanted), abs=1e-4)


def test_rows_without_wishes_cost_nothing():
    logits = torch.randn(2, 20).bfloat16()
    plain = [Sequence(GenerateRequest("r", [1], SamplingParams(5))) for _ in range(2)]
    assert adjust(plain, logits) is logits


def test_what_would_end_the_answer_too_early_gets_no_probability():
    sequence = Sequence(GenerateRequest("r", [1, 2], SamplingParams(5, min_new_tokens=2)))
    sequence.stop_ids = frozenset({3, 99})
    assert adjust([sequence], torch.zeros(1, 20))[0].tolist() == [0.0] * 3 + [-math.inf] + [0.0] * 16
    sequence.tokens += [5, 5]
    assert adjust([sequence], torch.zeros(1, 20))[0].tolist() == [0.0] * 20


def test_numbers_stay_finite_whatever_is_asked():
    params = SamplingParams(5, repetition_penalty=1e-300, logit_bias=((3, 1e300), (4, -1e300)))
    after = adjust([Sequence(GenerateRequest("r", [1, 2], params))], torch.randn(1, 20))
    assert bool(torch.isfinite(after).all())


def test_no_wish_makes_an_answer_fail(server):
    params = {"max_new_tokens": 2, "min_new_tokens": 2, "temperature": 1e300}
    params["logit_bias"] = {"7": 1e300, "8": -1e300}
    assert server.generate([1, 2], **params)["meta_info"]["finish_reason"]["type"] == "length"
    assert server.batcher.counters.num_nan_requests == 0


WISHES = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": {"7": 9.0}}


def test_answers_and_logprobs_are_those_of_the_adjusted_logits(server, folder):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt, answer = [7, 8, 9, 8], []
    logprobs: list[float] = []
    for _ in range(25):
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor([prompt + answer])).logits[0, -1].tolist()
        wanted = {**WISHES, "logit_bias": ((7, 9.0),)}
        row = torch.tensor(plainly(logits, prompt, answer, wanted), dtype=torch.float64)
        answer.append(int(row.argmax()))
        logprobs.append(float(torch.log_softmax(row, -1).max()))
    assert len(set(answer)) > 15, "penalties make it vary"
    found = server.generate(prompt, max_new_tokens=25, temperature=0, ignore_eos=True, **WISHES)
    assert found["output_ids"] == answer
    assert output_logprobs(found) == pytest.approx(logprobs, abs=1e-3)
    head, known = answer[:10], {"num_prompt_tokens": len(prompt)}
    rest = {"max_new_tokens": 15, "temperature": 0, "ignore_eos": True, **WISHES}
    resumed = server.generate(prompt + head, top=known, **rest)
    assert resumed["output_ids"] == answer[10:], "an interruption that the client tells of changes nothing"
    assert server.generate(prompt + head, **rest)["output_ids"] != answer[10:]


def test_the_least_length_counts_what_came_before_an_interruption(server):
    sure = {"max_new_tokens": 12, "temperature": 0, "logit_bias": {str(EOS): 1000.0}}
    assert len(server.generate([1, 2], min_new_tokens=6, **sure)["output_ids"]) == 7
    resumed = server.generate([1, 2, 3, 4], min_new_tokens=6, top={"num_prompt_tokens": 2}, **sure)
    assert len(resumed["output_ids"]) == 5
    assert server.generate([1, 2], **sure)["output_ids"] == [EOS]


def test_likeliest_and_named_tokens_come_with_their_logprobs(server, folder):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt, named = [5 + i % 7 for i in range(50)], (3, 200)
    top = {"logprob_start_len": 10, "top_logprobs_num": 4, "token_ids_logprob": list(named)}
    server.batcher.scheduler.step_tokens = 16  # the prompt is scored piece by piece
    answer = server.generate(prompt, max_new_tokens=3, temperature=0.5, sampling_seed=2, ignore_eos=True, top=top)
    [first, second] = server.generate([1, 2], n=2, max_new_tokens=20, sampling_seed=2, ignore_eos=True)
    assert first["output_ids"] != second["output_ids"], "samples of one prompt differ, seeded or not"
    about = answer["meta_info"]
    with torch.inference_mode():
        logits = plain(input_ids=torch.tensor([prompt + answer["output_ids"]])).logits[0]
    for at in range(50 - 1, 50 + 2):
        wanted = torch.log_softmax(logits[at] / 0.5, -1)
        tops = about["output_top_logprobs"][at - 49]
        assert [entry[1] for entry in tops] == wanted.topk(4).indices.tolist()
        assert [entry[0] for entry in tops] == pytest.approx(wanted.topk(4).values.tolist(), abs=1e-3)
        found = about["output_token_ids_logprobs"][at - 49]
        assert [entry[1] for entry in found] == [3, 200]
        assert [entry[0] for entry in found] == pytest.approx(wanted[list(named)].tolist(), abs=1e-3)
    assert about["input_top_logprobs"][0] is None and len(about["input_top_logprobs"]) == 40
    for at in range(11, 50):
        wanted = torch.log_softmax(logits[at - 1], -1)
        assert about["input_top_logprobs"][at - 10][0][0] == pytest.approx(float(wanted.max()), abs=1e-3)
        assert about["input_token_ids_logprobs"][at - 10][1][0] == pytest.approx(float(wanted[200]), abs=1e-3)
