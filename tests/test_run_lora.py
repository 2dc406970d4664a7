"""`arealite run` with LoRA on context-parallel ranks: what reaches the real server is the adapter alone."""

import json

import peft
import torch
from safetensors.torch import load_file
from support.runs import Run
from transformers import AutoModelForCausalLM


def test_a_run_with_lora_trains_and_serves_the_adapter(tmp_path, tiny_llama):
    # A random model earns no reward: entropy is what moves it.
    lora = ["actor.lora.rank=8", "actor.lora.alpha=24", "actor.entropy_weight=0.1"]
    lora += ["total_train_steps=3", "saver.freq_steps=3", "gconfig.min_new_tokens=2"]
    with Run(tmp_path, tiny_llama, *lora, "allocation_mode=native:d1+fsdp:c2") as run:
        run.check_records(run.succeed(), num_steps=3)
    (checkpoint,) = (run.folder / "checkpoints").iterdir()
    names = {file.name for file in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not list(checkpoint.glob("model*"))
    served = sorted((run.folder / "weights").glob("v*"))
    assert [folder.name for folder in served] == ["v00000002", "v00000003"]
    tensors, sent = (load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, served[-1]))
    assert all(torch.equal(tensors[name], sent[name]) for name in tensors)  # float32 both
    assert any(bool(t.any()) for name, t in tensors.items() if "lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    peft.PeftModel.from_pretrained(base, checkpoint)
    versions = set()
    for path in (run.folder / "rollouts").glob("step_*.jsonl"):
        for line in path.read_text().splitlines():
            versions |= {version for version, *_ in json.loads(line)["versions"]}
    assert {0, 1} <= versions
