"""What cannot run is told before anything starts, in sentences and quickly: by `check` and `run`, and by scripts."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from arealite.api.errors import DatasetError
from arealite.cli import main
from arealite.launcher.child import first_error
from arealite.models.folder import find_on_hub

SFT_ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
GOOD = {
    "grpo": {"question": "1 + 1?", "answer": "2"},
    "sft": SFT_ROW,
    "rw": {"prompt": "a", "chosen": "b", "rejected": "c"},
}


@pytest.fixture
def write(tmp_path, tiny_llama):
    """Writes a data set and a configuration; returns its path."""

    def written(kind: str = "grpo", rows: list | None = None, **settings) -> str:
        rows = [GOOD[kind]] * 8 if rows is None else rows
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        trained = "actor" if kind == "grpo" else "model"
        config = {"kind": kind, trained: {"path": tiny_llama}, "cluster": {"fileroot": str(tmp_path / "runs")}}
        config["train_dataset"] = {"path": str(tmp_path / "rows.jsonl"), "batch_size": 4}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config | settings))
        return str(tmp_path / "run.yaml")

    return written


@pytest.fixture
def refused(tmp_path, capsys):
    """Both commands refuse the configuration with the words, within two seconds, and nothing has begun."""
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('started')")

    def check(said: str, config: str, *overrides: str) -> None:
        for command in (["check", config], ["run", str(script), "--config", config]):
            began = time.process_time()
            assert main([*command, *overrides]) == 2
            assert time.process_time() - began < 2
            told = capsys.readouterr().err
            assert said in told and "Traceback" not in told, told
        assert not (tmp_path / "runs").exists()

    return check


@pytest.mark.parametrize("kind", ["grpo", "sft", "rw"])
def test_data_sets_that_cannot_be_used(kind, write, refused, tmp_path, capsys):
    config = write(kind)
    assert main(["check", config]) == 0 and "rows: 8" in capsys.readouterr().out
    for key in ("train_dataset", "valid_dataset"):
        refused(
            f"{key}: data set '{tmp_path}/absent.jsonl' does not exist", config, f"{key}.path={tmp_path}/absent.jsonl"
        )
        refused(f"{key}: data set 'absent.csv' does not exist", config, f"{key}.path=absent.csv")
        (tmp_path / "empty.jsonl").write_text("\n")
        refused(f"{key}: data set '{tmp_path}/empty.jsonl' has no rows", config, f"{key}.path={tmp_path}/empty.jsonl")
        (tmp_path / "there.csv").write_text("question,answer\n1,2\n")
        refused("there.csv ends in '.csv', expected .jsonl or .parquet", config, f"{key}.path={tmp_path}/there.csv")
        (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
        refused(f"{key}: {tmp_path}/other.jsonl:1: ", config, f"{key}.path={tmp_path}/other.jsonl")
    refused(f"{tmp_path}/rows.jsonl:3: ", write(kind, [GOOD[kind]] * 2 + [{"a": 1}]))


def test_models_that_are_none(write, refused, tmp_path, tiny_llama):
    config = write()
    folder = tmp_path / "model"
    refused(f"actor.path: no folder {folder}: give", config, f"actor.path={folder}")
    refused("tokenizer_path: no folder ", config, f"tokenizer_path={folder}")
    folder.mkdir()
    refused(f"actor.path: {folder} is an empty folder", config, f"actor.path={folder}")
    refused(f"tokenizer_path: {folder} has none of tokenizer.json", config, f"tokenizer_path={folder}")
    (folder / "adapter_config.json").write_text("{}")
    refused("holds an adapter without its model", config, f"actor.path={folder}")
    settings = json.loads((Path(tiny_llama) / "config.json").read_text())
    for changes, said in (({}, "has neither model.safetensors nor "), ({"quantization_config": {}}, "is quantised")):
        (folder / "config.json").write_text(json.dumps(settings | changes))
        refused(said, config, "ref.path=${actor.path}", f"actor.path={folder}")
    refused(f"actor.path: {tmp_path}/rows.jsonl is a file", config, f"actor.path={tmp_path}/rows.jsonl")
    refused("2 reasons why this cannot run", config, "actor.path=./absent", "train_dataset.path=./absent")


@pytest.mark.parametrize(("name", "said"), [("Gemma2", "soft-capping"), ("GPT2", "max_position_embeddings")])
def test_an_architecture_that_is_not_computed_is_refused_at_once(name, said, write, tmp_path, tiny_llama, capsys):
    """By the code of trainer and servers, asked in a process of its own."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    others = {"Gemma2": {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16}, "GPT2": {}}[name]
    config = getattr(transformers, f"{name}Config")(**sizes, **others)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    assert main(["check", write(), f"actor.path={tmp_path / 'model'}", f"tokenizer_path={tiny_llama}"]) == 2
    told = capsys.readouterr().err
    assert "actor.path: " in told and said in told and "Traceback" not in told


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"cut", None])
def test_weights_that_are_not_there_in_full_are_refused(content, write, refused, tmp_path, tiny_llama):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (weights,) = folder.glob("*.safetensors")
    (folder / "consolidated.safetensors").touch()  # another library's, which nobody reads
    if content is None:  # a shard that the index names is missing
        weights.rename(folder / "model-00002-of-00002.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        weights.write_bytes(weights.read_bytes()[:-1] if content == b"cut" else content)
    refused(f"actor.path: {folder} has no whole file model", write(), f"actor.path={folder}")


def test_a_quantisation_of_nothing_is_none(write, tmp_path, tiny_llama):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": None}))
    assert main(["check", write(), f"actor.path={folder}"]) == 0


def test_a_context_above_the_models_is_refused(write, refused):
    refused("what the model can read (2048 tokens) leaves no room", write(), "gconfig.max_new_tokens=2048")
    refused("set train_dataset.max_prompt_tokens=1536", write(), "train_dataset.max_prompt_tokens=1537")
    refused("server.context_length (4096) is above what ", write(), "server.context_length=4096")


def test_generated_tasks_are_tried(write, capsys):
    pytest.importorskip("reasoning_gym")
    words = ["train_dataset.num_rows=1000000", "train_dataset.path=reasoning_gym:"]
    assert main(["check", write(), words[0], words[1] + "basic_arithmetic"]) == 0
    assert "rows: 1000000" in capsys.readouterr().out
    assert main(["check", write(), words[0], words[1] + "no_such_task"]) == 2
    assert "train_dataset: " in capsys.readouterr().err


def run_script(tmp_path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(text)
    command = [sys.executable, str(tmp_path / "script.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_scripts_end_with_a_sentence_too(write, tmp_path):
    text = (
        "import sys\nfrom arealite.api.cli_args import GRPOConfig\nfrom arealite.api.load_config import load_config\n"
        "from arealite.dataset.sources import read_rows\n"
        "config = load_config(sys.argv[1:], GRPOConfig)\n"
        "list(read_rows(config.train_dataset, 1))\nraise KeyError('own')\n"
    )
    config = write()
    ran = run_script(tmp_path, text, "--config", config, "seeed=1")
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert ran.stderr.startswith("arealite: ConfigError: 1 problem") and first_error(ran.stderr).startswith(
        "ConfigError"
    )
    ran = run_script(tmp_path, text, "--config", config, "train_dataset.path=./absent")
    assert ran.stderr.startswith("arealite: DatasetError: data set './absent'") and "Traceback" not in ran.stderr
    ran = run_script(tmp_path, text, "--config", config)
    assert ran.stderr.startswith("Traceback") and "KeyError: 'own'" in ran.stderr
    ran = run_script(tmp_path, text, "--help")
    assert ran.returncode == 0 and "--config FILE [key=value ...]" in ran.stdout


@pytest.mark.parametrize("text", ["def main():\n    print('never called')\n", "import sys\nsys.exit(0)\n"])
def test_a_script_that_does_nothing_is_told(text, write, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing.py").write_text(text)
    assert main(["run", "nothing.py", "--config", write("sft"), "launcher.stop_grace_s=1"]) == 1
    assert "the script ended without having made a trainer" in capfd.readouterr().err


def test_places_that_cannot_be_written(write, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "train.py").write_text("")
    command = ["run", str(tmp_path / "train.py"), "--config", write("sft")]
    for place in (tmp_path / "file", "/proc/here"):
        assert main([*command, f"cluster.fileroot={place}"]) == 2
        told = capsys.readouterr().err
        assert "cannot be written" in told and "set cluster.fileroot" in told
    monkeypatch.setenv("AREALITE_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["fetch", "smollm2-135m"]) == 2
    told = capsys.readouterr().err
    assert "Not a directory" in told and "AREALITE_CACHE" in told and "Traceback" not in told


def test_an_offline_hub_answers_fast(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(DatasetError, match=r"owner/name is no local path, and http://127.0.0.1:9 does not answer"):
        find_on_hub("owner/name")
    assert time.monotonic() - began < 10 and os.environ["HF_HUB_OFFLINE"] == "1" and constants.HF_HUB_OFFLINE
    (tmp_path / "models--owner--name").mkdir()
    find_on_hub("owner/name")  # a copy is there
    with pytest.raises(DatasetError, match="offline mode is set"):
        find_on_hub("owner/name", "dataset")
