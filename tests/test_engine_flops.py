"""FLOPs and gradient norms by group: against sums written out by hand, the same in all layouts."""

from dataclasses import replace

import pytest
import torch
from support.batches import make, random_batch, share, train_one_step
from support.layouts import on_ranks
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from arealite.algorithm.losses import Denominators
from arealite.api.types import Dims
from arealite.engine import flops
from arealite.engine.micro_batch import cut
from arealite.engine.optim import group_of
from arealite.engine.training_stats import Update, summary


def test_flops_are_counted_by_hand(tiny_llama):
    """Two layers, hidden 64, 4 heads and 2 KV heads of 16, MLP 128, vocabulary 49152, tied."""
    batch = random_batch(num_groups=1, size=2)
    whole, alone = (cut(batch, 4096, torch.device("cpu"), share_prompts)[0] for share_prompts in (True, False))
    lengths = [len(path) for path in alone.layout.tree.paths]
    model = flops.ModelFlops.of(AutoModelForCausalLM.from_pretrained(tiny_llama))
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    pairs = 2 * sum(n * (n + 1) // 2 for n in lengths)
    expected = 6 * weights * sum(lengths) + 6 * 64 * 49152 * len(alone.predicting) + 12 * 64 * pairs
    assert model.count(alone) == pytest.approx(expected, rel=1e-12)
    assert len(whole.tokens) < sum(lengths) and model.count(whole) < model.count(alone)


def test_windows_frozen_weights_and_experts_count_for_what_they_do():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    trained = flops.ModelFlops.of(dense)
    frozen = flops.ModelFlops.of(dense.requires_grad_(False))
    assert (frozen.per_token, frozen.per_row) == (trained.per_token * 4 / 6, trained.per_row * 4 / 6)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    moe = flops.ModelFlops.of(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)))
    assert moe.per_token == 6 * (4 * 16 * 16 + 16 * 4 + 2 * 3 * 16 * 8)
    micro = cut(random_batch(num_groups=1, size=1, prompt=9), 4096, torch.device("cpu"))[0]
    windowed = replace(trained, windows=(4, None))
    full = replace(trained, windows=(None, None))
    n = len(micro.tokens)
    assert full.count(micro) - windowed.count(micro) == trained.per_pair * ((n - 4) * (n - 3) / 2)


def test_speed_and_peaks(monkeypatch):
    counts = [{"num_flops": 3e12, "num_sequence_tokens": 100.0}, {"num_flops": 1e12, "num_sequence_tokens": 50.0}]
    updates = [Update(0.0, 0.0, 0.0, False, Denominators(1, 1), each) for each in counts]
    told = summary(updates, 2.0, 1e12, 4)
    assert (told["train_tokens_per_s"], told["mfu"], told["update_s"]) == (75.0, 0.5, 2.0)
    assert "mfu" not in summary(updates, 2.0, None, 4)
    for name, peak in (
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("X", None),
    ):
        flops.peak_flops.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert flops.peak_flops(torch.device("cuda"), torch.bfloat16) == peak
        assert flops.peak_flops(torch.device("cuda"), torch.float32) is None
    assert flops.peak_flops(torch.device("cpu"), torch.float32) > 1e8


def test_names_of_all_kinds_have_their_group():
    expected = {
        "model.embed_tokens.weight": "embedding", "model.layers.0.self_attn.q_proj.weight": "attention",
        "model.layers.0.self_attn.q_norm.weight": "norms", "model.layers.0.input_layernorm.weight": "norms",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight": "attention", "lm_head.weight": "head",
        "model.layers.1.mlp.gate_proj.weight": "mlp", "model.layers.1.mlp.gate.weight": "experts",
        "model.layers.1.mlp.experts.down_proj": "experts", "score.weight": "head", "model.norm.weight": "norms",
    }  # fmt: skip
    assert {name: group_of(name) for name in expected} == expected


def norms(rank, folder, dims):
    actor = make(folder, dims)
    seen = {}

    def keep(optimizer, *_):
        from arealite.engine.export import whole

        for name, p in actor.sharded.parameters.items():
            seen[name] = float(whole(p.grad).double().square().sum())

    actor.sharded.optimizer.register_step_pre_hook(keep)
    actor.config.optimizer.max_grad_norm = float("inf")
    stats = train_one_step(actor, share(random_batch(), actor.mesh.share, dims.d))
    return {name: value for name, value in stats.items() if "grad_norm" in name}, seen


def test_gradient_norms_by_group_make_the_whole_in_all_layouts(tiny_llama):
    (alone, seen), *_ = on_ranks(1, norms, tiny_llama, Dims())
    assert set(alone) == {"grad_norm", *(f"grad_norm_{g}" for g in ("embedding", "attention", "mlp", "norms"))}
    for group in ("embedding", "attention", "mlp", "norms"):
        total = sum(square for name, square in seen.items() if group_of(name) == group)
        assert alone[f"grad_norm_{group}"] == pytest.approx(total**0.5, rel=1e-5)
    assert sum(v**2 for k, v in alone.items() if k != "grad_norm") == pytest.approx(alone["grad_norm"] ** 2, rel=1e-9)
    for found, _ in on_ranks(2, norms, tiny_llama, Dims(d=2)):
        assert found == pytest.approx(alone, rel=1e-5)
