"""Two optimiser steps on every layout of the ranks equal those of one process: loss, gradient norm and all weights.

A case is a layout, a model, and what is varied; all cases of one number of ranks run in one start of the ranks. To add
one: put it in CASES, and what it names in LAYOUTS, MODELS or SAME.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from support.batches import as_rows, make, random_batch, share, train_one_step
from support.layouts import on_ranks

from arealite.api.cli_args import GenerationHyperparameters, LoRAConfig, NormConfig, OptimizerConfig
from arealite.api.errors import ConfigError
from arealite.api.run_args import StatsLoggerConfig
from arealite.api.types import Batch, Dims
from arealite.engine.micro_batch import cut, idle, places_of
from arealite.engine.parallel.spread import check_supported
from arealite.weights.handshake import MismatchGuard

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
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
NAMES = "d2 t2 c2 d2t2 c2t2 p2 d2p2 t2p2 c2p2 d2e2 t2e2 d4e2 d2c2e4 d2t2e2 d2p2e2"
LAYOUTS = {name: Dims(**{a: int(n) for a, n in re.findall("([a-z])([0-9])", name)}) for name in NAMES.split()}
# Changes of the actor's configuration. batch_of and two_steps know some of the names.
SAME: dict[str, dict[str, Any]] = {  # what leaves the outcome as it is
    "plain": {},
    "permuted, small budget": {"max_tokens_per_mb": 40},
    "checkpointing": {"gradient_checkpointing": "full", "share_prompts": False, "max_tokens_per_mb": 60},
    "selective checkpointing": {"gradient_checkpointing": "selective"},
    "all on one share": {},
    "offload": {"offload": "all"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "sequence ratios": {"importance_sampling_level": "sequence", "ppo_n_minibatches": 2},
    "bfloat16": {"dtype": "bfloat16"},
    "sequence mean": {"loss_aggregation": "seq-mean-token-mean", "ppo_n_minibatches": 2},
    "statistics over all ranks": {
        "reward_norm": NormConfig("batch", "batch", leave_one_out=True), "adv_norm": NormConfig("group", "batch"),
    },
    "statistics of one share": {
        "adv_norm": NormConfig("batch", "batch"), "ppo_n_minibatches": 2, "mask_truncated": True,
    },
    "samples of two rows": {
        "importance_sampling_level": "sequence", "loss_aggregation": "seq-mean-token-mean", "max_tokens_per_mb": 30,
    },
    "lora": {"lora": LoRAConfig(rank=4, alpha=3), "max_tokens_per_mb": 24},
    "lora, checkpointing": {"lora": LoRAConfig(4, 6, ["q_proj", "o_proj"]), "gradient_checkpointing": "full"},
}  # fmt: skip
VARIATIONS = {**SAME, **OTHERS}
ON_ONE_SHARE = ("all on one share", "statistics of one share")


def num_ranks(dims: Dims) -> int:
    return dims.d * dims.t * dims.c * dims.p


class Case(NamedTuple):
    layout: str
    model: str
    variation: str

    @property
    def alone(self) -> Case:
        return Case("alone", self.model, "plain" if self.variation in SAME else self.variation)


TWO_RANKS = ["plain", "sequence ratios", "checkpointing"]
CASES = [Case(layout, "llama", "permuted, small budget") for layout, dims in LAYOUTS.items() if dims.e == 1]
CASES += [Case(layout, "llama", "checkpointing") for layout in ("d2t2", "c2t2", "d2p2")]
CASES += [Case(layout, "llama", v) for layout in ("d2", "t2", "c2", "p2") for v in TWO_RANKS]
CASES += [Case("d2", "llama", v) for v in OTHERS if v.startswith(("sequence mean", "statistics", "samples"))]
CASES += [Case("t2", model, "permuted, small budget") for model in MODELS if model != "llama"]
CASES += [Case("c2t2", model, "permuted, small budget") for model in ("gemma3_text", "mistral", "qwen3_moe")]
CASES += [Case("d2", "llama", "all on one share"), Case("d2t2", "qwen3_moe", "all on one share")]
CASES += [Case("c2t2", "llama", "selective checkpointing"), Case("c2", "gemma3_text", "checkpointing")]
CASES += [Case(layout, "llama", "lora") for layout in ("d2", "t2", "c2", "p2", "d2t2", "t2p2")]
CASES += [Case(layout, "qwen3_moe", "permuted, small budget") for layout, dims in LAYOUTS.items() if dims.e > 1]
CASES += [Case("d2e2", "qwen3_moe", v) for v in ("checkpointing", "lora, checkpointing", "offload")]
CASES += [Case("d2c2e4", "qwen3_moe", "all on one share"), Case("t2e2", "mixtral", "checkpointing")]
CASES += [Case("d2", "qwen3_moe", "lora, checkpointing"), Case("c2t2", "qwen3_moe", "lora, checkpointing")]
CASES += [Case(layout, "llama", "offload") for layout in ("d2", "c2t2", "t2p2")]
CASES += [Case("p2", model, "permuted, small budget") for model in ("qwen2", "gemma3_text", "mixtral")]
CASES += [Case("d2p2", "llama", "all on one share")]
ROUGH = [Case("t2", "qwen3", "bfloat16"), Case("c2t2", "llama", "bfloat16"), Case("d2t2", "qwen3_moe", "bfloat16")]


class Found(NamedTuple):
    """What one rank makes of a case."""

    numbers: dict[str, float]
    logp: dict[int, np.ndarray]  # by sequence, after both steps
    weights: dict[str, np.ndarray]
    digest: str  # of all weights


def save_model(name: str, folder: Path, **changes: Any) -> str:
    config = transformers.AutoConfig.for_model(name, **{**SHAPE, **MODELS[name], **changes})
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
    if variation == "samples of two rows":
        batch = as_rows(batch, order - 2 * (order % 3 == 2))
    if variation == "permuted, small budget":
        order = np.random.default_rng(1).permutation(order)
        batch = batch.select(order)
    return batch, order


def two_steps(folder: str, dims: Dims, variation: str, changes: dict[str, Any], with_weights: bool) -> Found:
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-3)  # eps as in actor_config; steps that change every weight visibly
    actor = make(folder, dims, optimizer=optimizer, **changes)
    whole, order = batch_of(variation)
    lopsided = variation in ON_ONE_SHARE
    mine = share(whole, actor.mesh.share, dims.d, lopsided)
    ids = share_ids(whole, order, actor.mesh.share, dims.d, lopsided)
    numbers: dict[str, float] = {}
    for step in range(2):
        stats = train_one_step(actor, mine)
        numbers |= {f"{key} {step}": number for key, number in stats.items() if key != "update_s"}
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
        wanted = {case.alone for case in CASES + ROUGH} if world_size == 1 else {*CASES, *ROUGH}
        layouts = {"alone": Dims(), **LAYOUTS}
        cases = [
            (case, dims, self.folders[case.model], VARIATIONS[case.variation])
            for case in sorted(wanted)
            if num_ranks(dims := layouts[case.layout]) == world_size
        ]
        return on_ranks(world_size, run_cases, cases)

    def of(self, case: Case) -> tuple[Found, list[Found]]:
        """Of one process, and of all ranks."""
        return self.run(1)[0][case.alone], [found[case] for found in self.run(num_ranks(LAYOUTS[case.layout]))]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return Table(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_layout_equals_one_process(table, case):
    alone, ranks = table.of(case)
    for found in ranks:
        assert found.numbers == pytest.approx(alone.numbers, rel=TOLERANCE, abs=1e-7)
        assert found.digest == ranks[0].digest, "ranks export different weights"
        for sequence, logp in found.logp.items():
            np.testing.assert_allclose(logp, alone.logp[sequence], rtol=TOLERANCE, atol=TOLERANCE)
    assert {sequence for found in ranks for sequence in found.logp} == set(alone.logp)
    assert ranks[0].weights.keys() == alone.weights.keys()
    for name, weight in alone.weights.items():
        limit = TOLERANCE * np.abs(weight).max()
        np.testing.assert_allclose(ranks[0].weights[name], weight, rtol=0, atol=limit, err_msg=name)


class Servers:
    """What the guard asks of them; they know the logprob of every token that `alone` computed."""

    def __init__(self, whole: Batch, alone: np.ndarray) -> None:
        spans = zip(
            np.split(whole.tokens, whole.cu_seqlens[1:-1]), np.split(alone, whole.cu_seqlens[1:-1]), strict=True
        )
        self.known = {tuple(tokens): logp.tolist() for tokens, logp in spans}

    def score(self, rows: list[list[int]]) -> list[list[float]]:
        return [self.known[tuple(row)] for row in rows]

    def get_version(self) -> int:
        return 0


def probe(rank: int, folder: str, layouts: list[Dims], alone: np.ndarray | None) -> list[Any]:
    """What the guard finds in each layout, on this rank; one process computes what it compares with."""

    found = []
    for dims in layouts:
        actor = make(folder, dims)
        whole = random_batch(vocabulary=VOCABULARY)
        if alone is None:
            return [actor.compute_logp(whole)]
        whole.logprobs = alone
        mine = share(whole, actor.mesh.share, dims.d)
        guard = MismatchGuard(StatsLoggerConfig(probe_every_steps=1), GenerationHyperparameters())
        found.append(guard.check(0, mine, actor, Servers(whole, alone)))  # type: ignore[arg-type]
    return found


def test_the_guard_compares_in_every_layout(tmp_path):
    folder = save_model("llama", tmp_path)
    [[alone]] = on_ranks(1, probe, folder, [Dims()], None)
    for found in on_ranks(2, probe, folder, [Dims(d=2), Dims(t=2), Dims(c=2), Dims(p=2)], alone):
        assert [each["mismatch_max"] < 1e-5 for each in found] == [True] * 4, found


@pytest.mark.parametrize("case", ROUGH, ids=", ".join)
def test_bfloat16_stays_near(table, case):
    alone, ranks = table.of(case)
    for found in ranks:
        assert found.digest == ranks[0].digest
        for key in ("grad_norm 0", "entropy 0", "grad_norm 1", "entropy 1"):
            assert found.numbers[key] == pytest.approx(alone.numbers[key], rel=0.05), key


def test_places_split_a_micro_batch():
    whole, _ = batch_of("plain")
    for micro in [*cut(whole, 24, torch.device("cpu")), idle(torch.device("cpu"))]:
        assert len(micro.tokens) <= 24
        for num_places in (1, 2, 3, 8):
            parts = [places_of(micro, place, num_places) for place in range(num_places)]
            assert len({p.nodes.stop - p.nodes.start for p in parts}) == 1
            assert torch.equal(torch.cat([micro.predicting[p.rows] for p in parts]), micro.predicting)
            assert torch.equal(torch.cat([micro.targets[p.pairs] for p in parts]), micro.targets)
            for p in parts:
                nodes, rows = micro.predicting[p.rows], micro.row_of[p.pairs]
                assert all(p.nodes.start <= node < p.nodes.stop for node in nodes)
                assert all(p.rows.start <= row < p.rows.stop for row in rows)


NINE_HEADS = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}


@pytest.mark.parametrize(
    "model, changes, dims, told",
    [
        ("llama", {}, Dims(t=8), "These work: c2, c4, c8, t2, t2c2, t2c4, t4, t4c2"),
        ("llama", NINE_HEADS, Dims(t=2), "These work: c3, c9, t3, t3c3"),
        ("llama", {}, Dims(t=2, c=8), "t x c"),
        ("llama", {"intermediate_size": 98}, Dims(t=4), "t may be 1, 2"),
        ("qwen3", {"attention_bias": True}, Dims(t=2), "attention_bias"),
        ("gpt_neox", {}, Dims(c=2), "llama, mistral, mixtral, qwen2"),
    ],
)
def test_what_is_not_supported_is_told(model, changes, dims, told):
    config = transformers.AutoConfig.for_model(model, **{**SHAPE, **changes})
    with pytest.raises(ConfigError, match=told):
        check_supported(config, dims)
    check_supported(config, Dims(d=8))
