"""The trainer on a GPU against the same on the CPU. Skipped without one."""

import os

import numpy as np
import pytest
import torch
from engine_batches import actor_config, random_batch
from transformers import LlamaConfig, LlamaForCausalLM

from arealite.algorithm.packing import prefix_tree
from arealite.api.errors import ConfigError
from arealite.engine.attention import Layout, tree_attention
from arealite.engine.parallel import pick_device
from arealite.engine.ppo.actor import FSDPPPOActor

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


def test_a_rank_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setitem(os.environ, "LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ConfigError, match="has no GPU of its own"):
        pick_device()
