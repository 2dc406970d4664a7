"""Integration: client, head, workflow and reward workers against the built-in server on a tiny real model."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.inference import plain_logprobs
from support.rollout import Source, quick_config, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from arealite.api.cli_args import GenerationHyperparameters
from arealite.api.types import GenerationRequest, Task
from arealite.reward.number import number_reward
from arealite.rollout.backends.sglang import NativeBackend
from arealite.rollout.client import RemoteNativeEngine
from arealite.weights.link import WeightLink, verify
from arealite.workflow.rlvr import RLVRWorkflow


class Sums(Source):
    def __next__(self):
        task = super().__next__()
        message = {"role": "user", "content": f"What is {self.position} + 1?"}
        return Task(task.id, messages=[message], answer=str(self.position + 1))


@pytest.fixture(scope="module")
def server(tiny_llama):
    with serving(tiny_llama) as address:
        yield address


def two_models(path):
    """The weights of even and of odd versions."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.02)
    return models


def check_versions(engine, trajectories, stats, models, pause_mode, last=0, within=1e-4):
    """Updates came while tokens were sampled, and each token's logprob is that of the weights whose version it has."""
    assert stats["num_unexpected_versions"] == stats["num_failed"] == 0
    assert any(len(set(t.versions) - {-1}) > 1 for t in trajectories)
    sequences = [t.tokens for t in trajectories[-16:]]
    for tokens, scores in zip(sequences, engine.score(sequences), strict=True):
        np.testing.assert_allclose(scores, [0.0, *plain_logprobs(models[last % 2], tokens).tolist()], atol=within)
    if pause_mode == "in_place":
        return  # requests keep the cache of the old weights: no one model gives their logprobs
    for t in trajectories:
        by_version = [[0.0, *plain_logprobs(model, t.tokens).tolist()] for model in models]
        expected = [by_version[v % 2][i] if v >= 0 else 0.0 for i, v in enumerate(t.versions)]
        np.testing.assert_allclose(t.logprobs, expected, atol=2e-3)


@pytest.mark.parametrize("pause_mode", ["abort", "retract"])
def test_rollout_and_weight_updates_against_the_built_in_server(server, tiny_llama, tmp_path, pause_mode):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    models = two_models(tiny_llama)
    config = quick_config(pause_mode=pause_mode, max_head_offpolicyness=3)
    engine = RemoteNativeEngine(config, ledger_path=tmp_path / "ledger.jsonl")
    gconfig = GenerationHyperparameters(n_samples=4, max_new_tokens=160)  # some are in flight at each update
    workflow = RLVRWorkflow(number_reward, gconfig, tokenizer, config=config, context_length=256)
    link = WeightLink("shm", tmp_path)
    source = Sums()
    try:
        engine.initialize(addresses=[server])
        groups = []
        for version in range(4):
            weights = [(n, p) for n, p in models[version % 2].named_parameters()]
            engine.pause()
            meta = link.publish(weights, version)
            verify(meta, engine.update_weights(meta))
            engine.resume()
            batch = engine.prepare_batch(source, workflow)
            assert batch.num_sequences == 16
            assert version - min(t.min_version for g in engine.last_groups for t in g.trajectories) <= 3
            groups += engine.last_groups
        trajectories = [t for group in groups for t in group.trajectories]
        check_versions(engine, trajectories, engine.stats(), models, pause_mode, last=3)
    finally:
        workflow.close()
        engine.destroy()
        link.close()


def test_an_answer_that_is_followed_is_the_same_and_comes_in_bytes_that_grow_with_its_length(server, monkeypatch):
    num_bytes, told = Counter(), []
    follow = NativeBackend.follow

    def weighed(self, so_far, event, server_id):
        num_bytes[told[-1]] += len(event)
        return follow(self, so_far, event, server_id)

    monkeypatch.setattr(NativeBackend, "follow", weighed)
    engine = RemoteNativeEngine(quick_config())
    try:
        engine.initialize(addresses=[server])
        for length in (32, 128):
            request = GenerationRequest("same", [5, 6, 7], length, ignore_eos=True)
            [whole] = engine.sample([request])
            told.append(length)
            seen: list[list[int]] = []
            part = engine.loop.run(engine.agenerate(request, seen.append), "followed", 60)
            assert (part.token_ids, part.versions, part.text) == (whole.token_ids, whole.versions, whole.text)
            np.testing.assert_allclose(part.logprobs, whole.logprobs, atol=1e-4)
            assert seen[-1] == whole.token_ids
            assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(seen))
    finally:
        engine.destroy()
    assert num_bytes[128] < 6 * num_bytes[32]  # 16 times as many, if each event held all so far


def test_the_probability_that_a_restriction_cuts_is_measured(server, tmp_path):
    engine = RemoteNativeEngine(quick_config(), ledger_path=tmp_path / "ledger.jsonl")
    try:
        engine.initialize(addresses=[server])
        engine.sample([GenerationRequest("whole", [5, 6, 7], 4, ignore_eos=True)])
        assert "cut_mass_mean" not in engine.stats()
        [cut] = engine.sample([GenerationRequest("cut", [5, 6, 7], 4, top_k=1, ignore_eos=True)])
        stats = engine.stats()
    finally:
        engine.destroy()
    left = np.exp(cut.logprobs)  # top-1: what is sampled is all that is left
    assert stats["cut_mass_mean"] == stats["cut_mass_max"] == pytest.approx(1 - left.mean(), abs=1e-6)
    assert 0 < stats["cut_mass_mean"] < 1
