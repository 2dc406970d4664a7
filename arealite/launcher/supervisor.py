"""One start of a run: servers, their health, trainers, and the watch over all of them. Called by local.py.

Convention: a process that a signal ended (crash, kill, out of memory), or a server that ended by itself after it was
healthy, is bad luck and may be started again. A positive exit code is a Python error or a refused configuration,
which would come again: the run ends with it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from arealite.api.atomic import write_json
from arealite.api.cli_args import RunConfig
from arealite.api.errors import ArealiteError, WaitTimeout
from arealite.launcher.agent import EXIT_GO_ON, STOP_SIGNAL
from arealite.launcher.child import (
    POLL_S,
    SAY_LIMIT_S,
    Hands,
    StartedProcess,
    hold_port,
    lost_a_peer,
    lost_its_port,
    say,
)
from arealite.launcher.keeper import Keeper
from arealite.launcher.plan import Plan
from arealite.observe import waits
from arealite.observe.run_folder import ATTEMPT_VARIABLE, RunFolder
from arealite.observe.watchdog import Watchdog

TICK_S = 0.1
SETTLE_S = 0.5  # in which the victims of a killed process may show that they were not the first
ROOM_S = 2.0  # how often room for logs is looked for
CULPRIT_LIMIT_S = 5.0  # for the rank whose sockets the others found closed to end as well

State = Literal["running", "draining", "finished", "failed"]


class RunFailed(ArealiteError):
    """A process died or stalled; the message names it, says why, and shows its first real error."""

    def __init__(self, message: str, may_restart: bool = False) -> None:
        super().__init__(message)
        self.may_restart = may_restart


class StopRequested(Exception):
    """The user or the system asked the launcher to stop, by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = EXIT_GO_ON if number == STOP_SIGNAL else 128 + number


