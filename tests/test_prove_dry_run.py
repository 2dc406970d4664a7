"""Ranks without numbers: what they hold, what does not divide, and that tensors on the wrong device are found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from arealite.api.errors import ConfigError
from arealite.models import public
from arealite.prove import dry_run

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of a small model, by a process that has the accelerator."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(sizes | heads | kind))
    command = [sys.executable, str(ROOT / "tests" / "support" / "shapes.py"), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_each_rank_holds_its_share(found):
    """Weights, gradients and moments are those of the estimate, which does not know how a layer is cut."""
    whole = found["d1"]["estimated"]["weights"]
    for layout, told in found.items():
        for num_layers, parts in told["ranks"] if layout.startswith("d") else ():
            is_alone = layout.startswith("d1")
            assert num_layers == (1 if "p2" in layout else 2)
            if "p2" not in layout:
                assert parts["optimizer"] == pytest.approx(told["estimated"]["optimizer"], rel=0.05)
                assert parts["weights"] == pytest.approx(told["estimated"]["weights"], rel=0.15)
            assert parts["weights"] < whole * 1.15 if is_alone else parts["weights"] < 0.7 * whole
    assert "optimizer" not in found["ref"] and "gradients" not in found["ref"]


def test_what_is_offloaded_takes_no_memory_of_the_device(found):
    _, alone = found["d1"]["ranks"][0]
    offloaded = found["offloaded"]
    assert "optimizer" not in offloaded and offloaded["weights"] < 0.05 * alone["weights"]
    assert offloaded["activations"] == pytest.approx(alone["activations"], rel=0.1)


def test_experts_are_shared_out_as_if_evenly_chosen(found):
    alone, spread = found["experts"]
    assert spread["weights"] == pytest.approx(alone["weights"] / 4, rel=0.1)
    assert spread["activations"] > 0 and spread["optimizer"] == pytest.approx(alone["optimizer"] / 4, rel=0.1)


def test_what_does_not_divide_is_refused(found):
    assert "cannot be spread by t = 3" in found["refused"] and "These work: " in found["refused"]


def test_a_tensor_on_the_wrong_device_is_found(found):
    assert "cpu" in found["mixed up"] and dry_run.KIND in found["mixed up"]


def test_sizes_of_public_models(tmp_path):
    """Without a network; what is unknown is asked for."""
    folder = public.folder_of("Qwen/Qwen2.5-32B-Instruct", tmp_path)
    config = json.loads((Path(folder) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["model_type"]) == (64, 5120, "qwen2")
    with pytest.raises(ConfigError, match="give a folder with its config.json"):
        public.folder_of("someone/unknown-7B", tmp_path)
