"""The estimate of memory: what it grows with, what of it is a GPU's, and the tokens of a step."""

import json
import os
from dataclasses import replace

import pytest

from arealite.api.cli_args import GRPOConfig, LoRAConfig, PPOActorConfig
from arealite.api.types import Dims
from arealite.launcher import check
from arealite.launcher.machine import Machine
from arealite.launcher.memory_estimate import server_parts, trainer_parts
from arealite.launcher.plan import make_plan
from arealite.models.rank_memory import ModelShape, PassTokens, rank_parts, settled


def test_the_shape_of_a_model_is_read_from_its_folder(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    shape = ModelShape.read(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())  # tied parameters come once
    assert (shape.kv_width, shape.num_layers, shape.hidden) == (32, 2, 64)
    assert ModelShape.read(tmp_path / "absent") is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vision"}))
    assert ModelShape.read(tmp_path) is None


def test_memory_grows_with_what_is_said_to_drive_it(tiny_llama):
    shape = ModelShape.read(tiny_llama)
    config = GRPOConfig()
    config.server.kv_cache_tokens = 1000
    kv = {p.name: p.num_bytes for p in server_parts(config, shape, 1)}["KV cache"]
    assert kv == 1000 * 2 * 2 * 32 * 2  # tokens x (K and V) x layers x width x bfloat16

    def of(dims, ref=None):
        return {p.name: p.num_bytes for p in trainer_parts(config, shape, dims, ref, on_gpu=True)}

    count, ends = shape.num_parameters, shape.vocabulary * shape.hidden
    alone, parts = of(Dims()), of(Dims(d=2), shape)
    assert parts["optimizer"] == 8 * count / 2 and parts["reference"] == 2 * count / 2
    assert alone["working copy"] == 2 * count and of(Dims(d=2))["working copy"] == 2 * count  # both layers are gathered
    for dims in (Dims(d=2), Dims(t=2), Dims(c=2)):
        assert of(dims)["weights"] == 4 * count / 2 and of(dims)["activations"] < alone["activations"]
    assert of(Dims(p=2))["weights"] == 4 * ((count - ends) / 2 + ends)  # each stage has the tied embedding
    sizes = []
    for config.actor.gradient_checkpointing in ("none", "selective", "full"):
        sizes.append(of(Dims())["activations"])
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < sizes[0]
    config.actor.optimizer.kind = "adafactor"
    assert of(Dims())["optimizer"] < 0.05 * alone["optimizer"]
    config.actor.optimizer.kind, config.actor.lora = "adamw", LoRAConfig(rank=4)
    adapters = 4 * shape.num_layers * (7 * 64 + 2 * 64 + 2 * 32 + 3 * 128)  # rank x (inputs + outputs)
    assert of(Dims())["gradients"] == 4 * adapters and of(Dims())["weights"] == 2 * count + 4 * adapters


def test_checkpointing_is_as_little_as_fits(tiny_llama):
    """By the estimate's own figures; what does not fit at all is tried with most of it."""
    shape = ModelShape.read(tiny_llama)
    config = GRPOConfig()
    config.actor.gradient_checkpointing = "auto"
    dims = Dims(t=2)  # where something lies between none and full
    _, needed = settled(config.actor, shape, dims, 0, on_gpu=True)
    assert list(needed) == ["none", "selective", "full"] and needed["none"] > needed["selective"] > needed["full"]
    for kind, num_bytes in needed.items():
        assert settled(config.actor, shape, dims, num_bytes, on_gpu=True)[0].gradient_checkpointing == kind
        parts = trainer_parts(config, shape, dims, None, on_gpu=True, free_bytes=num_bytes)
        assert next(p.assumption for p in parts if p.name == "activations").endswith(f"checkpointing {kind}")
    assert settled(config.actor, shape, dims, 1, on_gpu=True)[0].gradient_checkpointing == "full"
    assert settled(replace(config.actor, gradient_checkpointing="none"), shape, dims, 1, on_gpu=True)[1] == {}


def test_the_fullest_stage_of_a_pipeline():
    """The head counts as work of the last stage, so that the first one has more layers than its share."""
    widths = {"hidden": 1536, "intermediate": 8960, "query_width": 1536, "kv_width": 256}  # Qwen2.5-1.5B's
    count, vocabulary = 1_543_714_304, 151936
    shape = ModelShape(count, 28, vocabulary=vocabulary, context_length=4096, is_tied=True, **widths)
    parts = rank_parts(PPOActorConfig(), shape, Dims(p=2), PassTokens(8192, 2), on_gpu=True)
    found = {part.name: part.num_bytes for part in parts}
    assert found["weights"] == pytest.approx(4 * (16 * (count - shape.end) / 28 + shape.end))
    assert found["activations"] == pytest.approx(8192 * 2 * 16 * 2 * 2 * sum(widths.values()))
    assert found["logits"] == 0  # of the last stage, which needs less than the first
    parts = rank_parts(PPOActorConfig(), shape, Dims(p=2), PassTokens(100, 2), on_gpu=True)
    assert {part.name: part.num_bytes for part in parts}["logits"] > 4 * shape.end  # here that needs more


def test_the_memory_of_gpus(monkeypatch, tiny_llama, tmp_path):
    """Of the fullest one; what two processes need there is added up, and warned of where it is too much."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '81000\\n8000\\n'")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    machine = Machine.local(GRPOConfig().cluster)
    assert machine.gpu_bytes == 8000 << 20
    config = GRPOConfig(allocation_mode="native:d1|fsdp:d1", actor=PPOActorConfig(path=tiny_llama))
    told = {}
    for config.server.kv_cache_tokens in (1000, 10**9):
        plan = make_plan(config, [machine], tiny_llama, ["train.py"])
        told[config.server.kv_cache_tokens] = check.memory(plan, config, machine, 120)
    assert "of 7.81 GiB free" in told[1000][-1]
    assert "of 7.81 GiB free" in told[10**9][-2] and "does not fit" in told[10**9][-1]
    config.server.kv_cache_tokens = None  # less than half of what is free
    kv = next(p for p in server_parts(config, ModelShape.read(tiny_llama), 1, gpu_share=1e6) if p.name == "KV cache")
    assert kv.num_bytes == 1e6


def test_tokens_of_a_step_follow_the_prompts(tiny_llama, tmp_path):
    shape = ModelShape.read(tiny_llama)
    config = GRPOConfig()
    config.gconfig.n_samples, config.gconfig.max_new_tokens, config.train_dataset.batch_size = 4, 10, 2
    (tmp_path / "rows.jsonl").write_text('{"question": "' + 300 * "x" + '", "answer": "1"}\n')

    def tokens():
        (part,) = (p for p in trainer_parts(config, shape, Dims(), None) if p.name == "activations")
        return int(part.assumption.partition(" ")[0])

    assert tokens() == 2 * (2048 - 10 + 4 * 9)  # the context holds prompt and answer
    config.train_dataset.path = str(tmp_path / "rows.jsonl")
    assert tokens() == 2 * (100 + 16 + 4 * 9)
    config.actor.share_prompts = False
    assert tokens() == 2 * 4 * (100 + 16 + 9)
    config.train_dataset.max_prompt_tokens = 50
    assert tokens() == 2 * 4 * (50 + 9)
    config.actor.max_tokens_per_mb = 100  # evenly cut
    assert tokens() == -(-2 * 4 * 59 // 5)
