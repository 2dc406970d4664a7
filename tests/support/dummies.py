"""Small real processes for the launcher's tests: servers, trainers, a launcher to be killed. Used by test_launcher_*.

python support/dummies.py server HOST PORT BEHAVIOUR
python support/dummies.py trainer FOLDER BEHAVIOUR
python support/dummies.py launch FOLDER '{"trainers": [...], "servers": [...], "overrides": {...}}'
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from arealite.api.errors import ConfigError
from arealite.observe import waits
from arealite.observe.processes import Heartbeat
from arealite.observe.run_folder import RunFolder

if TYPE_CHECKING:  # servers and trainers are to start in a blink
    from arealite.api.cli_args import GRPOConfig
    from arealite.launcher.plan import Plan

LIMIT_S = 60.0


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def server(host: str, port: int, behaviour: str) -> None:
    if behaviour == "die":
        raise RuntimeError("no such model")
    if behaviour == "silent":
        time.sleep(LIMIT_S)
    if behaviour == "port_taken":
        lose_port_once()
    if behaviour == "worker":  # as vLLM, whose engine is a process of its own
        command = [sys.executable, "-c", f"import time; time.sleep({LIMIT_S})"]
        name = f"worker-{os.getpid()}"
        (Path(os.environ["AREALITE_RUN_DIR"]) / name).write_text(str(subprocess.Popen(command).pid))
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    waits.configure_from_env()
    http.server.ThreadingHTTPServer((host, port), Health).serve_forever()


def lose_port_once() -> None:
    if not (marker := Path(os.environ["AREALITE_RUN_DIR"]) / "taken").exists():
        marker.touch()
        raise OSError(98, "Address already in use")


def trainer(folder: Path, behaviour: str) -> None:
    waits.configure_from_env()
    print(f"hello from {behaviour}", flush=True)
    if behaviour == "raise":
        raise ValueError("first real error")
    if behaviour == "refuse":
        raise ConfigError("batch_size is 3\nexpected a multiple of 2")
    if behaviour == "orphan":
        command = [sys.executable, "-c", f"import time; time.sleep({LIMIT_S})"]
        (folder / "orphan").write_text(str(subprocess.Popen(command, start_new_session=True).pid))
    if behaviour == "environment":
        (folder / f"{os.environ['AREALITE_PROCESS']}.env").write_text(
            json.dumps({**os.environ, "cores": sorted(os.sched_getaffinity(0)), "argv": sys.argv})
        )
    if behaviour == "port_taken":
        lose_port_once()
    if behaviour in ("step", "port_taken"):
        for number in range(2):
            waits.mark("step")
            print(f"step {number}", flush=True)
    if behaviour == "follow":  # fails as soon as its server is gone
        host, port = os.environ["AREAL_LLM_SERVER_ADDRS"].split(":")
        while True:
            socket.create_connection((host, int(port))).close()
            time.sleep(0.01)
    if behaviour == "chatter":
        while not (folder / "quiet").exists():
            print("a thousand words " * 60, flush=True)
            time.sleep(0.001)
        (folder / "is_quiet").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)
        print("it goes on", flush=True)
    if behaviour in ("wait", "fail later"):
        with waits.waiting("groups of step 3", "server-0", LIMIT_S, ["e0-r17 on server-0"]) as wait:
            while not (folder / "go").exists():
                time.sleep(0.02)
                wait.check()
        if behaviour == "fail later":
            raise ValueError("an error of its own")


def config_with(overrides: dict[str, object]) -> GRPOConfig:
    from arealite.api.cli_args import GRPOConfig

    config = GRPOConfig()
    config.launcher.stop_grace_s = 3.0
    config.launcher.startup_timeout_s = 20.0
    config.watchdog.heartbeat_s = 0.1
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        setattr(vars(config)[section] if section else config, name, value)
    return config


def plan_of(folder: Path, trainers: list[str], servers: list[str], num_nodes: int = 1) -> Plan:
    """Behaviours, with "@1" at their end for those on node 1, or the last one where there are fewer."""
    from arealite.launcher.plan import HOST, PORT, Plan, ProcessPlan

    me = str(Path(__file__).resolve())
    env = {"AREALITE_HEARTBEAT_S": "0.1", "AREALITE_STALL_S": "2"}
    processes = []
    for i, (behaviour, _, node) in enumerate(told.partition("@") for told in servers):
        command = (sys.executable, me, "server", HOST, PORT, behaviour)
        own = ProcessPlan("server", i, command, env, ready_path="/", restart="alone")
        processes.append(replace(own, node=min(int(node or 0), num_nodes - 1)))
    for i, (behaviour, _, node) in enumerate(told.partition("@") for told in trainers):
        own = ProcessPlan("trainer", i, (sys.executable, me, "trainer", str(folder), behaviour), env)
        processes.append(replace(own, node=min(int(node or 0), num_nodes - 1)))
    return Plan("native:d1+fsdp:d1", tuple(processes), num_nodes=num_nodes)


class Launched:
    """A launcher in a process of its own; the context manager ends whatever is left of it."""

    limit_s = LIMIT_S

    def __init__(
        self, folder: Path, trainers: list[str], servers: list[str], stdout=None, env=None, **overrides: object
    ) -> None:
        self.folder = RunFolder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder.parent / f"{folder.name}.launcher.log"
        wanted = json.dumps({"trainers": trainers, "servers": servers, "overrides": overrides})
        me = str(Path(__file__).resolve())
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, me, "launch", str(folder), wanted],
                stdout=log if stdout is None else stdout,
                stderr=log,
                env={**os.environ, **(env or {})},
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)

    def text(self) -> str:
        return self.log.read_text()

    def until(self, condition, what: str) -> None:
        end = time.monotonic() + self.limit_s
        while not condition():
            assert time.monotonic() < end, f"no {what}; log:\n{self.text()}"
            time.sleep(0.02)

    def pid(self, name: str, old: tuple[int, ...] = ()) -> int:
        """The process of this name, once it beats and is none of the `old` ones."""
        path = self.folder.waits_dir / f"{name}.json"

        def newest() -> int:
            beat = Heartbeat.read(path)
            return 0 if beat is None or beat.pid in old else beat.pid

        self.until(newest, f"heartbeat of {name}")
        return newest()

    def pids(self, *names: str, old: tuple[int, ...] = ()) -> list[int]:
        return [self.pid(name, old) for name in names]

    def wait(self) -> int:
        return self.process.wait(self.limit_s)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main(argv: list[str]) -> int:
    if argv[0] == "server":
        server(argv[1], int(argv[2]), argv[3])
    elif argv[0] == "trainer":
        trainer(Path(argv[1]), argv[2])
    else:
        from arealite.launcher.local import launch

        wanted = json.loads(argv[2])
        folder, processes = Path(argv[1]), (wanted["trainers"], wanted["servers"])
        plan = lambda machines: plan_of(folder, *processes, num_nodes=len(machines))  # noqa: E731
        return launch(plan, config_with(wanted["overrides"]), RunFolder(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
