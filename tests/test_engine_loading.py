"""Models that are built without memory and read from safetensors piece by piece: the same as from_pretrained."""

import json
import re
import shutil
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.layouts import on_ranks
from transformers import AutoConfig, AutoModelForCausalLM

from arealite.api.errors import ConfigError
from arealite.engine.loading import Checkpoint, build_model, materialize
from arealite.engine.packed_model import load_model
from arealite.models.folder import open_config

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
KINDS = {
    "llama": {"rope_parameters": LLAMA3_ROPE}, "qwen2": {"tie_word_embeddings": True}, "qwen3": {}, "mistral": {},
    "qwen3_moe": EXPERTS, "gemma3_text": {"sliding_window": 64}, "mixtral": {"num_local_experts": 3},
}  # fmt: skip


def config_of(kind: str, **changes):
    return AutoConfig.for_model(kind, **SIZES | KINDS.get(kind, {}) | changes)


def save_model(kind: str, folder: Path, changes: dict | None = None, **how) -> str:
    """A random model of this kind in bf16, in several files if `max_shard_size` says so."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(kind, **changes or {})).to(torch.bfloat16)
    for name, buffer in model.named_buffers():  # what the configuration says in full is in no checkpoint
        assert name not in model.state_dict(), buffer
    model.save_pretrained(folder, **how)
    return str(folder)


def load(path: str):
    model = build_model(path, open_config(path))
    assert all(p.is_meta for p in model.parameters())
    checkpoint = Checkpoint(path, model)
    materialize(model, torch.device("cpu"))
    checkpoint.load(model.state_dict(keep_vars=True))
    return model


def assert_same(model, plain) -> None:
    tensors, wanted = model.state_dict(keep_vars=True), plain.state_dict(keep_vars=True)
    assert list(tensors) == list(wanted)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, wanted[name]), name
    buffers = dict(plain.named_buffers())
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, plain)]
    assert tied[0] == tied[1]
    ids = torch.arange(1, 40)[None]
    assert torch.equal(model.eval()(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_that_of_from_pretrained(kind, tmp_path):
    path = save_model(kind, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 2
    assert_same(load(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def test_experts_may_be_one_by_one_or_in_one_tensor(tmp_path):
    path = save_model("qwen3_moe", tmp_path / "hub")
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    names = load_file(tmp_path / "hub" / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    plain.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    for folder in ("hub", "fused"):
        assert_same(load(str(tmp_path / folder)), plain)


def test_names_may_lack_the_prefix_of_the_base_model(tmp_path):
    path = save_model("qwen2", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    change(tmp_path, lambda t: {name.removeprefix("model."): v for name, v in t.items()})
    assert_same(load(path), plain)


def change(folder: Path, how) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(how(tensors), folder / "model.safetensors", metadata={"format": "pt"})


NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("name", [HEAD, EMBEDDING, "both"])
def test_a_tied_weight_may_have_either_name(tmp_path, name):
    path = save_model("qwen2", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def rename(tensors):
        held = tensors.pop(EMBEDDING)
        return tensors | {n: held.clone() for n in (HEAD, EMBEDDING) if name in (n, "both")}

    change(tmp_path, rename)
    assert_same(load(path), plain)


BROKEN = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != NORM}, rf"1 tensors missing \({NORM}\)"),
    "left over": (lambda t: t | {"model.extra": torch.zeros(2)}, r"1 tensors left over \(model.extra\)"),
    "misshapen": (lambda t: t | {NORM: torch.zeros(3)}, rf"misshapen \({NORM} \[3\] for \[32\]\)"),
    "half an expert": (
        lambda t: {k: v for k, v in t.items() if "experts.2.up_proj" not in k},
        r"missing \(model.layers.0.mlp.experts.gate_up_proj",
    ),
    "bytes": (lambda t: t | {NORM: torch.zeros(32, dtype=torch.int8)}, "quantised"),
    "untied": (lambda t: {**t, HEAD: t[EMBEDDING] + 1}, "set tie_word_embeddings to false"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_refused(tmp_path, fault):
    how, told = BROKEN[fault]
    path = save_model("qwen2" if fault == "untied" else "qwen3_moe", tmp_path)
    load(path)
    change(tmp_path, how)
    with pytest.raises(ConfigError, match=told):
        Checkpoint(path, build_model(path, open_config(path)))


def test_folders_that_are_no_checkpoint_are_refused(tmp_path):
    path = save_model("llama", tmp_path / "whole", max_shard_size="20KB")
    model = build_model(path, open_config(path))
    one = sorted((tmp_path / "whole").glob("*.safetensors"))[1]
    cut = one.read_bytes()[:-100]
    one.write_bytes(cut)
    with pytest.raises(ConfigError, match=f"has no whole file {one.name}"):
        Checkpoint(path, model)
    one.unlink()
    with pytest.raises(ConfigError, match=f"has no whole file {one.name}.*No such file"):
        Checkpoint(path, model)
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", old)
    torch.save({}, old / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only pytorch_model.bin.*save_pretrained"):
        Checkpoint(str(old), model)
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match="quantised"):
        build_model(str(old), open_config(str(old)))
    with pytest.raises(ConfigError, match="no causal language model can be loaded from .*hub id"):
        open_config("nobody/has-this-model")


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_positions_that_depend_on_the_longest_sequence_are_refused(tmp_path, kind):
    config_of("llama", rope_parameters=ROPES[kind]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"rope_type {kind}.*yarn"):
        load_model(str(tmp_path))
    by_layers = {"sliding_attention": LLAMA3_ROPE, "full_attention": ROPES[kind]}
    config_of("gemma3_text", rope_parameters=by_layers).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"rope_type {kind}"):
        load_model(str(tmp_path))


def test_attention_that_is_not_computed_is_refused_before_any_rollout(tmp_path):
    config_of("gemma3_text", use_bidirectional_attention=True).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="even alone a sequence gets other scores"):
        load_model(str(tmp_path))
    config_of("gpt_oss", num_local_experts=2, num_experts_per_tok=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be computed on packed sequences: "):
        load_model(str(tmp_path))
    config_of("gemma2", attn_logit_softcapping=50.0, final_logit_softcapping=None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="soft-capping or sinks"):
        load_model(str(tmp_path))


def test_a_hub_id_is_found_in_the_cache(tmp_path, monkeypatch):
    cached = tmp_path / "models--nobody--tiny"
    path = save_model("qwen3", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    for module in (huggingface_hub.constants, transformers.utils.hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    assert_same(load("nobody/tiny"), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    (Path(path) / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has neither model.safetensors nor"):
        load("nobody/tiny")


class PeakMemory:
    """The most anonymous memory of this process while the block runs, above what it had before, in bytes."""

    def __enter__(self):
        self._end, self._before, self.num_bytes = threading.Event(), self._now(), 0
        self._watch = threading.Thread(target=self._run)
        self._watch.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._watch.join()

    def _run(self):
        while not self._end.wait(0.001):
            self.num_bytes = max(self.num_bytes, self._now() - self._before)

    def _now(self):
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def load_half(rank: int, path: str) -> tuple[int, int, int]:
    """Bytes of this rank's shards, of the largest tensor, and at the peak of loading."""
    from arealite.api.cli_args import TrainEngineConfig
    from arealite.engine.fsdp_engine import FSDPEngine

    engine = FSDPEngine(TrainEngineConfig(path=path, dtype="float32"), trainable=False)
    with PeakMemory() as peak:
        engine.initialize()
    shards = [p.to_local().nbytes for p in engine.sharded.model.parameters()]
    return sum(shards), max(p.nbytes for p in engine.sharded.model.parameters()), peak.num_bytes


def test_a_rank_takes_the_memory_of_its_shards(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 128}
    path = save_model("llama", tmp_path, sizes, max_shard_size="20MB")
    for shards, largest, peak in on_ranks(2, load_half, path):
        assert shards > 60e6
        assert shards / 2 < peak < shards + largest + 20e6, (shards, largest, peak)
