"""One start of a run: servers, their health, trainers, and the watch over all of them. Called by local.py."""

from __future__ import annotations

import codecs
import http.client
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import WaitTimeout
from arealite.launcher import children
from arealite.launcher.children import Child
from arealite.launcher.failures import ADDRESS_IN_USE, RunFailed
from arealite.launcher.plan import HOST, Plan, ProcessPlan
from arealite.observe import waits
from arealite.observe.run_folder import RunFolder
from arealite.observe.watchdog import StallReport, Watchdog

TICK_S = 0.1
SETTLE_S = 0.5  # in which the victims of a killed process may show that they were not the first
PROBE_LIMIT_S = 2.0  # of one look at /health
MAX_PORT_TRIES = 3


class StopRequested(Exception):
    """The user or the system asked the launcher to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class LogEcho:
    """Copies what a log gains to the terminal."""

    def __init__(self, path: Path, offset: int) -> None:
        self.path = path
        self.offset = offset
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end inside a character

    def copy(self) -> None:
        with open(self.path, "rb") as log:
            log.seek(self.offset)
            gained = log.read()
        if gained:
            self.offset += len(gained)
            sys.stdout.write(self.decoder.decode(gained))
            sys.stdout.flush()


def free_port() -> int:
    """A port that the system says is free now; who binds it must be ready to find it taken."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def is_healthy(port: int, limit_s: float) -> bool:
    """Whether /health answers 200. Without proxies: the server is on this machine."""
    connection = http.client.HTTPConnection(HOST, port, timeout=limit_s)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Supervisor:
    """Runs a plan once. `requested_stop()` is the signal that asked for the end, or None; `grace_s()` how long the
    processes may take to end."""

    def __init__(
        self,
        plan: Plan,
        config: GRPOConfig,
        folder: RunFolder,
        attempt: int,
        requested_stop: Callable[[], int | None],
        grace_s: Callable[[], float],
    ) -> None:
        self.plan = plan
        self.config = config
        self.folder = folder
        self.attempt = attempt
        self.requested_stop = requested_stop
        self.grace_s = grace_s
        self.servers: list[Child] = []
        self.trainers: list[Child] = []
        self.healthy: set[str] = set()
        self.echo: LogEcho | None = None
        self.watchdog = Watchdog(folder, config.watchdog.heartbeat_s, config.watchdog.stall_s)

    def run(self) -> None:
        """Start everything, return when all trainers are done. Nothing is left running, whatever happens.

        Consumes: exit codes, heartbeats, signals. Produces: logs, the terminal's view of trainer-0. Waits for: the
        end of all trainers, looking every TICK_S. Unblocked by: their exit, any death, a stall, a signal.

        Raises RunFailed or StopRequested.
        """
        self.folder.waits_dir.mkdir(parents=True, exist_ok=True)
        for process in self.plan.processes:  # beats of an earlier start would look alive
            (self.folder.waits_dir / f"{process.name}.json").unlink(missing_ok=True)
        try:
            self.start_servers()
            self.start_trainers()
            while any(c.poll() is None for c in self.trainers):
                self.look()
                time.sleep(TICK_S)
            self.look()
        finally:
            if self.echo is not None:
                self.echo.copy()
            children.stop(self.all, self.folder, self.grace_s)
            if self.echo is not None:
                self.echo.copy()

    @property
    def all(self) -> list[Child]:
        return self.servers + self.trainers

    def start_servers(self) -> None:
        """Start all servers and wait until each answers /health, at most `launcher.startup_timeout_s`."""
        for process in self.plan.servers:
            self.servers.append(self._start(process.on_port(free_port())))
        tries = dict.fromkeys((c.name for c in self.servers), 1)

        def pending() -> list[str]:
            return [f"{c.name} (port {c.plan.port})" for c in self.servers if c.name not in self.healthy]

        limit_s = self.config.launcher.startup_timeout_s
        with waits.waiting("health at start", "servers", limit_s, pending) as wait:
            for turn in itertools.count():
                if not pending():
                    return
                for i, c in enumerate(self.servers):
                    if c.poll() and tries[c.name] < MAX_PORT_TRIES and ADDRESS_IN_USE.search(c.output()):
                        tries[c.name] += 1
                        self.servers[i] = self._start(self.plan.servers[i].on_port(free_port()))
                self._probe(turn)
                self.look()
                try:
                    wait.check()
                except WaitTimeout as error:
                    late = [c.obituary() for c in self.servers if c.name not in self.healthy]
                    raise RunFailed("\n".join([f"{error}; see launcher.startup_timeout_s", *late])) from None
                time.sleep(TICK_S)

    def _probe(self, turn: int) -> None:
        """Ask one server that is not healthy yet; only one, so that frozen ones cannot hold up the watchdog."""
        waiting = [c for c in self.servers if c.name not in self.healthy]
        asked = waiting[turn % len(waiting)]
        limit_s = min(PROBE_LIMIT_S, self.config.watchdog.stall_s / 4)
        if asked.plan.port is not None and is_healthy(asked.plan.port, limit_s):
            self.healthy.add(asked.name)

    def start_trainers(self) -> None:
        addresses = ",".join(f"{HOST}:{c.plan.port}" for c in self.servers)
        env = {"AREAL_LLM_SERVER_ADDRS": addresses, "MASTER_PORT": str(free_port())}
        for process in self.plan.trainers:
            self.trainers.append(self._start(process.with_env(env)))
        self.echo = LogEcho(self.trainers[0].log, self.trainers[0].offset)

    def _start(self, process: ProcessPlan) -> Child:
        return children.start(process, self.folder, self.attempt)

    def look(self) -> None:
        """One tick: copy the log, raise if a process died or stalled or a stop was asked for."""
        if self.echo is not None:
            self.echo.copy()
        number = self.requested_stop()
        if number is not None:
            raise StopRequested(number)
        if self._dead():
            time.sleep(SETTLE_S)
            raise self._judge(self._dead())
        living = {c.name: c.pid for c in self.all if c.poll() is None}
        report = self.watchdog.look(living)
        if report is not None:
            raise self._stalled(report, living)

    def _dead(self) -> list[Child]:
        """Children that ended and should not have: trainers with an error, servers before all trainers are done."""
        done = bool(self.trainers) and all(c.poll() == 0 for c in self.trainers)
        failed = [c for c in self.trainers if c.poll() not in (None, 0)]
        return failed + [c for c in self.servers if c.poll() is not None and not done]

    def _judge(self, dead: list[Child]) -> RunFailed:
        """The one that died first: whoever a signal ended, since the others only lost their partner; then servers."""

        def rank(c: Child) -> tuple[bool, bool]:
            returncode = c.poll()
            return returncode is not None and returncode > 0, c.plan.kind == "trainer"

        first = min(dead, key=rank)
        returncode = first.poll()
        by_signal = returncode is not None and returncode < 0
        may_restart = by_signal or first.name in self.healthy
        others = [f"{c.name} ended too (exit code {c.poll()})" for c in dead if c is not first]
        echoed = bool(self.trainers) and first is self.trainers[0]  # the terminal has its traceback already
        return RunFailed("\n".join([first.obituary(brief=echoed), *others]), may_restart)

    def _stalled(self, report: StallReport, living: dict[str, int]) -> RunFailed:
        print(f"{report.text}(kept in {report.path})", file=sys.stderr, flush=True)
        restart = self.config.watchdog.action == "restart"
        if restart:
            for name in report.culprits:
                if name in living:
                    os.kill(living[name], signal.SIGKILL)
        return RunFailed(report.headline, may_restart=restart)
