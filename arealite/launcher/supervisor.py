"""One start of a run: servers, their health, trainers, and the watch over all of them. Called by local.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from arealite.api.cli_args import RunConfig
from arealite.api.errors import WaitTimeout
from arealite.launcher import children
from arealite.launcher.children import Child
from arealite.launcher.failures import RunFailed
from arealite.launcher.keeper import Keeper, free_ports
from arealite.launcher.plan import Plan, ProcessPlan
from arealite.launcher.terminal import LogEcho, say
from arealite.observe import waits
from arealite.observe.run_folder import RunFolder
from arealite.observe.watchdog import Watchdog

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TICK_S = 0.1
SETTLE_S = 0.5  # in which the victims of a killed process may show that they were not the first


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


class Supervisor:
    """Runs a plan once. Who asks a second time by signal to stop is not made to wait for the processes' grace."""

    def __init__(self, plan: Plan, config: RunConfig, folder: RunFolder, attempt: int, stop: StopSignals) -> None:
        self.plan = plan
        self.config = config
        self.folder = folder
        self.attempt = attempt
        self.stop = stop
        self.keeper: Keeper | None = None
        self.trainers: list[Child] = []
        self.echo: LogEcho | None = None
        self.has_trainer = False  # whether the script has come so far that it reports its waits
        self._is_told = False  # the trainers, to stop
        self._all_alive_s = time.monotonic()  # when all trainers lived for the last time
        self.watchdog = Watchdog(folder, config.watchdog.heartbeat_s, config.watchdog.stall_s)

    def run(self) -> None:
        """Start everything, return when all trainers are done. Nothing is left running, whatever happens.

        A server that dies or hangs is started again alone, while the trainers go on. At the first signal the trainers
        get SIGTERM, at which they finish their step and write a recovery point; servers serve until then.

        Consumes: exit codes, heartbeats, signals. Produces: logs, the terminal's view of trainer-0. Waits for: the end
        of all trainers, looking every TICK_S. Unblocked by: their exit, a trainer's death, the loss of all servers, a
        stall, a signal.

        Raises RunFailed or StopRequested.
        """
        try:
            self.start_servers()
            self.start_trainers()
            while any(c.poll() is None for c in self.trainers):
                self.look()
                time.sleep(TICK_S)
            self.look()
            if not self.has_trainer:
                raise RunFailed(
                    "the script ended without having made a trainer, so nothing was trained: does it call its function,"
                    ' under `if __name__ == "__main__":`?'
                )
        finally:
            grace_s = self.config.launcher.stop_grace_s
            for c in self.trainers:
                children.kill(c, self.folder)  # what is left of them waits in vain for others
            children.stop(self.all, self.folder, lambda: grace_s if self.stop.num_asked < 2 else 0.0)
            if self.echo is not None:
                self.echo.close()

    @property
    def all(self) -> list[Child]:
        return [*(self.keeper.children if self.keeper else []), *self.trainers]

    def start_servers(self) -> None:
        """Start all servers and wait until each answers /health, at most `launcher.startup_timeout_s`.

        Consumes: exit codes, answers of /health. Produces: healthy servers. Waits for: all of them, looking every
        TICK_S. Unblocked by: their answers, any death, a signal, the limit.
        """
        began = time.monotonic()
        self.keeper = keeper = Keeper(self.plan.servers, self.config, self.folder, self.attempt)
        limit_s = self.config.launcher.startup_timeout_s
        names = lambda: [s.plan.name for s in keeper.starting()]  # noqa: E731
        with waits.waiting("health at start", "servers", limit_s, names) as wait:
            while keeper.starting():
                self.look()
                try:
                    wait.check()
                except WaitTimeout as error:
                    late = [s.child.obituary() for s in keeper.starting()]
                    raise RunFailed("\n".join([f"{error}; see launcher.startup_timeout_s", *late])) from None
                time.sleep(TICK_S)
        if keeper.servers:
            say(f"servers are up after {time.monotonic() - began:.0f} s; trainers load data and model")

    def start_trainers(self) -> None:
        assert self.keeper is not None, "servers come first"
        env = {"AREAL_LLM_SERVER_ADDRS": ",".join(self.keeper.addresses()), "MASTER_PORT": str(free_ports(1)[0])}
        for process in self.plan.trainers:
            self.trainers.append(self._start(process, env))
        self.echo = LogEcho(self.trainers[0].log, self.trainers[0].offset)

    def _start(self, process: ProcessPlan, env: dict[str, str] | None = None) -> Child:
        return children.start(process, self.folder, self.attempt, env or {})

    def look(self) -> None:
        """One tick: copy the log, raise if a process died or stalled or a stop was asked for."""
        if self.echo is not None:
            self.echo.copy()
        self.has_trainer |= any((self.folder.waits_dir / f"{c.name}.json").exists() for c in self.trainers)
        if self.stop.first and self._may_stop():
            raise StopRequested(self.stop.first)
        if self.trainers and all(c.poll() == 0 for c in self.trainers):
            return
        assert self.keeper is not None, "servers come first"
        if not self.keeper.look() or self._failed():
            time.sleep(SETTLE_S)
            raise self._judge()
        if self.keeper.starting() and self.trainers:
            self.watchdog.excuse()
        report = self.watchdog.look({c.name: c.pid for c in self.all if c.poll() is None})
        if report is not None:
            say(report.text)
            if not self.keeper.may_kill(report.culprit):
                raise RunFailed(report.headline, may_restart=self.config.watchdog.action == "restart")
            self.keeper.kill(report.culprit)

    def _may_stop(self) -> bool:
        """A stop was asked for: whether no trainer is left that could end by itself. Not waited for when asked twice,
        nor for long where some have ended."""
        alive = [c for c in self.trainers if c.poll() is None]
        if not alive or self.stop.num_asked > 1:
            return True
        if not self._is_told:
            if self.config.recover.mode != "off":
                say("stopping after this step, with a recovery point; asked once more, at once")
            for c in alive:
                os.kill(c.pid, signal.SIGTERM)
            self._is_told = True
        if len(alive) == len(self.trainers):
            self._all_alive_s = time.monotonic()
        return time.monotonic() - self._all_alive_s > self.config.launcher.stop_grace_s

    def _failed(self) -> list[Child]:
        return [] if self.stop.first else [c for c in self.trainers if c.poll() not in (None, 0)]

    def _judge(self) -> RunFailed:
        """The one that died first: whoever a signal ended, since the others only lost their partner; then servers."""
        assert self.keeper is not None, "servers come first"
        failed, all_servers = self._failed(), self.keeper.servers
        # A server that was given up while others went on is not why a trainer failed later.
        is_past = failed and not all(s.given_up for s in all_servers)
        servers = {s.child.name: s for s in all_servers if s.child.poll() is not None and not (is_past and s.given_up)}
        dead = failed + [s.child for s in servers.values()]
        codes = {c.name: c.poll() or 0 for c in dead}
        first = min(dead, key=lambda c: (codes[c.name] > 0, c.plan.kind == "trainer"))
        may_restart = servers[first.name].may_start_again if first.name in servers else codes[first.name] < 0
        others = [f"{c.name} ended too (exit code {codes[c.name]})" for c in dead if c is not first]
        echoed = bool(self.trainers) and first is self.trainers[0]  # the terminal has its traceback already
        return RunFailed("\n".join([first.obituary(brief=echoed), *others]), may_restart)
