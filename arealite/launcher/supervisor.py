"""One start of a run: servers, their health, trainers, and the watch over all of them. Called by local.py.

Convention: a process that a signal ended (crash, kill, out of memory), or a server that ended by itself after it was
healthy, is bad luck and may be started again. A positive exit code is a Python error or a refused configuration,
which would come again: the run ends with it.
"""

from __future__ import annotations

import http.client
import os
import re
import secrets
import signal
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from arealite.api.atomic import write_json, write_text
from arealite.api.cli_args import RunConfig
from arealite.api.errors import ArealiteError, WaitTimeout
from arealite.api.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from arealite.launcher.agent import EXIT_GO_ON, STOP_SIGNAL
from arealite.launcher.child import POLL_S, SAY_LIMIT_S, Hands, StartedProcess, free_ports, lost_a_peer, say
from arealite.launcher.plan import Plan, ProcessPlan
from arealite.observe import waits
from arealite.observe.run_folder import ATTEMPT_VARIABLE, RunFolder
from arealite.observe.watchdog import Watchdog

TICK_S = 0.1
SETTLE_S = 0.5  # in which the victims of a killed process may show that they were not the first
CULPRIT_LIMIT_S = 5.0  # for the rank whose sockets the others found closed to end as well
PROBE_LIMIT_S = 2.0  # of one look at a server's health
FIRST_BACKOFF_S = 0.5  # between a death and the next start; doubled each time
MAX_BACKOFF_S = 30.0
STEADY_S = 60.0  # a server that has been well for so long starts to count its restarts anew
ADDRESS_IN_USE = re.compile(r"address already in use|EADDRINUSE", re.IGNORECASE)


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


def answers(host: str, port: int, path: str, limit_s: float) -> bool:
    """Whether a server says 200 to GET `path`. Without proxies: it is one of the run's nodes."""
    with closing(http.client.HTTPConnection(host, port, timeout=limit_s)) as connection:
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def lost_its_port(child: StartedProcess) -> bool:
    """Whether it found a port taken that was free when it was given to it."""
    return bool(ADDRESS_IN_USE.search(child.output()))


@dataclass
class Replica:
    """One server through all of its processes, of which `child` is the newest: starting -> ready -> dead -> starting,
    until it is given up."""

    plan: ProcessPlan
    node: Hands
    child: StartedProcess
    since: float  # monotonic, of the last start or of the first answer after it; when dead, of the next start
    state: Literal["starting", "ready", "dead", "given up"] = "starting"
    was_ready: bool = False
    num_restarts: int = 0  # in a row
    address: str = ""  # host:port, once it is known

    @property
    def may_start_again(self) -> bool:
        """A signal, a server that had been well, or a port that was free when we looked: bad luck."""
        code = self.child.exit_code or 0
        is_luck = code < 0 or self.was_ready or lost_its_port(self.child)
        return is_luck and self.plan.restart == "alone"


