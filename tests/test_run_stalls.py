"""Freeze any one process of a real run: the stall report names it within the limit, and nothing is left behind."""

import os
import re
import signal

from runs import Run

STALL_S = 8


def test_frozen_trainer_is_named_and_the_run_stops(tmp_path, tiny_llama):
    victim = "trainer-0"
    with Run(tmp_path, tiny_llama, "total_train_steps=1000", f"watchdog.stall_s={STALL_S}") as run:
        run.until(lambda: len(run.metrics()) >= 1, "first step")
        pids = run.pids()
        os.kill(pids[victim], signal.SIGSTOP)
        assert run.wait(90) != 0
        text = " ".join(run.text().split())
        told = re.search(rf"{victim} \(pid {pids[victim]}\) has been silent for (\d+) s: it is frozen \(state T", text)
        assert told and int(told[1]) < 3 * STALL_S, text[-3000:]
        assert list((run.folder / "stalls").iterdir())
        assert run.pids() == {}


def test_frozen_server_is_named_and_replaced_while_the_trainer_goes_on(tmp_path, tiny_llama):
    overrides = [f"watchdog.stall_s={STALL_S}", "total_train_steps=5"]
    with Run(tmp_path, tiny_llama, *overrides) as run:
        run.until(lambda: len(run.metrics()) >= 1, "first step")
        pids = run.pids()
        os.kill(pids["server-0"], signal.SIGSTOP)
        summary = run.succeed()
    assert summary["steps"] == 5
    assert f"server-0 (pid {pids['server-0']})" in run.text() and list((run.folder / "stalls").iterdir())
    assert "server-0 alone: restart 1" in run.text() and "the run stopped" not in run.text()


def test_frozen_launcher_is_named_by_the_trainer(tmp_path, tiny_llama):
    with Run(tmp_path, tiny_llama, "total_train_steps=1000", f"watchdog.stall_s={STALL_S}") as run:
        run.until(lambda: len(run.metrics()) >= 1, "first step")
        os.kill(run.process.pid, signal.SIGSTOP)
        log = run.folder / "logs" / "trainer-0.log"
        try:
            run.until(lambda: f"launcher (pid {run.process.pid})" in log.read_text(), "name", 60)
        finally:
            os.kill(run.process.pid, signal.SIGCONT)
