"""Freeze any one process of a real run: the stall report names it within the limit, and nothing is left behind."""

import os
import signal

import pytest
from runs import Run

STALL_S = 8


@pytest.mark.parametrize("victim", ["trainer-0", "server-0"])
def test_frozen_process_is_named_and_the_run_stops(victim, tmp_path, tiny_llama):
    with Run(tmp_path, tiny_llama, "total_train_steps=1000", f"watchdog.stall_s={STALL_S}") as run:
        run.until(lambda: len(run.metrics()) >= 1, "first step")
        pids = run.pids()
        os.kill(pids[victim], signal.SIGSTOP)
        assert run.wait(90) != 0
        text = run.text()
        assert "frozen" in text or "stopped" in text, text[-3000:]
        assert victim in text and str(pids[victim]) in text
        assert list((run.folder / "stalls").iterdir())
        assert run.pids() == {}


def test_frozen_process_is_killed_and_the_run_recovers(tmp_path, tiny_llama):
    overrides = [f"watchdog.stall_s={STALL_S}", "watchdog.action=restart", "total_train_steps=5"]
    with Run(tmp_path, tiny_llama, *overrides) as run:
        run.until(lambda: len(run.metrics()) >= 1, "first step")
        os.kill(run.pids()["server-0"], signal.SIGSTOP)
        summary = run.succeed()
    assert summary["steps"] == 5 and "server-0" in run.text()


def test_frozen_launcher_is_named_by_the_trainer(tmp_path, tiny_llama):
    with Run(tmp_path, tiny_llama, "total_train_steps=1000", f"watchdog.stall_s={STALL_S}") as run:
        run.until(lambda: len(run.metrics()) >= 1, "first step")
        os.kill(run.process.pid, signal.SIGSTOP)
        log = run.folder / "logs" / "trainer-0.log"
        try:
            run.until(lambda: "launcher" in log.read_text() and str(run.process.pid) in log.read_text(), "name", 60)
        finally:
            os.kill(run.process.pid, signal.SIGCONT)
