"""Real runs for tests: `arealite run` on a tiny model, in its own process group, ended by id. Used by test_run_*.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from arealite.observe.processes import Heartbeat
from arealite.observe.records import read_evaluations, read_metrics
from arealite.observe.run_folder import RunFolder
from arealite.rollout.ledger import audit

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0

TINY = [
    "total_train_steps=4",
    "train_dataset.batch_size=4",
    "gconfig.n_samples=4",
    "gconfig.max_new_tokens=8",
    "eval_gconfig.max_new_tokens=8",
    "valid_dataset.num_rows=4",
    "server.dtype=float32",
    "server.max_running_requests=16",
    "server.context_length=128",
    "actor.dtype=float32",
    "actor.optimizer.lr=1e-3",
    "saver.freq_steps=2",
    "recover.freq_steps=1",
    "evaluator.freq_steps=2",
    "stats_logger.probe_every_steps=2",
    "watchdog.stall_s=60",
    "launcher.stop_grace_s=5",
    "launcher.pin_cores=false",  # other tests run beside
]


def save_tiny_model(smollm2: str, folder: Path) -> str:
    """The model of fixture `tiny_llama`, with the tokenizer of SmolLM2 in folder `smollm2`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.1, tie_word_embeddings=True, **special
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Run:
    """One `arealite run` of an example, the quickstart if not said, under `root`; the context manager ends whatever is
    left of it."""

    example, name, tiny = "quickstart", "quickstart/addition", (*TINY, "actor.path={model}")

    def __init__(self, root: Path, model: Path, *overrides: str) -> None:
        self.folder = root / self.name
        self.log = root / "launcher.log"
        root.mkdir(exist_ok=True)
        path = f"examples/arealite/{self.example}"
        self.command = [
            sys.executable, "-m", "arealite.cli", "run", f"{path}.py", "--config", f"{path}.yaml",
            f"cluster.fileroot={root}", *(word.replace("{model}", str(model)) for word in self.tiny), *overrides,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Run:
        return self.start()

    def start(self) -> Run:
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        return self

    def wait(self, limit_s: float = LIMIT_S) -> int:
        assert self.process is not None
        return self.process.wait(timeout=limit_s)

    def succeed(self, limit_s: float = LIMIT_S) -> dict:
        """Wait for exit code 0; returns summary.json."""
        code = self.wait(limit_s)
        assert code == 0, f"exit code {code}; log:\n{self.text()[-4000:]}"
        return json.loads((self.folder / "summary.json").read_text())

    def check_records(self, summary: dict, num_steps: int, staleness_max: int = 1) -> None:
        """What a run of `num_steps` steps that has ended leaves behind; four tasks a step, four answers each."""
        assert summary["steps"] == num_steps and summary["staleness_max"] <= staleness_max
        assert summary["mismatch_mean"] < 1e-4
        assert {"accuracy_before", "accuracy_after", "train_s", "tokens_per_s"} <= summary.keys()
        assert [line["step"] for line in self.steps()] == list(range(num_steps))
        self.check_evaluations()
        rollouts = sorted((self.folder / "rollouts").glob("step_*.jsonl"))
        assert len(rollouts) == num_steps
        rows = [json.loads(line) for line in rollouts[0].read_text().splitlines()]
        assert len(rows) == 16 and {"prompt", "completion", "reward", "versions", "finish_reason"} <= rows[0].keys()
        assert (self.folder / "reward.png").stat().st_size > 1000 and (self.folder / "config.yaml").exists()
        assert list((self.folder / "tensorboard").iterdir()) and list((self.folder / "checkpoints").iterdir())
        assert self.pids() == {}
        report = audit(self.folder / "ledger.jsonl")
        assert not report.violations
        assert sum(state == "trained" for state in report.states.values()) == num_steps * 4

    def check_evaluations(self) -> None:
        """Each was made beside the steps, by the weights of its step alone, and its interval is in the metrics."""
        results = {e["step"]: e for e in read_evaluations(RunFolder(self.folder))}
        assert results and not list((self.folder / "evaluation").glob("*.owed"))
        assert {step: e["versions"] for step, e in results.items()} == {step: [step] for step in results}
        told = {line["eval_step"]: line for line in self.steps() if "eval_step" in line}
        assert told.keys() <= results.keys() and max(results) in told
        for step, line in told.items():
            names = {"eval_accuracy": "accuracy", "eval_accuracy_low": "low", "eval_accuracy_high": "high"}
            assert {name: line[name] for name in names} == {name: results[step][of] for name, of in names.items()}

    def steps(self) -> list[dict]:
        """What is known of each finished step that was not done again."""
        return read_metrics(self.folder / "metrics.jsonl")

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def metrics(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def pids(self) -> dict[str, int]:
        """Living processes of the run by name, as they report themselves."""
        beats = map(Heartbeat.read, (self.folder / "waits").glob("*.json"))
        return {beat.process: beat.pid for beat in beats if beat is not None and psutil.pid_exists(beat.pid)}

    def until(self, condition, what: str, limit_s: float = LIMIT_S) -> None:
        """Poll `condition()` while the launcher lives."""
        assert self.process is not None
        end = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, f"run ended before {what}; log:\n{self.text()[-4000:]}"
            assert time.monotonic() < end, f"no {what} within {limit_s} s; log:\n{self.text()[-4000:]}"
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(timeout=30)
