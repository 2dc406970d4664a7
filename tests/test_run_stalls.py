"""Freeze any one process of a real run: the stall report names it within the limit, and nothing is left behind."""

import os
import re
import signal

from support.runs import Run

STALL_S = 8


def silence_s(name: str, pid: int, run: Run) -> int:
    """After how long the stall report named the frozen process; other lines name it too."""
    text = " ".join(run.text().split())
    named = re.search(rf"STALL: {name} \(pid {pid}\) has been silent for (\d+) s: it is frozen \(state T", text)
    assert named, text[-3000:]
    return int(named[1])


def test_whatever_is_frozen_is_named(tmp_path, tiny_llama):
    """A frozen server is replaced while the trainer goes on; the trainer names a frozen launcher; a frozen trainer ends
    the run."""
    with Run(tmp_path, tiny_llama, "total_train_steps=1000", f"watchdog.stall_s={STALL_S}") as run:
        run.until(lambda: len(run.metrics()) >= 1, "first step")
        server = run.pids()["server-0"]
        os.kill(server, signal.SIGSTOP)
        run.until(lambda: "server-0 alone: restart 1" in run.text(), "restart")
        assert silence_s("server-0", server, run) < 3 * STALL_S
        assert list((run.folder / "stalls").glob("stall_*_server-0.txt"))
        before = len(run.steps())
        run.until(lambda: len(run.steps()) >= before + 3, "steps with the new server")
        assert "the run stopped" not in run.text()

        os.kill(run.process.pid, signal.SIGSTOP)
        log = run.folder / "logs" / "attempt_1" / "trainer-0.log"
        try:
            line = f"STALL: the launcher (pid {run.process.pid}) has been silent"
            run.until(lambda: line in log.read_text(), "name", 60)
        finally:
            os.kill(run.process.pid, signal.SIGCONT)

        trainer = run.pids()["trainer-0"]
        os.kill(trainer, signal.SIGSTOP)
        assert run.wait(90) != 0
        assert silence_s("trainer-0", trainer, run) < 3 * STALL_S
        assert run.pids() == {}
