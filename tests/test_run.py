"""`Run`, the frame of every training loop: what it does around steps, and that everything ends with it."""

import json
from pathlib import Path

import pytest
import torch
from support.ranks import Alone
from support.runs import TINY
from support.runs import Run as Started
from transformers import AutoModelForCausalLM

from arealite.api.cli_args import DatasetConfig, SFTConfig
from arealite.api.run_args import EvaluatorConfig, RecoverConfig, SaverConfig
from arealite.api.types import Task
from arealite.dataset.loader import StatefulDataLoader
from arealite.observe.run_folder import RunFolder
from arealite.run import Run


class Model:
    """Counts its steps; `fails` names the call that raises."""

    def __init__(self, calls: list[str], name: str = "model", fails: str = "") -> None:
        self.calls, self.name, self.fails, self.num_steps = calls, name, fails, 0
        self.collective = self.background = Alone()

    def note(self, call: str) -> None:
        self.calls.append(f"{self.name}.{call}")
        if call == self.fails:
            raise ZeroDivisionError(call)

    def initialize(self) -> None:
        self.note("initialize")

    def destroy(self) -> None:
        self.note("destroy")

    def plan_steps(self, num_steps: int) -> None:
        self.planned = num_steps

    def save(self, path: str, tokenizer: object = None) -> None:
        Path(path).mkdir(parents=True)

    def stage_state(self, path: str):
        return lambda: Path(path, "steps").write_text(str(self.num_steps))

    def load_state(self, path: str) -> None:
        self.num_steps = int(Path(path, "steps").read_text())


@pytest.fixture
def config(tmp_path, smollm2):
    config = SFTConfig(kind="sft", total_train_steps=9, train_dataset=DatasetConfig(batch_size=1))
    config.model.path, config.cluster.fileroot = smollm2, str(tmp_path)
    config.recover = RecoverConfig(freq_steps=1)
    config.evaluator, config.saver = EvaluatorConfig(freq_steps=4), SaverConfig(freq_steps=3)
    config.stats_logger.tensorboard = False
    return config


def train(config: SFTConfig, calls: list[str], until: int | None = None, **model) -> list[int]:
    """The steps that were made; one after `until` fails in its midst."""
    made, asked = [], []
    with Run(config) as run:
        engine = run.open(Model(calls, **model))
        run.begin(engine, StatefulDataLoader([Task(f"r{i}", prompt="?") for i in range(9)], config))

        def evaluate(step: int) -> dict[str, float]:
            asked.append(step)
            return {"loss": float(step)}

        for step in run.steps(evaluate):
            made.append(step)
            if step == until:
                raise ZeroDivisionError("in the midst of a step")
            engine.num_steps += 1
            run.stats.scalar("loss", 1.0)
    calls.append(f"asked after {asked}")
    return made


def metrics(config: SFTConfig) -> list[dict]:
    path = next(Path(config.cluster.fileroot).rglob("metrics.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("evaluator", "asked"),
    [
        (EvaluatorConfig(freq_steps=4), [0, 4, 8, 9]),
        (EvaluatorConfig(freq_steps=4, at_start=False, at_end=False), [4, 8]),
        (EvaluatorConfig(at_start=False, at_end=False), []),
    ],
)
def test_what_happens_around_steps(config, evaluator, asked):
    config.evaluator, calls = evaluator, []
    assert train(config, calls) == list(range(9))
    assert calls == ["model.initialize", "model.destroy", f"asked after {asked}"]
    lines = [line for line in metrics(config) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(9)) and all(line["step_s"] >= 0 for line in lines)
    assert [line["step"] + 1 for line in lines if "eval_loss" in line] == [step for step in asked if step]
    folder = next(Path(config.cluster.fileroot).rglob("metrics.jsonl")).parent
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step_{n:06d}" for n in (3, 6, 9)]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 9


def test_a_failure_in_a_step_closes_all_and_the_run_goes_on_from_the_step_before(config):
    calls: list[str] = []
    with pytest.raises(ZeroDivisionError):
        train(config, calls, until=5)
    assert calls[-1] == "model.destroy"
    assert not list(Path(config.cluster.fileroot).rglob("summary.json"))
    owed = RunFolder.of(config).owed_evaluation(5)  # what an evaluation of these weights leaves when it is cut short
    owed.parent.mkdir()
    owed.touch()
    assert train(config, calls) == list(range(5, 9)) and calls[-1] == "asked after [5, 8, 9]"
    assert [line["step"] for line in metrics(config) if "loss" in line] == list(range(9))


def test_what_was_opened_is_closed_last_first_although_one_fails(config):
    calls: list[str] = []
    with pytest.raises(ZeroDivisionError, match="initialize"), Run(config) as run:
        run.open(Model(calls, "first", fails="destroy"))
        run.open(Model(calls, "second"))
        run.open(Model(calls, "third", fails="initialize"))
    assert calls[3:] == ["third.destroy", "second.destroy", "first.destroy"]


class Spelled(Started):
    example, name = "gsm8k_grpo", "gsm8k/grpo"
    tiny = tuple(word for word in TINY if not word.startswith("valid_dataset"))
    tiny += ("actor.path={model}", "valid_dataset=null", "total_train_steps=2", "allocation_mode=native:d1+fsdp:d1")
    tiny += ("evaluator.freq_steps=null", "actor.kl_weight=0.1", "ref.dtype=float32", "server.context_length=512")
    tiny += ("critic.path={model}", "critic.dtype=float32", "critic.optimizer.lr=1e-3")


def test_the_spelled_out_loop_has_reference_and_critic(tmp_path, tiny_llama):
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with Spelled(tmp_path, tiny_llama, f"ref.path={tmp_path / 'other'}") as run:
        summary = run.succeed()
    steps = [line for line in run.metrics() if "step_s" in line]
    assert summary["steps"] == len(steps) == 2 and run.pids() == {}
    assert all(line["critic_skipped"] == 0 and "critic_explained_variance" in line for line in steps)
    assert all(line["kl"] > 0.01 for line in steps)  # of another model than the policy
