"""LoRA adapters: each request gets its own, equal to the merged model's answer; what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.inference import LocalServer, output_logprobs, served, wait_until
from transformers import AutoModelForCausalLM

PROMPT = list(range(30, 50))
TARGETS = ["q_proj", "v_proj", "down_proj"]


def make_adapter(base: Path, folder: Path, seed: int, rslora: bool = False) -> Path:
    """By PEFT itself, with matrices that matter; and beside it the merged model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=rslora)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return folder / "adapter"


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    return [make_adapter(folder, tmp_path_factory.mktemp(f"lora{i}"), i, rslora=i == 1) for i in range(2)]


def load(server: LocalServer, name: str, folder: Path) -> tuple[int, Any]:
    return server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})


def body(adapter: str | None, num_new: int = 12) -> dict[str, Any]:
    params = {"max_new_tokens": num_new, "temperature": 0, "ignore_eos": True}
    return {"input_ids": PROMPT, "sampling_params": params, **({"lora_path": adapter} if adapter else {})}


def same(answer: Any, wanted: Any) -> bool:
    close = torch.allclose(torch.tensor(output_logprobs(answer)), torch.tensor(output_logprobs(wanted)), atol=2e-4)
    return answer["output_ids"] == wanted["output_ids"] and close


def test_each_request_of_a_batch_answers_as_its_merged_model(server, folder, adapters):
    expected = []
    for model in (folder, *(a.parent / "merged" for a in adapters)):
        with LocalServer(served(model)) as merged:
            expected.append(merged.generate_many([body(None)])[0])
    assert len({tuple(answer["output_ids"]) for answer in expected}) == 3
    for i, adapter in enumerate(adapters):
        assert load(server, f"a{i}", adapter)[0] == 200
    names = [None, "a0", "a1"]
    server.step_delay_s = 0.005
    for _ in range(2):  # the second time from the prefix cache, which knows whose keys it holds
        answers = server.generate_many([body(name) for name in [*names, *names[::-1]]])
        for answer, wanted in zip(answers, [*expected, *expected[::-1]], strict=True):
            assert same(answer, wanted)


def test_names_come_and_go(server, adapters):
    assert server.post("/generate", body("a"))[0] == 400
    status, answer = load(server, "a", adapters[0])
    assert status == 200 and answer["success"] and answer["loaded_adapters"] == {"a": str(adapters[0])}
    assert [card["id"] for card in server.get("/v1/models")[1]["data"]] == ["tiny", "a"]
    status, answer = load(server, "a", adapters[1])
    assert status == 400 and answer["success"] is False and "already" in answer["error_message"]
    first = server.generate_many([body("a")])[0]
    assert server.post("/unload_lora_adapter", {"lora_name": "a"})[0] == 200
    assert server.post("/generate", body("a"))[0] == 400
    assert server.post("/unload_lora_adapter", {"lora_name": "a"})[0] == 400
    assert not server.batcher.model.adapters._hooks
    assert load(server, "a", adapters[1])[0] == 200
    assert server.generate_many([body("a")])[0]["output_ids"] != first["output_ids"]


def test_unloading_waits_for_those_who_use_it(server, adapters):
    load(server, "a", adapters[0])
    server.step_delay_s = 0.02
    running = server.pool.submit(server.post, "/generate", body("a", 60))
    wait_until(lambda: server.batcher.in_flight())
    unloading = server.pool.submit(server.post, "/unload_lora_adapter", {"lora_name": "a"})
    wait_until(lambda: not server.batcher.model.adapters.names)
    assert server.post("/generate", body("a"))[0] == 400
    assert running.result(60)[1]["meta_info"]["completion_tokens"] == 60
    assert unloading.result(60)[0] == 200


SETTINGS = [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"lora_alpha": "x"}]
SETTINGS.append({"modules_to_save": ["lm_head"]})
TENSORS = [{"drop": "lora_A"}, {"rename": "model.layers.9"}, {"rename": "model.norm"}, {"grow": True}]


@pytest.mark.parametrize("change", SETTINGS + TENSORS, ids=str)
def test_what_does_not_fit_is_refused(server, adapters, tmp_path, change):
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    settings = json.loads((adapters[0] / "adapter_config.json").read_text())
    name = next(name for name in tensors if "layers.0.self_attn.q_proj.lora_A" in name)
    if "drop" in change:
        del tensors[name]
    elif "rename" in change:
        tensors[name.replace("model.layers.0.self_attn.q_proj", change["rename"])] = tensors.pop(name)
    elif "grow" in change:
        tensors[name] = torch.zeros(4, 65)
    else:
        settings.update(change)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    status, answer = load(server, "a", tmp_path)
    assert status == 400 and answer["error_message"]
    assert load(server, "a", tmp_path / "none")[0] == 400
    assert not server.batcher.model.adapters.names