class Keeper:
    """The servers of one start of the run: started together, started again one by one when they die, each on its node,
    their addresses in the run folder's `servers` file, which the trainer's client follows."""

    def __init__(self, config: RunConfig, folder: RunFolder, nodes: Sequence[Hands], attempt: int) -> None:
        self._folder, self._nodes = folder, nodes
        self._node_limit_s = config.launcher.node_timeout_s
        self._env = {ATTEMPT_VARIABLE: str(attempt)}
        self._max_restarts = config.recover.max_restarts if config.recover.mode == "auto" else 0
        self._probe_s = min(PROBE_LIMIT_S, config.watchdog.stall_s / 4)
        self._startup_limit_s = config.launcher.startup_timeout_s
        self._num_probes = 0
        self.replicas: list[Replica] = []
        # Other machines can reach the servers of several nodes: those of the environment, or of this start alone.
        own = {name: os.environ.get(name) or secrets.token_hex(32) for name in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE)}
        self.keys = own | {"VLLM_API_KEY": own[API_KEY_VARIABLE]} if len(nodes) > 1 else {}

    def start(self, plans: tuple[ProcessPlan, ...]) -> None:
        for plan in plans:
            node = self._nodes[plan.node]
            self.replicas.append(Replica(plan, node, self._start(plan, node), time.monotonic()))

    def _start(self, plan: ProcessPlan, node: Hands) -> StartedProcess:
        return node.start(plan, self._nodes[0].address, self._env | self.keys)

    def unready(self) -> list[Replica]:
        """Those that do not answer yet, or are about to be started."""
        return [r for r in self.replicas if r.state in ("starting", "dead")]

    def addresses(self) -> list[str]:
        return [r.address for r in self.replicas if r.state != "given up"]

    @property
    def has_begun(self) -> bool:
        return all(r.was_ready for r in self.replicas)

    def look(self) -> bool:
        """One tick: note deaths, start what is due, ask those that are starting for their health. False when there is
        no server that can be waited for, or one has failed before the run began."""
        now = time.monotonic()
        for replica in self.replicas:
            if replica.state == "dead" and now >= replica.since:
                self._start_again(replica, now - replica.since)
            elif replica.state in ("starting", "ready") and replica.child.exit_code is not None:
                self._died(replica)
            elif replica.state == "ready" and now - replica.since > STEADY_S:
                replica.num_restarts = 0
        self._probe()
        num_lost = len(self.replicas) - len(self.addresses())
        return not num_lost or (self.has_begun and num_lost < len(self.replicas))

    def end(self, name: str) -> bool:
        """End a process that hangs, and all that it has started, if it is a server that `look` then starts again."""
        for replica in self.replicas:
            if replica.plan.name == name and replica.num_restarts < self._max_restarts:
                replica.child.kill()
                return True
        return False

    def _died(self, replica: Replica) -> None:
        name, obituary = replica.plan.name, replica.child.obituary()
        if replica.may_start_again and replica.num_restarts < self._max_restarts:
            replica.state = "dead"
            replica.since = time.monotonic() + min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**replica.num_restarts)
            replica.num_restarts += 1
            say(f"{obituary}\n{name} alone: restart {replica.num_restarts} of at most {self._max_restarts}")
            return
        self._give_up(replica, obituary)

    def _give_up(self, replica: Replica, why: str) -> None:
        replica.state = "given up"
        replica.child.kill()  # what it left behind may hold memory and devices
        if self.addresses():
            say(f"{why}\n{replica.plan.name} is not started again")
            self._write_addresses()

    def _start_again(self, replica: Replica, waited_s: float) -> None:
        """As soon as its node is there. Without any server on another node the run is better started again."""
        if replica.node.loss:
            is_last = all(r.node.loss for r in self.replicas if r.state != "given up")
            if is_last or waited_s > self._node_limit_s:
                self._give_up(replica, f"{replica.node.loss} and has not come back")
            return
        replica.child.kill()  # as in `_give_up`
        replica.child.close()
        replica.child = self._start(replica.plan, replica.node)
        replica.state, replica.since = "starting", time.monotonic()

    def _probe(self) -> None:
        """In turn, for a tick's time, so that frozen ones cannot hold up the watchdog."""
        starting, end = [r for r in self.replicas if r.state == "starting"], time.monotonic() + TICK_S
        for _ in starting:
            self._num_probes += 1
            self._ask(starting[self._num_probes % len(starting)])
            if time.monotonic() >= end:
                break

    def _ask(self, replica: Replica) -> None:
        host, port = replica.node.address, replica.child.port
        if port and answers(host, port, replica.plan.ready_path, self._probe_s):
            replica.state, replica.was_ready, replica.since = "ready", True, time.monotonic()
            replica.address = f"{host}:{port}"
            self._write_addresses()
        elif replica.was_ready and time.monotonic() - replica.since > self._startup_limit_s:
            say(f"{replica.plan.name} is not healthy after launcher.startup_timeout_s; it is ended")
            replica.child.kill()

    def _write_addresses(self) -> None:
        """Replace the file at once, so that readers see a whole list. Dead servers keep their line until they are
        replaced; those given up lose it."""
        if self.has_begun:  # before, there are no trainers
            write_text(self._folder.servers, "".join(f"{address}\n" for address in self.addresses()), durable=False)


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
            self.start_trainers()
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

    def start_trainers(self) -> None:
        head = self.nodes[0].address
        (port,) = free_ports(1, head)
        env = {ATTEMPT_VARIABLE: str(self.attempt)}
        env |= {"MASTER_PORT": str(port), "AREAL_LLM_SERVER_ADDRS": ",".join(self.keeper.addresses())}
        for plan in self.plan.trainers:
            self.trainers.append(self.nodes[plan.node].start(plan, head, env | self.keeper.keys))

    def look(self) -> None:
        """One tick: copy the log, raise if a process died or stalled or a stop was asked for."""
        for c in self.trainers[:1]:
            c.echo()
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
        servers = [r for r in replicas if r.child.exit_code is not None and not (is_past and r.state == "given up")]
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
