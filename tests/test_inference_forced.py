"""Forced decoding: a request brings the tokens, and the server tells what they were worth to the model."""

import threading

import pytest
import torch
from support.inference import EOS, LocalServer, byte_tokenizer, output_logprobs, plain_logprobs, served, wait_until
from support.rollout import Clients, one, quick_config
from transformers import AutoModelForCausalLM

from arealite.api.errors import RequestError
from arealite.rollout.client import RemoteNativeEngine, RemoteSGLangEngine

PROMPT = [5, 6, 7]
FORCED = [(t * 37) % 250 for t in range(40)]


@pytest.fixture(scope="module")
def forcing(folder):
    with LocalServer(served(folder), forced_decoding=True) as running:
        yield running


def close(found, folder, answer, temperature):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = plain_logprobs(model, [*PROMPT, *answer], temperature)[len(PROMPT) - 1 :].tolist()
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.3), (0.0, 1.0)])
def test_forced_tokens_have_the_logprobs_of_the_model(forcing, folder, temperature, top_p):
    free = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 50, "ignore_eos": True, "sampling_seed": 3}}
    alone = forcing.generate_many([free])[0]
    params = {"max_new_tokens": 50, "temperature": temperature, "top_p": top_p, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": {**params, "forced_ids": FORCED}}
    answer, beside = forcing.generate_many([body, free])
    ids = answer["output_ids"]
    assert ids[:40] == FORCED and len(ids) == 50  # then it samples
    close(output_logprobs(answer), folder, ids, temperature or 1.0)
    assert answer["meta_info"]["finish_reason"]["type"] == "length"
    assert answer["meta_info"]["weight_versions"] == [{"version": "0", "start": 0, "end": 50}]
    assert beside["output_ids"] == alone["output_ids"]


def test_forced_answers_end_as_sampled_ones_do(forcing):
    answer = forcing.generate(PROMPT, forced_ids=[*FORCED[:5], EOS, 9, 9])
    assert answer["output_ids"] == [*FORCED[:5], EOS]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    answer = forcing.generate(PROMPT, forced_ids=byte_tokenizer().encode("one, two, three"), stop=["two"])
    assert answer["text"] == "one, " and answer["meta_info"]["finish_reason"]["matched"] == "two"


def test_forcing_is_off_unless_the_server_was_started_for_it(server, forcing):
    status, answer = server.post("/generate", {"input_ids": PROMPT, "sampling_params": {"forced_ids": [1]}})
    assert status == 400 and "--forced-decoding" in answer["error"]["message"]
    status, answer = forcing.post("/generate", {"input_ids": PROMPT, "sampling_params": {"forced_ids": [1, 10**6]}})
    assert status == 400 and "no embedding of token 1000000" in answer["error"]["message"]


def test_a_client_forces_tokens_through_an_interruption(forcing, folder):
    engine = RemoteNativeEngine(quick_config(pause_mode="abort"))
    engine.initialize(addresses=[forcing.url])
    told: list[list[int]] = []
    answers = []
    try:
        forcing.step_delay_s = 0.01
        fields = {"input_ids": PROMPT, "forced_ids": tuple(FORCED), "max_new_tokens": 40, "temperature": 0.7}
        thread = threading.Thread(target=lambda: answers.append(one(engine, told.append, **fields, ignore_eos=True)))
        thread.start()
        wait_until(lambda: len(told) > 4)
        engine.pause()
        engine.resume()
        thread.join(30)
    finally:
        forcing.step_delay_s = 0.0
        engine.destroy()
    [done] = answers
    assert done.token_ids == told[-1] == FORCED and done.num_interruptions == 1
    close(done.logprobs, folder, FORCED, 0.7)


def test_other_servers_are_not_asked_to_force():
    with Clients() as connect:
        _, engine = connect(1, RemoteSGLangEngine)
        with pytest.raises(RequestError, match="SGLang, which cannot be told tokens"):
            one(engine, forced_ids=(1,))
