"""`arealite run` without servers, supervised fine-tuning and a reward model; and PPO whose critic has its layout."""

import json
import os
import signal

import torch
from safetensors.torch import load_file
from support.runs import TINY, Run

SMALL = ("model.path={model}", "model.dtype=float32", "model.optimizer.lr=1e-3", "launcher.stop_grace_s=5")
SMALL += ("launcher.pin_cores=false",)  # other tests run beside


class SFTRun(Run):
    example, name = "gsm8k_sft", "gsm8k/sft"
    tiny = (*SMALL, "total_train_steps=8", "recover.freq_steps=1", "saver.freq_steps=8", "valid_dataset.num_rows=8")


class RWRun(Run):
    example, name, tiny = "hhrlhf_rw", "hhrlhf/rw", (*SMALL, "allocation_mode=d2")


class PPORun(Run):
    tiny = (*TINY, "actor.path={model}", "critic.path={model}", "critic.dtype=float32", "critic.optimizer.lr=1e-3")


def losses(run) -> list[float]:
    return [line["loss"] for line in run.metrics() if "loss" in line]


def test_supervised_run_learns_and_goes_on_after_a_kill(tmp_path, tiny_llama):
    final = {}
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
        with SFTRun(tmp_path / name, tiny_llama) as run:
            if name == "resumed":
                run.until(lambda: len(run.metrics()) >= 3, "three steps")
                os.kill(run.pids()["trainer-0"], signal.SIGKILL)
            summary = run.succeed()
        assert summary["steps"] == 8 and summary["num_restarts"] == (name == "resumed")
        assert summary["loss_last"] < summary["loss_first"] - 0.3
        assert summary["eval_loss_last"] < summary["eval_loss_first"] - 0.3 and summary["tokens_per_s"] > 0
        assert "held-out loss" in run.text() and run.pids() == {}
        assert not (run.folder / "servers").exists()
        final[name] = load_file(run.folder / "checkpoints/step_000008/model.safetensors")
    for key, tensor in final["straight"].items():
        assert torch.equal(tensor, final["resumed"][key]), key


def test_reward_model_learns_to_rank(tmp_path, tiny_llama):
    with RWRun(tmp_path, tiny_llama) as run:
        summary = run.succeed()
    assert summary["accuracy_last"] >= 0.75 and summary["eval_accuracy_last"] > summary["eval_accuracy_first"]
    assert summary["loss_last"] < 0.6 < summary["loss_first"]
    config = json.loads((run.folder / "checkpoints/step_000014/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_ppo_with_a_critic_in_its_own_layout(tmp_path, tiny_llama):
    wide = ("allocation_mode=native:d1+fsdp:d2|fsdp[critic]:t2", "total_train_steps=3", "actor.gae_lambda=0.95")
    with PPORun(tmp_path, tiny_llama, *wide, "weight_update=disk") as run:
        run.until(lambda: len(run.metrics()) >= 1, "a step")
        os.kill(run.pids()["trainer-1"], signal.SIGKILL)
        run.check_records(run.succeed(), num_steps=3)
    steps = [line for line in run.metrics() if "critic_loss" in line]
    assert all(line["critic_skipped"] == 0 for line in steps) and len(steps) >= 3
    assert {path.name for path in (run.folder / "checkpoints/step_000003/critic").iterdir()} >= {"model.safetensors"}
    assert (run.folder / "recover/point_000003/actor/critic/counters.json").exists()
