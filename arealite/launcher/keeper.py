"""The run's inference servers: started together, started again one by one when they die, their addresses in the run
folder's `servers` file, which the trainer's client follows. Called by supervisor.py.
"""

from __future__ import annotations

import http.client
import socket
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass

from arealite.api.atomic import write_text
from arealite.api.cli_args import RunConfig
from arealite.launcher import children
from arealite.launcher.children import Child
from arealite.launcher.failures import ADDRESS_IN_USE
from arealite.launcher.plan import HOST, ProcessPlan
from arealite.launcher.terminal import say
from arealite.observe.run_folder import RunFolder

PROBE_LIMIT_S = 2.0  # of one look at /health
FIRST_BACKOFF_S = 0.5  # between a death and the next start; doubled each time
MAX_BACKOFF_S = 30.0
STEADY_S = 60.0  # a server that has been well for so long starts to count its restarts anew


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


@dataclass
class Server:
    """One server. `child` is its newest process, dead or alive; `due` when the next one is started, while it is dead
    and not `given_up`."""

    plan: ProcessPlan
    child: Child
    since: float  # monotonic, of the last start or of the first answer after it
    is_healthy: bool = False
    was_healthy: bool = False
    num_restarts: int = 0  # in a row
    num_starts: int = 1
    due: float | None = None
    given_up: bool = False

    @property
    def may_start_again(self) -> bool:
        """A signal, a server that had been well, or a port that was free when we looked: bad luck, see failures.py."""
        code = self.child.poll() or 0
        return code < 0 or self.was_healthy or bool(ADDRESS_IN_USE.search(self.child.output()))


class Keeper:
    """All servers of one start of the run."""

    def __init__(self, plans: tuple[ProcessPlan, ...], config: RunConfig, folder: RunFolder, attempt: int) -> None:
        self._config = config
        self._folder = folder
        self._attempt = attempt
        self._max_restarts = config.recover.max_restarts if config.recover.mode == "auto" else 0
        self._probe_s = min(PROBE_LIMIT_S, config.watchdog.stall_s / 4)
        self._turn = 0
        self.servers: list[Server] = []
        for process, port in zip(plans, free_ports(len(plans)), strict=True):
            child = children.start(process.on_port(port), folder, attempt, {})
            self.servers.append(Server(process, child, time.monotonic()))

    @property
    def children(self) -> list[Child]:
        return [server.child for server in self.servers]

    def starting(self) -> list[Server]:
        """Those that do not answer yet, or are about to be started."""
        return [s for s in self.servers if not (s.is_healthy or s.given_up)]

    def addresses(self) -> list[str]:
        return [f"{HOST}:{s.child.plan.port}" for s in self.servers if not s.given_up]

    def look(self) -> bool:
        """One tick: note deaths, start what is due, ask one that is starting whether it is healthy. False when there
        is no server that can be waited for, or one has failed before the run began."""
        now = time.monotonic()
        for server in self.servers:
            if server.given_up:
                continue
            if server.due is not None:
                if now >= server.due:
                    self._start(server)
            elif server.child.poll() is not None:
                self._died(server)
            elif server.is_healthy and now - server.since > STEADY_S:
                server.num_restarts = 0
        self._probe_one()
        has_begun = all(server.was_healthy for server in self.servers)
        given_up = [server.given_up for server in self.servers]
        return not given_up or not (all(given_up) if has_begun else any(given_up))

    def may_kill(self, name: str) -> bool:
        """Whether it is a server that would be started again."""
        return any(s.plan.name == name and s.num_restarts < self._max_restarts for s in self.servers)

    def kill(self, name: str) -> None:
        """End a server that hangs, and all that it has started; `look` then starts it again."""
        for server in self.servers:
            if server.plan.name == name:
                children.kill(server.child, self._folder)

    def _died(self, server: Server) -> None:
        server.is_healthy = False
        if not server.may_start_again or server.num_restarts >= self._max_restarts:
            self._give_up(server)
            return
        server.due = time.monotonic() + min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**server.num_restarts)
        server.num_restarts += 1
        name = server.plan.name
        say(f"{server.child.obituary()}\n{name} alone: restart {server.num_restarts} of at most {self._max_restarts}")

    def _give_up(self, server: Server) -> None:
        server.given_up = True
        children.kill(server.child, self._folder)  # what it left behind may hold memory and devices
        if not all(s.given_up for s in self.servers):
            say(f"{server.child.obituary()}\n{server.plan.name} is not started again")
            self.write_addresses()

    def _start(self, server: Server) -> None:
        server.due = None
        children.kill(server.child, self._folder)  # as in `_give_up`
        plan = server.plan.on_port(free_ports(1)[0])
        server.child = children.start(plan, self._folder, self._attempt + server.num_starts, {})
        server.num_starts += 1
        server.since = time.monotonic()

    def _probe_one(self) -> None:
        """One a tick, so that frozen ones cannot hold up the watchdog."""
        waiting = [s for s in self.starting() if s.due is None]
        if not waiting:
            return
        self._turn += 1
        server = waiting[self._turn % len(waiting)]
        if is_healthy(server.child.plan.port, self._probe_s):
            server.is_healthy = server.was_healthy = True
            server.since = time.monotonic()
            self.write_addresses()
        elif server.was_healthy and time.monotonic() - server.since > self._config.launcher.startup_timeout_s:
            say(f"{server.plan.name} is not healthy after launcher.startup_timeout_s; it is ended")
            children.kill(server.child, self._folder)

    def write_addresses(self) -> None:
        """Replace the file at once, so that readers see a whole list. Dead servers keep their line until they are
        replaced; those given up lose it."""
        if not all(server.was_healthy for server in self.servers):
            return  # the trainers have not been started
        write_text(self._folder.servers, "".join(f"{address}\n" for address in self.addresses()), durable=False)
