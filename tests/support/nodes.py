"""A run over several nodes on this machine: agents as processes of their own, each node with a loopback address of its
own. Used by test_launcher_nodes.py and test_run_nodes.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAD_ENV = {"AREALITE_ADDRESS": "127.0.0.2"}


class Agent:
    """The agent of one slot; the context manager ends it."""

    def __init__(self, folder: Path, slot: int, *options: str, under: Sequence[str] = (), **env: str) -> None:
        self.log = folder.parent / f"{folder.name}.agent-{slot}.log"
        agent = [sys.executable, "-m", "arealite.launcher.agent", "--run-folder", str(folder), *options]
        self.command = [*under, *agent]
        self.env = {**os.environ, "AREALITE_ADDRESS": f"127.0.0.{slot + 2}", "AREALITE_SLOT": str(slot), **env}
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.env, stdout=log, stderr=log)

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(30)

    def text(self) -> str:
        return self.log.read_text()
