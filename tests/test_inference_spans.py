"""One forward pass over spans: any cut of a prompt, any mix with others, any architecture gives the plain result."""

from array import array
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import inference
from support.inference import LocalServer, output_logprobs, plain_logprobs, save_random, served
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from arealite.api.errors import ConfigError
from arealite.inference.core import layout
from arealite.inference.core.cache import PAGE_TOKENS, pages_for
from arealite.inference.core.layout import KVLayout, span_order
from arealite.inference.core.requests import GenerateRequest, SamplingParams
from arealite.inference.core.sequence import Sequence, Span
from arealite.inference.core.served_model import ServedModel
from arealite.kernels import cpu

LENGTH = 90  # of test sequences: several pages, and longer than every window here
SMALL = inference.SMALL | {"num_hidden_layers": 4, "head_dim": 16, "max_position_embeddings": 256}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXED = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA3 = {"sliding_window": 20, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
MIXTURE = [[(0, 37)], [(0, 1), (1, 60)], [(2, 1), (1, 20), (0, 33)], *[[(2, 1), (1, 1), (0, 1)]] * 4]
MIXTURE += [[(1, 1), (0, 1)]] * 13 + [[(0, 2)]]  # of three sequences of LENGTH, LENGTH + 7 and 5 tokens
ARCHITECTURES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama, tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2, two layers with a window": lambda: Qwen2Config(**SMALL, **MIXED),
    "qwen2, dynamic rope": lambda: Qwen2Config(
        **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
    "qwen3": lambda: Qwen3Config(**SMALL, **MIXED),
    "qwen3 moe": lambda: Qwen3MoeConfig(**SMALL, **EXPERTS),
    "mistral, window": lambda: MistralConfig(**SMALL, sliding_window=17),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4),
    "gemma2, soft-capping": lambda: Gemma2Config(
        **SMALL, sliding_window=16, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, **GEMMA3, rope_parameters=TWO_ROPES),
    "phi3, window": lambda: Phi3Config(**SMALL, sliding_window=33),
}


def tokens_of(seed: int, length: int = LENGTH) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [tokens_of(1), tokens_of(2, LENGTH + 7), tokens_of(3, 5)]


