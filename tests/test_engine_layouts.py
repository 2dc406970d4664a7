"""Two optimiser steps on every layout of the ranks equal those of one process: loss, gradient norm and all weights.

A case is a layout, a model, and what is varied. Cases of one number of ranks run in one start of the ranks.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from engine_batches import actor_config, random_batch, share, train_one_step
from layouts import on_ranks

from arealite.api.cli_args import OptimizerConfig
from arealite.api.types import Batch, Dims

TOLERANCE = 1e-5  # relative; of weights: to the largest number of the tensor
VOCABULARY = 512

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "initializer_range": 0.1,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {},
    "gemma3_text": {
        "num_hidden_layers": 3, "sliding_window": 6, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}  # fmt: skip
LAYOUTS = {
    "d2": Dims(d=2),
    "t2": Dims(t=2),
    "c2": Dims(c=2),
    "d2t2": Dims(d=2, t=2),
    "c2t2": Dims(c=2, t=2),
}
# Changes of the actor's configuration; a name in ORDERS or SHARES changes the batch too.
SAME = {
    "plain": {},
    "small budget": {"max_tokens_per_mb": 24},
    "permuted": {"max_tokens_per_mb": 40},
    "checkpointing": {"gradient_checkpointing": "full", "max_tokens_per_mb": 60},
    "all on one share": {},
}
OTHERS = {"sequence ratios": {"importance_sampling_level": "sequence", "ppo_n_minibatches": 2}}  # not what "plain" does
VARIATIONS = {**SAME, **OTHERS}


class Case(NamedTuple):
    layout: str
    model: str
    variation: str


CASES = [Case(layout, "llama", variation) for layout in LAYOUTS for variation in VARIATIONS]
CASES += [Case(layout, model, "small budget") for layout in ("t2", "c2t2") for model in MODELS if model != "llama"]
CASES += [Case("c2", "gemma3_text", "checkpointing"), Case("d2t2", "qwen3_moe", "all on one share")]


class Found(NamedTuple):
    """What one rank makes of a case."""

    numbers: dict[str, float]
    logp: dict[int, np.ndarray]  # by sequence, after both steps
    weights: dict[str, np.ndarray]
    digest: str  # of all weights


def save_model(name: str, folder: Path) -> str:
    config = transformers.AutoConfig.for_model(name, **{**SHAPE, **MODELS[name]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # biases and norms start as zeros and ones: as good as absent
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / name)
    return str(folder / name)


def batch_of(variation: str) -> tuple[Batch, np.ndarray]:
    """The batch, and which sequence of the plain one each of its sequences is."""
    batch = random_batch(vocabulary=VOCABULARY)
    for column in (batch.logprobs, batch.prox_logp):
        assert column is not None
        column[batch.loss_mask] += 3  # near the logprobs of so small a vocabulary
    order = np.arange(batch.num_sequences)
    if variation == "permuted":
        order = np.random.default_rng(1).permutation(order)
        batch = batch.select(order)
    return batch, order


def two_steps(folder: str, dims: Dims, variation: str, changes: dict[str, Any], with_weights: bool) -> Found:
    from arealite.engine.ppo.actor import FSDPPPOActor

    optimizer = OptimizerConfig(lr=1e-2, eps=1e-3)  # eps as in actor_config; steps that change every weight visibly
    actor = FSDPPPOActor(actor_config(folder, optimizer=optimizer, **changes), dims)
    actor.initialize()
    whole, order = batch_of(variation)
    lopsided = variation == "all on one share"
    mine = share(whole, actor.mesh.share, dims.d, lopsided)
    ids = share_ids(whole, order, actor.mesh.share, dims.d, lopsided)
    numbers = {}
    for step in range(2):
        stats = train_one_step(actor, mine)
        numbers |= {f"{key} {step}": stats[key] for key in ("loss", "grad_norm", "entropy", "importance_weight_max")}
    logp = np.split(actor.compute_logp(mine), mine.cu_seqlens[1:-1])
    weights = {name: tensor.numpy() for name, tensor in actor.named_full_tensors(torch.float32)}
    digest = hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()
    return Found(numbers, dict(zip(ids, logp, strict=False)), weights if with_weights else {}, digest)


def share_ids(whole: Batch, order: np.ndarray, rank: int, num_shares: int, lopsided: bool) -> list[int]:
    owner = whole.group_ids * 0 if lopsided else whole.group_ids % num_shares
    return order[owner == rank].tolist()


def run_cases(rank: int, cases: list[tuple[Case, Dims, str, dict[str, Any]]]) -> dict[Case, Found]:
    found = {}
    for case, dims, folder, changes in cases:
        try:
            found[case] = two_steps(folder, dims, case.variation, changes, with_weights=rank == 0)
        except Exception as error:
            error.add_note(f"in the case {case}")
            raise
    return found


class Table:
    """Outcomes of all cases, computed when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folders = {name: save_model(name, folder) for name in MODELS}

    @functools.cache  # noqa: B019 one object per module
    def run(self, world_size: int) -> list[dict[Case, Found]]:
        """By rank."""
        if world_size == 1:
            alone = {Case("alone", case.model, self.reference(case)) for case in CASES}
            cases = [(case, Dims(), self.folders[case.model], VARIATIONS[case.variation]) for case in sorted(alone)]
        else:
            dims = {name: d for name, d in LAYOUTS.items() if d.d * d.t * d.c * d.p == world_size}
            cases = [
                (case, dims[case.layout], self.folders[case.model], VARIATIONS[case.variation])
                for case in CASES
                if case.layout in dims
            ]
        return on_ranks(world_size, run_cases, cases)

    def reference(self, case: Case) -> str:
        return "plain" if case.variation in SAME else case.variation

    def alone(self, case: Case) -> Found:
        return self.run(1)[0][Case("alone", case.model, self.reference(case))]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return Table(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_layout_equals_one_process(table, case):
    dims, expected = LAYOUTS[case.layout], table.alone(case)
    ranks = [found[case] for found in table.run(dims.d * dims.t * dims.c * dims.p)]
    for found in ranks:
        assert found.numbers == pytest.approx(expected.numbers, rel=TOLERANCE, abs=1e-7)
        assert found.digest == ranks[0].digest, "ranks export different weights"
        for sequence, logp in found.logp.items():
            np.testing.assert_allclose(logp, expected.logp[sequence], rtol=TOLERANCE, atol=TOLERANCE)
    assert {sequence for found in ranks for sequence in found.logp} == set(expected.logp)
    assert ranks[0].weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        limit = TOLERANCE * np.abs(weight).max()
        np.testing.assert_allclose(ranks[0].weights[name], weight, rtol=0, atol=limit, err_msg=name)