class Supervisor:
    """Runs a plan once, on `nodes`. Who asks a second time by signal to stop (`stops`, the signals so far) is not made
    to wait for the processes' grace."""

    def __init__(
        self, plan: Plan, config: RunConfig, folder: RunFolder, nodes: Sequence[Hands], stops: list[int]
    ) -> None:
        self.plan, self.nodes = plan, nodes
        self.config = config
        self.folder = folder
        self.stops = stops
        self.attempt = folder.num_attempts() + 1
        self.keeper = Keeper(config, folder, nodes, self.attempt)
        self.trainers: list[StartedProcess] = []
        self.has_trainer = False  # whether the script has come so far that it reports its waits
        self.is_told = False  # the trainers, to stop
        self.all_alive_s = 0.0  # monotonic, when all trainers lived for the last time
        self.room_s, self.is_full = 0.0, False  # monotonic, when the disk of logs was looked at; what was seen
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
        forget_heartbeats(self.folder)
        self.folder.log("", str(self.attempt)).parent.mkdir(parents=True, exist_ok=True)  # by which starts are counted
        self.note("running")
        try:
            self.start_servers()
            with hold_port(self.nodes[0].address) as held:
                self.start_trainers(held.getsockname()[1])
                while any(c.exit_code is None for c in self.trainers):
                    self.look()
                    time.sleep(TICK_S)
            self.look()
            if not self.has_trainer:
                raise RunFailed(
                    "the script ended without having made a trainer, so nothing was trained: does it call its function,"
                    ' under `if __name__ == "__main__":`?'
                )
        finally:
            self.end()

    def start_servers(self) -> None:
        """Start all servers and wait until each is ready, at most `launcher.startup_timeout_s`.

        Consumes: exit codes, answers of servers. Produces: ready servers. Waits for: all of them, looking every
        TICK_S. Unblocked by: their answers, any death, a signal, the limit.
        """
        began = time.monotonic()
        keeper, limit_s = self.keeper, self.config.launcher.startup_timeout_s
        keeper.start(self.plan.servers)
        with waits.waiting(
            "health at start", "servers", limit_s, lambda: [r.plan.name for r in keeper.unready()]
        ) as wait:
            while keeper.unready():
                self.look()
                try:
                    wait.check()
                except WaitTimeout as error:
                    late = [r.child.obituary() for r in keeper.unready()]
                    raise RunFailed("\n".join([f"{error}; see launcher.startup_timeout_s", *late])) from None
                time.sleep(TICK_S)
        if keeper.replicas:
            say(f"servers are up after {time.monotonic() - began:.0f} s; trainers load data and model")

    def start_trainers(self, port: int) -> None:
        """`port`: of rank 0, by which ranks find each other."""
        env = {ATTEMPT_VARIABLE: str(self.attempt), "MASTER_PORT": str(port)} | self.keeper.keys
        env |= {"AREAL_LLM_SERVER_ADDRS": ",".join(self.keeper.addresses())}
        for plan in self.plan.trainers:
            self.trainers.append(self.nodes[plan.node].start(plan, self.nodes[0].address, env))

    def look(self) -> None:
        """One tick: copy the log, raise if a process died or stalled or a stop was asked for."""
        for c in self.trainers[:1]:
            c.echo()
        self.note_room()
        self.has_trainer |= any((self.folder.waits_dir / f"{c.name}.json").exists() for c in self.trainers)
        if self.stops and self.may_stop():
            raise StopRequested(self.stops[0])
        if self.trainers and all(c.exit_code == 0 for c in self.trainers):
            return
        if not self.keeper.look() or self.failed():
            self.settle()
            raise self.judge()
        if self.keeper.unready() and self.trainers:
            self.watchdog.excuse()
        report = self.watchdog.look({c.name: c for c in self.children if c.exit_code is None})
        if report is not None:
            say(report.text)
            if not self.keeper.end(report.culprit):
                raise RunFailed(report.headline, may_restart=self.config.watchdog.action == "restart")

    @property
    def children(self) -> list[StartedProcess]:
        return [*(r.child for r in self.keeper.replicas), *self.trainers]

    def may_stop(self) -> bool:
        """A stop was asked for: whether no trainer is left that could end by itself. Not waited for when asked twice,
        nor for long where some have ended."""
        alive = [c for c in self.trainers if c.exit_code is None]
        if not alive or len(self.stops) > 1:
            return True
        if not self.is_told:
            if self.config.recover.mode != "off":
                say("stopping after this step, with a recovery point; asked once more, at once")
            self.note("draining", str(StopRequested(self.stops[0])))
            for c in alive:
                c.send(signal.SIGTERM, is_alone=True)
            self.is_told, self.all_alive_s = True, time.monotonic()
        if len(alive) == len(self.trainers):
            self.all_alive_s = time.monotonic()
        return time.monotonic() - self.all_alive_s > self.config.launcher.stop_grace_s

    def note_room(self) -> None:
        """Tell when the disk of logs is full, or is so no more; observe/output.py has processes go on without."""
        if time.monotonic() - self.room_s < ROOM_S:
            return
        self.room_s = time.monotonic()
        with suppress(OSError):  # a shared folder that fails, which may pass
            is_full = not os.statvfs(self.folder.logs_dir).f_bavail
            if is_full != self.is_full:
                lost = "the run goes on, and what its processes say is lost" if is_full else "there is room again"
                say(f"the disk of {self.folder.logs_dir} was full: {lost}")
            self.is_full = is_full

    def note(self, state: State, reason: str = "") -> None:
        note_state(self.folder, state, self.attempt, reason)

    def failed(self) -> list[StartedProcess]:
        return [] if self.stops else [c for c in self.trainers if c.exit_code not in (None, 0)]

    def settle(self) -> None:
        """Wait for those that are about to end too, at most CULPRIT_LIMIT_S for the one to blame."""
        end = time.monotonic() + CULPRIT_LIMIT_S
        time.sleep(SETTLE_S)
        while (failed := self.failed()) and all(map(lost_a_peer, failed)) and time.monotonic() < end:
            if len(failed) == len(self.trainers):
                break
            time.sleep(TICK_S)

    def judge(self) -> RunFailed:
        """The one that died first: whoever a signal ended, since the others only lost their partner; then servers, and
        ranks that lost no partner."""
        failed, replicas = self.failed(), self.keeper.replicas
        # A server that was given up while others went on is not why a trainer failed later.
        is_past = bool(failed and self.keeper.addresses())
        passed = ("drained", "given up") if is_past else ("drained",)
        servers = [r for r in replicas if r.child.exit_code is not None and r.state not in passed]
        codes = {c.name: c.exit_code or 0 for c in [*failed, *(r.child for r in servers)]}
        dead = [c for c in self.children if c.name in codes]  # servers first
        first = min(dead, key=lambda c: (codes[c.name] > 0, lost_a_peer(c)))
        is_luck = codes[first.name] < 0 or lost_its_port(first)
        may_restart = next((r.may_start_again for r in servers if r.child is first), is_luck)
        others = [f"{c.name} ended too (exit code {codes[c.name]})" for c in dead if c is not first]
        echoed = first in self.trainers[:1]  # the terminal has its traceback already
        return RunFailed("\n".join([first.obituary(brief=echoed), *others]), may_restart)

    def end(self) -> None:
        """SIGKILL to trainers, which would wait in vain for others, SIGTERM to servers, SIGKILL after their grace, then
        whatever they have left behind. Cut short when the user asks a second time."""
        began, grace_s = time.monotonic(), self.config.launcher.stop_grace_s
        for c in self.trainers:
            c.send(signal.SIGKILL)
        for c in self.children:
            c.send(signal.SIGTERM)
            c.send(signal.SIGCONT)  # a frozen process acts on SIGTERM only when it goes on
        while any(c.exit_code is None for c in self.children) and time.monotonic() - began < grace_s:
            if len(self.stops) > 1:
                break
            time.sleep(POLL_S)
        for c in self.children:
            c.send(signal.SIGKILL)
        for node in self.nodes:
            node.clean()
        for c in self.trainers[:1]:
            c.echo(SAY_LIMIT_S)
        for c in self.children:
            c.close()
        forget_heartbeats(self.folder)


def note_state(folder: RunFolder, state: State, attempt: int, reason: str = "") -> None:
    """Write run_state.json, for those who wait for the run."""
    try:
        write_json(folder.state_json, {"state": state, "reason": reason, "attempt": attempt})
    except OSError as error:  # a full disk: the run may go on all the same
        say(f"{folder.state_json} cannot be written, it should say {state}: {error}")


def forget_heartbeats(folder: RunFolder) -> None:
    """Those of processes that are gone: their numbers may be others' by now."""
    for beat in folder.waits_dir.glob("*.json"):
        if beat.stem != waits.LAUNCHER:
            beat.unlink(missing_ok=True)
