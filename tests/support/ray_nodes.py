"""A real Ray cluster on this machine: raylets on loopback addresses of their own, ended by id; and a driver. Used by
test_launcher_ray.py.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as the driver it is a program

from arealite.observe.run_folder import RunFolder
from support.dummies import Launched, config_with

START_LIMIT_S = 90.0
START_ATTEMPTS = 3  # Ray gives up by itself where a busy machine takes 30 s for what it awaits
END_LIMIT_S = 20.0
OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes, about
FLAGS = (
    "--block", "--disable-usage-stats", f"--object-store-memory={OBJECT_STORE_BYTES}",
    "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0",
)  # fmt: skip


class RayNodes:
    """`ray start` on 127.0.0.2, .3, ...: each a node to Ray, with `resources` (CPU, GPU: as many as are said, real or
    not). What they start ends with them; `ray stop` would end every other cluster of this machine too."""

    def __init__(self, num_nodes: int = 2, num_cpus: int = 2, num_gpus: int = 0) -> None:
        self.num_nodes = num_nodes
        self._flags = (*FLAGS, f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}")
        self._folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: names of Unix sockets have a limit
        self._starts: dict[int, subprocess.Popen[bytes]] = {}
        self._seen: dict[int, psutil.Process] = {}
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }

    @property
    def address(self) -> str:
        return self.env["RAY_ADDRESS"]

    @staticmethod
    def node_address(index: int) -> str:
        return f"127.0.0.{index + 2}"

    def __enter__(self) -> RayNodes:
        try:
            for index in range(self.num_nodes):
                self.start(index)
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self, index: int) -> None:
        """Start node `index`; 0 is Ray's head, on a port of its own choice. Returns when it has joined."""
        if index in self._starts:
            self._starts[index].wait(END_LIMIT_S)
        for _ in range(START_ATTEMPTS):
            if has_started(said := self._try_to_start(index)):
                break
        else:
            raise AssertionError(f"ray start of node {index} says: {said[-3000:]}")
        if index == 0:
            self.env["RAY_ADDRESS"] = re.search(r"--address='([^']+)'", said)[1]

    def _try_to_start(self, index: int) -> str:
        """What `ray start` says until it has started; where it does not, nothing of it is left."""
        head = ["--head", "--port=0", "--include-dashboard=false"]
        words = [*head, f"--temp-dir={self._folder}"] if index == 0 else [f"--address={self.address}"]
        log = self._folder / f"node{index}.log"
        ray = Path(sys.executable).with_name("ray")
        command = [str(ray), "start", *words, f"--node-ip-address={self.node_address(index)}", *self._flags]
        with open(log, "wb") as out:
            process = subprocess.Popen(
                command, env={**os.environ, **self.env}, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self._starts[index] = process
        end, others = time.monotonic() + START_LIMIT_S, list(self._seen)
        while not has_started(said := log.read_text()):
            self._of(index)
            if process.poll() is not None or time.monotonic() > end:
                self._end([p for pid, p in self._seen.items() if pid not in others])
                break
            time.sleep(0.2)
        return said

    def raylet(self, index: int) -> psutil.Process:
        """The raylet of a node."""
        return next(p for p in self._of(index) if p.name() == "raylet")

    def kill(self, index: int) -> None:
        """SIGKILL to the raylet of a node, as if the node were gone; `ray start` then ends what is left of it."""
        self.raylet(index).kill()
        self._starts[index].wait(END_LIMIT_S)

    def is_alive(self, index: int) -> bool:
        return self._starts[index].poll() is None

    def _of(self, index: int) -> list[psutil.Process]:
        """All processes of a node, noted for the end."""
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._starts[index].pid)
            found = [parent, *parent.children(recursive=True)]
        self._seen |= {p.pid: p for p in found}
        return found

    def __exit__(self, *_: object) -> None:
        for index, process in self._starts.items():
            self._of(index)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._starts.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_LIMIT_S)
        self._end(list(self._seen.values()))
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _end(processes: list[psutil.Process]) -> None:
        left = [p for p in processes if p.is_running()]  # compares the times of their starts, too
        for p in left:
            with suppress(psutil.NoSuchProcess):
                p.kill()
        psutil.wait_procs(left, END_LIMIT_S)


def has_started(said: str) -> bool:
    return "Ray runtime started" in said


class OnRay(Launched):
    """The launcher of the dummies on nodes of Ray, under a driver that is a process of its own."""

    limit_s = 3 * Launched.limit_s  # Ray starts interpreters of its own before ours

    def __init__(self, folder: Path, trainers: list[str], servers: list[str], env: dict, **overrides: object) -> None:
        self.folder = RunFolder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder.parent / f"{folder.name}.driver.log"
        overrides = {"cluster.num_nodes": 2, "launcher.node_silence_s": 10.0, **overrides}
        wanted = json.dumps({"trainers": trainers, "servers": servers, "overrides": overrides})
        command = [sys.executable, str(Path(__file__).resolve()), str(folder), wanted]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **env})


def main(folder: str, wanted: str) -> int:
    """The driver."""
    from arealite.launcher.local import stop_signals
    from arealite.launcher.ray_cluster import run_on_ray

    words = [str(Path(__file__).with_name("dummies.py").resolve()), "launch", folder, wanted]
    with stop_signals() as stops:
        return run_on_ray(config_with(json.loads(wanted)["overrides"]), RunFolder(Path(folder)), words, stops)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
