"""The servers of one start of a run: started together, started again one by one, ended when they have left. Called by
supervisor.py.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from arealite.api.atomic import write_text
from arealite.api.cli_args import RunConfig
from arealite.api.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from arealite.launcher.child import Hands, StartedProcess, lost_its_port, say
from arealite.launcher.plan import ProcessPlan
from arealite.observe.run_folder import ATTEMPT_VARIABLE, RunFolder

PROBES_S = 0.1  # for looks at servers that start, in one tick
PROBE_LIMIT_S = 2.0  # of one look at a server's health
FIRST_BACKOFF_S = 0.5  # between a death and the next start; doubled each time
MAX_BACKOFF_S = 30.0
STEADY_S = 60.0  # a server that has been well for so long starts to count its restarts anew
READ_S = 1.0  # how often the client's list is read


def answers(host: str, port: int, path: str, limit_s: float) -> bool:
    """Whether a server says 200 to GET `path`. Without proxies: it is one of the run's nodes."""
    with closing(http.client.HTTPConnection(host, port, timeout=limit_s)) as connection:
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


@dataclass
class Replica:
    """One server through all of its processes, of which `child` is the newest: starting -> ready -> dead -> starting,
    until it is given up, or drained."""

    plan: ProcessPlan
    node: Hands
    child: StartedProcess
    since: float  # monotonic, of the last start or of the first answer after it; when dead, of the next start
    state: Literal["starting", "ready", "dead", "given up", "drained"] = "starting"
    was_ready: bool = False
    num_restarts: int = 0  # in a row
    address: str = ""  # host:port, once it is known

    @property
    def is_over(self) -> bool:
        return self.state in ("given up", "drained")

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
        self._read_s = 0.0  # monotonic, when the client's list was read last
        self._is_told = True  # the client, of all addresses
        self.replicas: list[Replica] = []
        # Other machines can reach the servers of several nodes: those of the environment, or of this start alone.
        own = {name: os.environ.get(name) or secrets.token_hex(32) for name in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE)}
        self.keys = own | {"VLLM_API_KEY": own[API_KEY_VARIABLE]} if len(nodes) > 1 else {}

    def start(self, plans: tuple[ProcessPlan, ...]) -> None:
        self._folder.servers_json.unlink(missing_ok=True)  # of servers at other addresses
        for plan in plans:
            node = self._nodes[plan.node]
            self.replicas.append(Replica(plan, node, self._start(plan, node), time.monotonic()))

    def _start(self, plan: ProcessPlan, node: Hands) -> StartedProcess:
        return node.start(plan, self._nodes[0].address, self._env | self.keys)

    def unready(self) -> list[Replica]:
        """Those that do not answer yet, or are about to be started."""
        return [r for r in self.replicas if r.state in ("starting", "dead")]

    def addresses(self) -> list[str]:
        return [r.address for r in self.replicas if not r.is_over]

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
        if self.has_begun and now - self._read_s > READ_S:
            self._read_s = now
            self._end_drained()
        if not self._is_told:
            self._write_addresses()
        num_lost = sum(replica.state == "given up" for replica in self.replicas)
        return not num_lost or (self.has_begun and bool(self.addresses()))

    def _end_drained(self) -> None:
        """What the client has let go (rollout/roster.py) has no work left, and its place is wanted for something."""
        try:
            left = json.loads(self._folder.servers_json.read_text())["left"]
        except (OSError, ValueError, KeyError):  # it is not there yet, or a shared folder shows something else
            return
        reasons = {urlsplit(url).netloc: reason for url, reason in left.items()}
        for replica in self.replicas:
            if replica.state == "ready" and replica.address in reasons:
                replica.state = "drained"
                replica.child.kill()
                say(f"{replica.plan.name} ({replica.address}) is ended: {reasons[replica.address]}")
                self._write_addresses()

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
            is_last = all(r.node.loss for r in self.replicas if not r.is_over)
            if is_last or waited_s > self._node_limit_s:
                self._give_up(replica, f"{replica.node.loss} and has not come back")
            return
        replica.child.kill()  # as in `_give_up`
        replica.child.close()
        replica.child = self._start(replica.plan, replica.node)
        replica.state, replica.since = "starting", time.monotonic()

    def _probe(self) -> None:
        """In turn, for a tick's time, so that frozen ones cannot hold up the watchdog."""
        starting, end = [r for r in self.replicas if r.state == "starting"], time.monotonic() + PROBES_S
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
        if not self.has_begun:  # there are no trainers
            return
        try:
            write_text(self._folder.servers, "".join(f"{address}\n" for address in self.addresses()), durable=False)
            self._is_told = True
        except OSError as error:  # a shared folder that fails, which may pass
            if self._is_told:
                say(f"{self._folder.servers} cannot be written, which is tried again: {error}")
            self._is_told = False
