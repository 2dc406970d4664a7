"""A model on several pipeline stages makes the steps that it makes on one rank."""

import numpy as np
import pytest
import torch
from engine_batches import actor_config, random_batch, share, train_one_step
from layouts import on_ranks

from arealite.api.types import Dims

VOCABULARY = 128


def tiny(folder, kind: str, tied: bool) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "gemma3_text":
            types = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
            sizes |= {"head_dim": 8, "sliding_window": 4, "layer_types": types}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        model.to(torch.float32).save_pretrained(folder)
    return str(folder)


# kind, whether its head is tied to the embedding, tokens per micro-batch: 1 makes one of every sequence
MODELS = {
    "llama tied": ("llama", True, 24),
    "llama": ("llama", False, 40),
    "qwen2": ("qwen2", False, 1),
    "gemma3": ("gemma3_text", True, 4096),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tiny(tmp_path_factory.mktemp("model"), *spec[:2]) for name, spec in MODELS.items()}


def steps(rank, folders, dims, lopsided=False, num_steps=2, **changes):
    """Of each model: logprobs, statistics of two steps, weights after them."""
    from arealite.engine.ppo.actor import FSDPPPOActor

    found = {}
    for name, folder in folders.items():
        actor = FSDPPPOActor(actor_config(folder, max_tokens_per_mb=MODELS[name][2], **changes), dims=dims)
        actor.initialize()
        mine = share(random_batch(vocabulary=VOCABULARY), actor.mesh.share, dims.d, lopsided)
        logp = actor.compute_logp(mine)
        stats = [train_one_step(actor, mine) for _ in range(num_steps)]
        stats = [{key: value for key, value in each.items() if key != "mfu" and key[-2:] != "_s"} for each in stats]
        weights = {n: t.double().numpy() for n, t in actor.named_full_tensors()}
        found[name] = {"logp": logp, "stats": stats, "weights": weights}
    return found


@pytest.fixture(scope="module")
def alone(folders):
    return on_ranks(1, steps, folders, Dims())[0]


@pytest.mark.parametrize(
    "dims, changes",
    [
        (Dims(p=2), {}),
        (Dims(p=4), {}),
        (Dims(p=2, d=2), {}),
        (Dims(p=2, d=2), {"lopsided": True}),
        (Dims(p=2), {"gradient_checkpointing": "full"}),
    ],
    ids=str,
)
def test_stages_make_the_steps_of_one_rank(folders, alone, dims, changes):
    ranks = on_ranks(dims.p * dims.d, run_case, folders, dims, changes)
    for name, expected in alone.items():
        for rank in ranks:
            got = rank[name]
            for mine, theirs in zip(got["stats"], expected["stats"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7), name
            assert list(got["weights"]) == list(expected["weights"])
            for key, tensor in expected["weights"].items():
                np.testing.assert_allclose(got["weights"][key], tensor, rtol=1e-5, atol=1e-7, err_msg=f"{name} {key}")


def run_case(rank, folders, dims, changes):
    return steps(rank, folders, dims, **changes)
