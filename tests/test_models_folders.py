"""Model folders that are not quite standard: opened, or refused in a sentence that says what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.batches import actor_config, random_batch, started
from support.inference import LocalServer, save_tiny_llama, served
from transformers import AddedToken, AutoTokenizer, GenerationConfig

from arealite.api.cli_args import LoRAConfig
from arealite.api.errors import ConfigError
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.models.folder import open_tokenizer


@pytest.fixture
def folder(tmp_path, one_process):
    return save_tiny_llama(tmp_path / "tiny")


def edit(path: Path, **changes) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (found | changes).items() if v is not None}))


def as_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    edit(folder / "adapter_config.json", base_model_name_or_path="some/base", peft_type="LORA")


def with_code(folder: Path) -> None:
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (folder / "configuration_own.py").write_text("raise SystemExit('run')\n")


def without_a_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {name: f"model-0000{1 + ('layers.1.' in name)}-of-00002.safetensors" for name in tensors}
    edit(folder / "model.safetensors.index.json", metadata={}, weight_map=names)


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


FAULTS = {
    as_adapter: "is a LoRA adapter for some/base.*merge it",
    with_code: "no such code is run here",
    without_a_shard: "model-00002-of-00002.safetensors",
    without_a_tensor: "missing.*model.norm.weight",
    lambda folder: (folder / "config.json").unlink(): "no causal language model can be loaded",
    lambda folder: (folder / "config.json").write_text("{"): "no causal language model can be loaded",
    lambda folder: edit(folder / "config.json", model_type="not-yet-known"): "no causal language model can be loaded",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_trainer_and_server_say_what_is_wrong_with_a_folder(folder, fault):
    fault(folder)
    with pytest.raises(ConfigError, match=FAULTS[fault]):
        served(folder)
    with pytest.raises(ConfigError, match=FAULTS[fault]):
        FSDPEngine(actor_config(folder)).initialize()


def test_nobody_is_asked_whether_a_folders_code_may_run(folder):
    with_code(folder)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    (folder / "tokenizer.json").unlink()
    script = (
        f"from arealite.models.folder import *\nfor f in (open_config, open_tokenizer):\n try: f({str(folder)!r})\n"
    )
    script += " except Exception as error: print(type(error).__name__)\n"
    ran = subprocess.run([sys.executable, "-c", script], input="y\ny\n", capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["ConfigError", "ConfigError"], ran


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(folder, caplog):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<tool>", special=True)] * 1 + ["<a>", "<b>"])
    tokenizer.save_pretrained(folder)
    with LocalServer(served(folder)) as server:
        assert "tokens more, such as '<" in caplog.text
        status, answer = server.post("/generate", {"text": "x <b>", "sampling_params": {"max_new_tokens": 1}})
    assert status == 400 and "tokenizer has more tokens than the model" in str(answer)
    engine = started(FSDPEngine(actor_config(folder), trainable=False))
    batch = random_batch(vocabulary=250)
    batch.tokens[3] = len(tokenizer) - 1
    with pytest.raises(ConfigError, match="only 260 embedding rows.*resize_token_embeddings"):
        engine.compute_logp(batch)


def test_a_folder_without_tokenizer_is_refused_where_one_is_needed(folder):
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer can be read from .*set tokenizer_path"):
        open_tokenizer(str(folder))
    assert served(folder).tokenizer is None


def old_spelling(folder: Path) -> dict:
    """What releases of transformers before 5 read: these keys at the top, or their own defaults."""
    config = json.loads((folder / "config.json").read_text())
    return {name: config.get(name) for name in ("rope_theta", "rope_scaling", "torch_dtype", "eos_token_id")}


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 64}
SPELLINGS = {
    "old": {"rope_theta": 5e5, "rope_scaling": ROPE, "rope_parameters": None, "torch_dtype": "float32", "dtype": None},
    "new": {"rope_parameters": ROPE | {"rope_theta": 5e5}},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_export_is_read_as_its_source_by_old_readers_and_new(folder, tmp_path, spelling):
    edit(folder / "config.json", **SPELLINGS[spelling], custom_key="kept", auto_map={"AutoConfig": "own.Own"})
    (folder / "own.py").write_text("# of the model\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    edit(folder / "generation_config.json", temperature=0.6, do_sample=False, eos_token_id=[258, 259])
    engine = started(FSDPEngine(actor_config(folder, dtype="bfloat16")))
    engine.save(str(tmp_path / "out"))
    out = tmp_path / "out"
    assert old_spelling(out) == {
        "rope_theta": 5e5, "rope_scaling": ROPE, "torch_dtype": "bfloat16", "eos_token_id": 258
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text())["custom_key"] == "kept"
    for file in ("own.py", "additional_chat_templates/rag.jinja", "chat_template.jinja"):
        assert (out / file).read_text() == (folder / file).read_text()
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.temperature, generation.eos_token_id) == (0.6, [258, 259])
    again = started(FSDPEngine(actor_config(out), trainable=False))
    assert again.sharded.hf_model.config.rope_parameters == engine.sharded.hf_model.config.rope_parameters
    old, new = (AutoTokenizer.from_pretrained(f) for f in (folder, out))
    assert old.chat_template == new.chat_template and "rag" in new.chat_template
    assert old.get_vocab() == new.get_vocab() and old.special_tokens_map == new.special_tokens_map


def test_an_adapter_names_its_base_for_every_working_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    engine = started(FSDPEngine(actor_config(folder.name, lora=LoRAConfig(rank=2, alpha=4, target_modules=["q_proj"]))))
    engine.save(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder
    )
