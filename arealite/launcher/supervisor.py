"""One start of a run: servers, their health, trainers, and the watch over all of them. Called by local.py."""

from __future__ import annotations

import http.client
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from types import FrameType

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import WaitTimeout
from arealite.launcher import children
from arealite.launcher.children import Child
from arealite.launcher.failures import ADDRESS_IN_USE, RunFailed
from arealite.launcher.plan import HOST, Plan, ProcessPlan
from arealite.launcher.terminal import LogEcho, say
from arealite.observe import waits
from arealite.observe.run_folder import RunFolder
from arealite.observe.watchdog import Watchdog

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TICK_S = 0.1
SETTLE_S = 0.5  # in which the victims of a killed process may show that they were not the first
PROBE_LIMIT_S = 2.0  # of one look at /health


class StopRequested(Exception):
    """The user or the system asked the launcher to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGHUP while it is entered; `first` is the first one's number, 0 for none."""

    def __init__(self) -> None:
        self.first = 0
        self.num_asked = 0
        self._earlier: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, earlier in self._earlier.items():
            signal.signal(number, earlier)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.num_asked += 1
        self.first = self.first or number


def free_ports(count: int) -> list[int]:
    """Different ports that the system says are free now; who binds one must be ready to find it taken."""
    with ExitStack() as open_sockets:
        probes = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def is_healthy(port: int, limit_s: float) -> bool:
    """Whether /health answers 200. Without proxies: the server is on this machine."""
    with closing(http.client.HTTPConnection(HOST, port, timeout=limit_s)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


class Supervisor:
    """Runs a plan once. Who asks a second time by signal to stop is not made to wait for the processes' grace."""

    def __init__(self, plan: Plan, config: GRPOConfig, folder: RunFolder, attempt: int, stop: StopSignals) -> None:
        self.plan = plan
        self.config = config
        self.folder = folder
        self.attempt = attempt
        self.stop = stop
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
        try:
            self.start_servers()
            self.start_trainers()
            while any(c.poll() is None for c in self.trainers):
                self.look()
                time.sleep(TICK_S)
            self.look()
        finally:
            grace_s = self.config.launcher.stop_grace_s
            children.stop(self.all, self.folder, lambda: grace_s if self.stop.num_asked < 2 else 0.0)
            if self.echo is not None:
                self.echo.close()

    @property
    def all(self) -> list[Child]:
        return self.servers + self.trainers

    def start_servers(self) -> None:
        """Start all servers and wait until each answers /health, at most `launcher.startup_timeout_s`.

        Consumes: exit codes, answers of /health. Produces: healthy servers. Waits for: all of them, looking every
        TICK_S. Unblocked by: their answers, any death, a signal, the limit.
        """
        for process, port in zip(self.plan.servers, free_ports(len(self.plan.servers)), strict=True):
            self.servers.append(self._start(process.on_port(port)))
        waiting = deque(self.servers)
        limit_s = self.config.launcher.startup_timeout_s
        probe_s = min(PROBE_LIMIT_S, self.config.watchdog.stall_s / 4)
        with waits.waiting("health at start", "servers", limit_s, lambda: [c.name for c in waiting.copy()]) as wait:
            while waiting:
                # One a tick, so that frozen ones cannot hold up the watchdog.
                asked = waiting.popleft()
                if is_healthy(asked.plan.port, probe_s):
                    self.healthy.add(asked.name)
                else:
                    waiting.append(asked)
                self.look()
                try:
                    wait.check()
                except WaitTimeout as error:
                    late = [c.obituary() for c in waiting]
                    raise RunFailed("\n".join([f"{error}; see launcher.startup_timeout_s", *late])) from None
                time.sleep(TICK_S)

    def start_trainers(self) -> None:
        addresses = ",".join(f"{HOST}:{c.plan.port}" for c in self.servers)
        env = {"AREAL_LLM_SERVER_ADDRS": addresses, "MASTER_PORT": str(free_ports(1)[0])}
        for process in self.plan.trainers:
            self.trainers.append(self._start(process, env))
        self.echo = LogEcho(self.trainers[0].log, self.trainers[0].offset)

    def _start(self, process: ProcessPlan, env: dict[str, str] | None = None) -> Child:
        return children.start(process, self.folder, self.attempt, env or {})

    def look(self) -> None:
        """One tick: copy the log, raise if a process died or stalled or a stop was asked for."""
        if self.echo is not None:
            self.echo.copy()
        if self.stop.first:
            raise StopRequested(self.stop.first)
        if self._dead():
            time.sleep(SETTLE_S)
            raise self._judge(self._dead())
        report = self.watchdog.look({c.name: c.pid for c in self.all if c.poll() is None})
        if report is not None:
            say(report.text)
            raise RunFailed(report.headline, may_restart=self.config.watchdog.action == "restart")

    def _dead(self) -> list[Child]:
        """Children that ended and should not have: trainers with an error, servers before all trainers are done."""
        done = bool(self.trainers) and all(c.poll() == 0 for c in self.trainers)
        failed = [c for c in self.trainers if c.poll() not in (None, 0)]
        return failed + [c for c in self.servers if c.poll() is not None and not done]

    def _judge(self, dead: list[Child]) -> RunFailed:
        """The one that died first: whoever a signal ended, since the others only lost their partner; then servers."""
        codes = {c.name: c.poll() or 0 for c in dead}
        first = min(dead, key=lambda c: (codes[c.name] > 0, c.plan.kind == "trainer"))
        # A signal, a server that had been well, or a port that was free when we looked: bad luck, see failures.py.
        may_restart = codes[first.name] < 0 or first.name in self.healthy or bool(ADDRESS_IN_USE.search(first.output()))
        others = [f"{c.name} ended too (exit code {codes[c.name]})" for c in dead if c is not first]
        echoed = bool(self.trainers) and first is self.trainers[0]  # the terminal has its traceback already
        return RunFailed("\n".join([first.obituary(brief=echoed), *others]), may_restart)
