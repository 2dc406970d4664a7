"""The trainer on a GPU against the same on the CPU. Skipped without one."""

import os

import numpy as np
import pytest
import torch
from support.batches import actor_config, random_batch
from transformers import LlamaConfig, LlamaForCausalLM

from arealite.algorithm.packing import prefix_tree
from arealite.api.errors import ConfigError
from arealite.engine.attention import Layout, tree_attention
from arealite.engine.memory import explained_shortage
from arealite.engine.parallel.ranks import pick_device
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.weights.link import WeightLink
from arealite.weights.wire import checksum, iterate_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SEQUENCES = {
    "uneven": [[1] * 700, [1, 2, 3], [5] * 130, [1] * 600 + [2] * 90],
    "shared": [[7] * 300 + [i, i + 1, i + 2] for i in range(64)],
    "one query each": [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6], [9]],
    "all of one": [[3], [4], [5]],
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(12, 2, 128), (9, 3, 64), (4, 4, 256)])
def test_attention_and_its_gradients(name, window, heads, key_heads, dim):
    """Against the portable path in float64 on the CPU."""
    tree = prefix_tree([np.asarray(s) for s in SEQUENCES[name]])
    g = torch.Generator().manual_seed(len(tree.tokens))
    n = len(tree.tokens)
    inputs = [torch.randn(1, h, n, dim, generator=g).bfloat16() for h in (heads, key_heads, key_heads)]
    above = torch.randn(1, n, heads, dim, generator=g).bfloat16()
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16), ("cuda", torch.float32)):
        own = [x.to(device, dtype).requires_grad_() for x in inputs]
        where = Layout(tree, torch.device(device))
        out, _ = tree_attention(torch.nn.Identity(), *own, None, tree_layout=where, sliding_window=window)
        grads = torch.autograd.grad(out, own, above.to(device, dtype))
        results.append([x.detach().double().cpu() for x in (out, *grads)])
    exact, *found = results
    for got, tolerance in zip(found, (1e-2, 1e-3), strict=True):
        for mine, wanted in zip(got, exact, strict=True):
            # Of gradients that are zero what counts is the size of the others.
            assert float((mine - wanted).norm()) < tolerance * max(float(wanted.norm()), 0.3 * wanted.numel() ** 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a small random Llama without a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_is_that_of_the_cpu(model, monkeypatch, dtype):
    """Logprobs, loss and gradient norm."""
    found = {}
    for device in ("cpu", "cuda"):
        with monkeypatch.context() as patched:
            if device == "cpu":
                patched.setattr(torch.cuda, "is_available", lambda: False)
            actor = FSDPPPOActor(actor_config(model, dtype=dtype))
            actor.initialize()
            try:
                batch = random_batch(vocabulary=1000)
                logp = actor.compute_logp(batch)
                actor.compute_advantages(batch)
                stats = actor.grpo_update(batch)
                found[device] = logp, stats["loss"], stats["grad_norm"]
            finally:
                actor.destroy()
    tolerance = {"float32": 1e-3, "bfloat16": 0.1}[dtype]
    for mine, wanted in zip(found["cuda"], found["cpu"], strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=tolerance, atol=tolerance)


def trained(model, tmp_path, sleeps=False, **settings):
    """Weights after two updates, with a recovery point between them."""
    actor = FSDPPPOActor(actor_config(model, dtype="bfloat16", **settings))
    actor.initialize()
    try:
        for number in range(2):
            batch = random_batch(seed=number, vocabulary=1000)
            actor.compute_advantages(batch)
            if sleeps:
                actor.sleep()
                assert all(not x.is_cuda for s in actor.sharded.optimizer.state.values() for x in s.values())
                actor.save_state(str(tmp_path))
                actor.wake()
                actor.load_state(str(tmp_path))
            actor.grpo_update(batch)
            assert all(p.is_cuda != (settings.get("offload") == "all") for p in actor.sharded.parameters.values())
        return {name: tensor.clone() for name, tensor in actor.named_full_tensors(torch.float32)}
    finally:
        actor.destroy()


CHECKPOINTING = [{"gradient_checkpointing": "full"}, {"gradient_checkpointing": "selective"}]


@pytest.mark.parametrize("kind", [{"sleeps": True}, {"offload": "optimizer"}, {"offload": "all"}, *CHECKPOINTING])
def test_ways_to_save_memory_change_nothing(model, tmp_path, kind):
    straight, moved = trained(model, tmp_path), trained(model, tmp_path, **kind)
    for name, weight in straight.items():
        torch.testing.assert_close(moved[name], weight, atol=2e-5, rtol=1e-4)


def test_shared_memory_that_the_gpu_writes(tmp_path):
    """The second version is written by the GPU itself where the driver allows it; the third one is larger."""
    link = WeightLink("shm", tmp_path)
    assert link.device.type == "cuda"
    try:
        for version, size in enumerate((300, 300, 3000)):
            weights = {f"w{i}": torch.randn(size + i, 7, device="cuda").bfloat16() for i in range(40)}
            meta = link.publish(iter(weights.items()), version)
            read = dict(iterate_tensors(meta))
            assert read.keys() == weights.keys()
            assert all(torch.equal(read[name], tensor.cpu()) for name, tensor in weights.items())
            assert all(number == checksum(weights[name]) for name, number in meta.checksums.items())
            if version == 1 and not link._segment._num_pinned:
                print("the driver does not pin shared memory")
    finally:
        link.close()


def test_too_little_memory_is_told_with_what_to_change():
    device = torch.device("cuda", 0)
    told = "too little memory for a test .needed at the peak .*lower max_tokens_per_mb"
    with pytest.raises(ConfigError, match=told), explained_shortage("a test", device):
        torch.empty(1 << 45, dtype=torch.uint8, device=device)


def test_a_rank_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setitem(os.environ, "LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ConfigError, match="has no GPU of its own"):
        pick_device()
