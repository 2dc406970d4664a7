"""Freeze any one process of a real run: the stall report names it within the limit, and nothing is left behind."""

import os
import re
import signal

from support.runs import Run

STALL_S = 8


def test_whatever_is_frozen_is_named(tmp_path, tiny_llama):
    """A frozen server is replaced while the trainer goes on; the trainer names a frozen launcher; a frozen trainer ends
    the run."""
    with Run(tmp_path, tiny_llama, "total_train_steps=1000", f"watchdog.stall_s={STALL_S}") as run:
        run.until(lambda: len(run.metrics()) >= 1, "first step")
        server = run.pids()["server-0"]
        os.kill(server, signal.SIGSTOP)
        run.until(lambda: "server-0 alone: restart 1" in run.text(), "restart")
        assert f"server-0 (pid {server})" in run.text() and list((run.folder / "stalls").iterdir())
        before = len(run.steps())
        run.until(lambda: len(run.steps()) >= before + 3, "steps with the new server")
        assert "the run stopped" not in run.text()

        os.kill(run.process.pid, signal.SIGSTOP)
        log = run.folder / "logs" / "trainer-0.log"
        try:
            run.until(lambda: f"launcher (pid {run.process.pid})" in log.read_text(), "name", 60)
        finally:
            os.kill(run.process.pid, signal.SIGCONT)

        trainer = run.pids()["trainer-0"]
        os.kill(trainer, signal.SIGSTOP)
        assert run.wait(90) != 0
        text = " ".join(run.text().split())
        told = re.search(rf"trainer-0 \(pid {trainer}\) has been silent for (\d+) s: it is frozen \(state T", text)
        assert told and int(told[1]) < 3 * STALL_S, text[-3000:]
        assert run.pids() == {}