def plain_logits(folder: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[tokens, V] of the Hugging Face pass over the whole sequence, without this package's attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0]


def in_passes(model: ServedModel, passes, rows: list[list[int]], num_rows: int = 0) -> list[torch.Tensor]:
    """Hidden states of each row, computed as listed: per pass, pairs of a row and how many of its tokens come next."""
    pool = model.make_pool(sum(pages_for(len(row)) for row in rows) * PAGE_TOKENS)
    pool.tensor[:] = 7.0  # what is not written is not looked at
    places = torch.randperm(pool.num_pages, generator=torch.Generator().manual_seed(0)).add(1).tolist()
    sequences = [Sequence(GenerateRequest("spans", row, SamplingParams(1))) for row in rows]
    for sequence in sequences:
        sequence.pages = array("i", [places.pop() for _ in range(pages_for(len(sequence.tokens)))])
    parts: list[list[torch.Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    with torch.inference_mode():
        for counts in passes:
            spans = [Span(sequences[row], done[row], count) for row, count in counts]
            hidden = model.forward(pool, spans, 0 if counts[0][1] > 1 else num_rows)
            for (row, count), part in zip(counts, hidden.split([count for _, count in counts]), strict=True):
                parts[row].append(part.clone())
                done[row] += count
    assert done == [len(row) for row in rows]
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_pieces_and_decoded_tokens_give_the_plain_logits(kind, tmp_path):
    model = served(save_random(ARCHITECTURES[kind](), tmp_path))
    for row, hidden in zip(ROWS, in_passes(model, MIXTURE, ROWS), strict=True):
        plain = plain_logits(tmp_path, row)
        gap = (model.logits(hidden) - plain).abs().max() / plain.abs().max()
        assert gap < 1e-4, f"by {gap:.2g} of the largest logit"


@pytest.mark.parametrize("kind", ["gemma3", "mistral, window", "qwen3 moe"])
def test_greedy_answers_through_the_server_are_those_of_generate(kind, tmp_path):
    model = served(save_random(ARCHITECTURES[kind](), tmp_path))
    rows = [tokens_of(4, 50), tokens_of(5, 3)]
    with LocalServer(model) as server:
        answers = server.generate(rows, max_new_tokens=40, temperature=0, ignore_eos=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for row, answer in zip(rows, answers, strict=True):
        whole = plain.generate(torch.tensor([row]), max_new_tokens=40, do_sample=False, eos_token_id=-1)[0].tolist()
        assert answer["output_ids"] == whole[len(row) :]
        wanted = plain_logprobs(plain, whole)[len(row) - 1 :]
        assert output_logprobs(answer) == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """Two layers that see everything and two with a window."""
    return served(save_random(Qwen3Config(**SMALL, **MIXED), tmp_path_factory.mktemp("windowed")))


@cache
def whole(model: ServedModel, row: int) -> torch.Tensor:
    return in_passes(model, [[(0, LENGTH)]], [tokens_of(row)])[0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=3), max_size=9))
def test_any_cut_gives_the_whole_prompts_states(windowed, drawn):
    """Rows in any order and mixture; what the draw leaves over comes in a last pass."""
    left = [LENGTH] * 3
    passes = []
    for counts in [*drawn, [(row, LENGTH) for row in range(3)]]:
        chosen = [(row, min(count, left[row])) for row, count in dict(counts).items() if left[row]]
        for row, count in chosen:
            left[row] -= count
        passes += [chosen] if chosen else []
    for row, hidden in enumerate(in_passes(windowed, passes, [tokens_of(row) for row in range(3)])):
        torch.testing.assert_close(hidden, whole(windowed, row), atol=1e-5, rtol=1e-5)


def test_spans_longer_than_one_block_of_queries(windowed, monkeypatch):
    wanted = whole(windowed, 0)
    monkeypatch.setattr(layout, "QUERIES_PER_CALL", 16)
    got = in_passes(windowed, [[(0, 3)], [(0, LENGTH - 3)]], [tokens_of(0)])[0]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_in_bf16_pieces_and_decoded_tokens_give_the_trainers_logprobs(smollm2):
    """The same products and roundings by the kernels: what is left is the order of the vocabulary's sum."""
    from arealite.algorithm.packing import prefix_tree
    from arealite.engine.attention import ATTENTION, Layout
    from arealite.engine.packed_model import PackedModel

    model = served(Path(smollm2), torch.bfloat16)
    rows = [tokens_of(seed, 70) for seed in range(4)]
    passes = [[(0, 70), (1, 30), (2, 50)], [(1, 39), (3, 64), (2, 1)], *[[(3, 1), (2, 1)]] * 6, [(2, 13), (1, 1)]]
    hidden = in_passes(model, passes, rows)
    trainer = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16, attn_implementation=ATTENTION)
    PackedModel(trainer)  # which replaces its modules
    for row, states in zip(rows, hidden, strict=True):
        tree = prefix_tree([np.asarray(row)])
        with torch.inference_mode():
            plain = trainer(torch.tensor([row]), use_cache=False, tree_layout=Layout(tree, torch.device("cpu"))).logits[
                0
            ]
        gap = torch.log_softmax(model.logits(states).float(), -1) - torch.log_softmax(plain.float(), -1)
        assert float(gap.gather(1, torch.tensor(row[1:] + [0])[:, None]).abs().mean()) < (1e-5 if cpu.load() else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_tokens_are_the_same_bits_in_any_company(dtype, tmp_path):
    """Prompts one by one, and decode passes of one shape: with windows, too."""
    model = served(save_random(Qwen3Config(**SMALL, **MIXED), tmp_path), dtype, deterministic=True)
    rows = [tokens_of(0), tokens_of(1, 40), tokens_of(2, 60), tokens_of(3, 33)]
    decoded = [[(row, 1) for row in range(4) if step < len(rows[row]) - 30] for step in range(60)]
    together = in_passes(model, [*([(row, 30)] for row in range(4)), *decoded], rows, num_rows=4)
    alone = in_passes(model, [[(0, 30)], *[[(0, 1)]] * 60], rows[:1], num_rows=4)[0]
    assert torch.equal(together[0], alone)


@pytest.mark.parametrize(
    "config",
    [
        lambda: MistralConfig(**{**SMALL, "head_dim": 64}, sliding_window=17),
        lambda: Gemma3TextConfig(**{**SMALL, "head_dim": 32}, **GEMMA3, rope_parameters=TWO_ROPES),
    ],
)
def test_in_bf16_windows_are_as_exact_as_in_the_plain_pass(config, tmp_path):
    model = served(save_random(config(), tmp_path), torch.bfloat16)
    for row, hidden in zip(ROWS, in_passes(model, MIXTURE, ROWS), strict=True):
        plain, exact = (plain_logits(tmp_path, row, dtype).float() for dtype in (torch.bfloat16, torch.float32))
        assert (model.logits(hidden).float() - exact).norm() < 1.5 * (plain - exact).norm()


def test_a_window_reads_no_page_outside_of_it(windowed):
    pool = windowed.make_pool(1024)
    sequence = Sequence(GenerateRequest("long", tokens_of(0, 640), SamplingParams(1)))
    sequence.pages = array("i", pool.take(40))
    for start, count, most in [(639, 1, 3), (600, 1, 3), (620, 10, 4), (5, 1, 1)]:
        spans = [Span(sequence, start, count)]
        [block] = KVLayout(pool, spans).blocks(24)
        pages = sequence.pages[max(0, start - 23) // PAGE_TOKENS : pages_for(start + count)]
        assert set(pages) <= set(block.table.tolist()) and len(block.table) <= most
        assert len(KVLayout(pool, spans).blocks(None)[0].table) >= pages_for(start + count)
        assert span_order(spans[0], 24) <= span_order(spans[0])


@pytest.mark.skipif(cpu.load() is None, reason="no compiled kernels")
@pytest.mark.parametrize(
    "config",
    [
        lambda: LlamaConfig(**{**SMALL, "head_dim": 32}),
        lambda: MistralConfig(**{**SMALL, "head_dim": 32}, sliding_window=17),
        lambda: Qwen2Config(**{**SMALL, "head_dim": 32}, **MIXED),
        lambda: Qwen3Config(**{**SMALL, "head_dim": 32}, **MIXED),
    ],
)
def test_layers_of_the_common_kind_are_kernel_calls_with_the_same_bits(config, tmp_path):
    model = served(save_random(config(), tmp_path), torch.bfloat16)
    direct = in_passes(model, MIXTURE, ROWS)
    layers = model.module.model.layers
    assert all("forward" in vars(layer) for layer in layers)
    for layer in layers:
        del layer.forward
    assert all(map(torch.equal, direct, in_passes(model, MIXTURE, ROWS)))


def test_layers_of_other_kinds_are_refused(tmp_path):
    Qwen3NextConfig(**SMALL, layer_types=["linear_attention"] * 3 + ["full_attention"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="keep a state along the row"):
        served(tmp_path)


def test_long_rope_is_served_up_to_where_it_changes(tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, **factors}
    save_random(Phi3Config(**SMALL, rope_parameters=rope, original_max_position_embeddings=128), tmp_path)
    with pytest.raises(ConfigError, match="--context-length 128"):
        served(tmp_path)
    model = ServedModel.load(str(tmp_path), torch.float32, torch.device("cpu"), 128, False)
    plain = plain_logits(tmp_path, tokens_of(0))
    torch.testing.assert_close(model.logits(whole(model, 0)), plain, atol=1e-3, rtol=1e-4)
