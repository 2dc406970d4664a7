"""The nodes of a run, as its launcher has them: its own machine, and those whose agents have come to it. Called by
local.py; a thread for each agent hears what that tells, and the supervisor uses all nodes alike, as `Hands`.
"""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from arealite.api.atomic import write_text
from arealite.api.cli_args import RunConfig
from arealite.api.errors import ConfigError, WaitTimeout, listed
from arealite.launcher.agent import ADDRESS_VARIABLE
from arealite.launcher.check import UNLIMITED, amount, table
from arealite.launcher.child import KILL_LIMIT_S, Hands, OwnNode, obituary, say
from arealite.launcher.machine import Machine, interface_env, own_address, versions
from arealite.launcher.plan import Plan, ProcessPlan
from arealite.launcher.rendezvous import (
    HEAD_VARIABLE,
    MAX_BEAT_S,
    AgentLine,
    Meeting,
    find_head,
    publish,
    read,
    record,
)
from arealite.launcher.supervisor import TICK_S, RunFailed, StopRequested
from arealite.observe.progress import terminal_width
from arealite.observe.run_folder import RunFolder
from arealite.observe.waits import waiting

LEAVE_LIMIT_S = 10.0
LATE_S = 3 * MAX_BEAT_S  # silence of an agent before it is told, long before launcher.node_silence_s
LOOK_S = 0.3  # how often the thread of an agent looks whether the run is over
MAX_CLOCK_S = 5.0  # between two nodes, before it is told
MIN_FREE_BYTES = 1 << 30  # of a node's memory and of each of its GPUs, beneath which something else is there
HEADING = ("slot", "node", "address", "cores", "GPUs", "memory", "of GPUs", "run folder", "clock", "")


class NodesMissing(RunFailed):
    """Too few of the run's nodes are left, and none has come back."""


class FarChild:
    """A StartedProcess of another node, as far as its agent has told; `loss`: the node is gone, and so is the process,
    since the agent ends it before it comes back."""

    def __init__(self, plan: ProcessPlan, node: FarNode, number: int) -> None:
        self.plan, self.node, self.number, self.line = plan, node, number, node.line
        self.pid = self.port = 0
        self.status, self.log, self.tail, self.loss = "running", "", "", ""
        self.code: int | None = None

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def exit_code(self) -> int | None:
        return -signal.SIGKILL if self.loss else self.code

    def hear(self, told: dict[str, Any]) -> None:
        """In the thread of the agent."""
        self.pid, self.port, self.log = (told.get(key, vars(self)[key]) for key in ("pid", "port", "log"))
        self.status, self.tail = told.get("status", self.status), told.get("tail", self.tail)
        self.code = told.get("code", self.code)
        if beat := told.get("beat"):
            with suppress(OSError):  # a folder that fails says nothing of the node; the next beat tries again
                write_text(self.node.folder.waits_dir / f"{self.name}.json", beat, durable=False)

    def tell(self, **message: Any) -> None:
        """To the agent that has started it."""
        with suppress(OSError):  # it is lost, as the agent's thread is about to notice
            if self.line is not None and not self.loss:
                self.line.send(of=self.number, **message)

    def send(self, number: int, is_alone: bool = False) -> None:
        if self.exit_code is None:
            self.tell(do="send", signal=number, is_alone=is_alone)

    def kill(self) -> None:
        self.tell(do="kill", name=self.name)

    def output(self) -> str:
        return self.tail if self.code is not None else f"(it is on node {self.node.name})"

    def echo(self, limit_s: float = 0.0) -> None:
        """Its log stays on its node."""

    def obituary(self, brief: bool = False) -> str:
        if self.loss:
            return f"{self.name} (pid {self.pid}) is lost: {self.loss}"
        return obituary(self, f"{self.log} on node {self.node.name}", brief)

    def close(self) -> None:
        """Nothing is held here."""


class FarNode:
    """A node that an agent stands for, as Hands describes, through all lives of agents of this slot."""

    def __init__(self, slot: int, folder: RunFolder) -> None:
        self.folder = folder
        self.name, self.address, self.machine = f"of slot {slot}", "", Machine(())
        self.line: AgentLine | None = None
        self.loss = f"node {self.name} has not come yet"
        self.unfit = ""  # why it cannot take part
        self.shares, self.clock_s, self.ended = False, 0.0, list[str]()  # as its agent has told
        self._children: dict[int, FarChild] = {}
        self._numbers = itertools.count(1)
        self._cleaned, self._lock = threading.Event(), threading.Lock()
        self._killed: list[str] = []
        self._is_silent = False

    def start(self, plan: ProcessPlan, head: str, env: dict[str, str]) -> FarChild:
        child = FarChild(plan, self, next(self._numbers))
        self._children[child.number] = child
        child.tell(do="start", plan=asdict(plan), head=head, env=env)
        if child.line is None or child.line is not self.line:  # `lose` was a moment earlier
            child.loss = child.loss or self.loss or "its agent has come anew"
        return child

    def clean(self) -> list[str]:
        self._cleaned.clear()
        with suppress(OSError), waiting(f"the end of all on node {self.name}", self.name, 2 * KILL_LIMIT_S) as wait:
            if self.line is not None:
                self.line.send(do="clean")
            while not (self.loss or self._cleaned.wait(TICK_S)):
                if not wait.left_s:
                    say(f"node {self.name} does not say that its processes have ended")
                    break
        return self._killed

    def take(self, line: AgentLine) -> bool:
        """Whether the agent of this line is the only one. In its thread, as all that follow."""
        with self._lock:
            is_free = self.line is None
            self.line = line if is_free else self.line
            return is_free

    def see(self, told: dict[str, Any]) -> None:
        """It has told what its node is."""
        self.name, self.address, self.machine = (
            told["machine"]["name"],
            told["address"],
            record(Machine, told["machine"]),
        )
        self.shares, self.clock_s, self.ended = told["shares"], told["clock"] - time.time(), told["ended"]
        self._children = {}

    def mind(self, is_silent: bool) -> None:
        """Its agent has said nothing for LATE_S, or it has spoken."""
        if is_silent != self._is_silent:
            self._is_silent = is_silent
            say(f"node {self.name} " + (f"says nothing for {LATE_S:.0f} s" if is_silent else "speaks again"))

    def hear(self, told: dict[str, Any]) -> None:
        if "cleaned" in told:
            self._killed = told["cleaned"]
            self._cleaned.set()
        elif (child := self._children.get(told.get("of", 0))) is not None:
            child.hear(told)

    def lose(self, line: AgentLine, why: str) -> None:
        if self.line is line:
            self.line, self.loss = None, f"node {self.name} is lost: {why}"
            if why and not any(child.code is None for child in self._children.values()):  # who would say it
                say(self.loss)
            for child in list(self._children.values()):
                child.loss = self.loss if child.code is None else ""


class RunHead:
    """All nodes of a run. With more than one it listens for agents from the beginning until `close`, which lets them
    go with the exit code of the run."""

    def __init__(self, config: RunConfig, folder: RunFolder, stops: list[int]) -> None:
        self._config, self._folder, self._stops = config, folder, stops
        self._has_started, self._shown = False, list[str]()  # why nodes were not used, as it was shown last
        self._exit_code: int | None = None
        self._threads: list[threading.Thread] = []
        self.own = OwnNode(folder, Machine.local(config.cluster))
        self.far = [FarNode(slot, folder) for slot in range(1, config.cluster.num_nodes)]
        if self.far:
            self._listen()

    def gather(self, make_plan: Callable[[Sequence[Machine]], Plan]) -> tuple[Plan, list[Hands]]:
        """The plan of the next start, and its nodes: all at first, but for those that are unfit, if the plan allows;
        later also without those that are lost and have not come back within `launcher.node_silence_s`.

        Consumes: agents that join. Produces: nodes. Waits for: enough of them, `launcher.node_timeout_s`. Unblocked by:
        agents, a signal, the limit. Raises ConfigError: the plan is impossible; RunFailed: too few.
        """
        limits = self._config.launcher
        missing: list[str] = []
        refusal = ""
        with waiting("nodes", "agents", limits.node_timeout_s, lambda: missing) as wait:
            while True:
                unfit = [node.unfit for node in self.far if node.unfit]
                nodes: list[Hands] = [self.own, *(node for node in self.far if not (node.loss or node.unfit))]
                missing = [node.loss for node in self.far if node.loss and not node.unfit]
                if not missing or (self._has_started and wait.age_s > limits.node_silence_s):
                    try:
                        plan = make_plan([node.machine for node in nodes])
                        self._has_started = True
                        self._show()
                        return plan, nodes
                    except ConfigError as error:
                        if not missing:
                            raise ConfigError("\n".join([*unfit, str(error)])) from None
                        refusal = f"\nWithout: {error}"
                if self._stops:
                    raise StopRequested(self._stops[0])
                try:
                    wait.check()
                except WaitTimeout as error:
                    kind = NodesMissing if self._has_started else RunFailed
                    raise kind(f"{error}; see launcher.node_timeout_s{refusal}") from None
                time.sleep(TICK_S)

    @property
    def invitation(self) -> str:
        """How agents are started by hand; empty where none is waited for."""
        if not self.far:
            return ""
        return (
            f"; agents are waited for at {self.meeting.host}:{self.meeting.port}: on the nodes of SLOT 1 to"
            f" {len(self.far)}, python -m arealite.launcher.agent --run-folder {self._folder.root} --slot SLOT"
        )

    def close(self, exit_code: int) -> None:
        """Let all agents go, and wait for that."""
        self._exit_code = exit_code
        end = time.monotonic() + LEAVE_LIMIT_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if self.far:
            self._socket.close()

    def _listen(self) -> None:
        """Raises ConfigError: the environment is wrong, or the place cannot be listened at or published."""
        try:
            told = find_head(None, 0) if os.environ.get(HEAD_VARIABLE) else None
            address = os.environ.get(ADDRESS_VARIABLE) or own_address()
            self._socket = socket.create_server((address, 0) if told is None else ("", told.port), backlog=1024)
            epoch = 1
            with suppress(LookupError):
                epoch += read(self._folder.root).epoch
            key = secrets.token_hex(32) if told is None else told.key
            self.meeting = Meeting(address, self._socket.getsockname()[1], key, epoch)
            publish(self._folder.root, self.meeting)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no place for the agents of other nodes: {error}") from error
        self.own.machine = replace(self.own.machine, name=socket.gethostname())
        self.own.address, self.own.env = address, interface_env(address)
        threading.Thread(target=self._welcome, name="agents", daemon=True).start()

    def _welcome(self) -> None:
        """Consumes: connections. Produces: a thread for each. Waits for: the next. Unblocked by: that, `close`."""
        while True:
            try:
                plain, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._attend, args=(plain,), name="agent", daemon=True)
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()

    def _attend(self, plain: socket.socket) -> None:
        """One agent.

        Consumes: its messages. Produces: what its node tells. Waits for: the next message, LOOK_S. Unblocked by: time,
        its silence, the end of the connection, `close`.
        """
        try:
            line = AgentLine(plain, self.meeting.key, is_head=True)
        except ConnectionError as error:
            say(f"somebody at the place of the agents was sent away: {error}")
            return
        node, why = None, ""
        try:
            while self._exit_code is None:
                told = line.receive(LOOK_S)
                if node is not None and not node.loss:
                    node.mind(not told and line.silent_s > LATE_S)
                if node is None:
                    node = self._let_in(line, told) if told else None
                elif "machine" in told:
                    line.silence_s = self._config.launcher.node_silence_s
                    node.see(told)
                    node.unfit = self._fault(node, told["versions"])
                    node.loss = ""  # last: from here on a plan may use it
                elif "unfit" in told:
                    node.unfit = f"node {node.name}: {told['unfit']}"
                elif "stop" in told and not self._stops:
                    say(f"node {node.name} was asked to stop")
                    self._stops.append(told["stop"])
                else:
                    node.hear(told)
            line.send(leave=self._exit_code)
            while True:  # to the agent's end: closed before, with a word of it unread, the connection would be reset
                line.receive(LOOK_S)
        except (OSError, KeyError, TypeError, ValueError) as error:
            if self._exit_code is None:
                why = str(error) if isinstance(error, OSError) else f"its agent speaks another language ({error!r})"
        finally:
            line.close()
            if node is not None:
                node.lose(line, why)

    def _let_in(self, line: AgentLine, told: dict[str, Any]) -> FarNode | None:
        """The node of an agent that has said who it is; None when it is sent away."""
        slot, epoch = told["slot"], told["epoch"]
        node = self.far[slot - 1] if 1 <= slot <= len(self.far) else None
        refused, is_final = "", True
        if node is None:
            refused = f"slot {slot}, expected 1 to {len(self.far)}: cluster.num_nodes is {len(self.far) + 1}"
        elif epoch not in (0, self.meeting.epoch):
            refused, is_final = f"epoch {epoch} is over, the head's is {self.meeting.epoch}", False
        elif not node.take(line):
            refused, is_final = f"slot {slot} is taken by node {node.name}", False
        if node is None or refused:
            line.send(refused=refused, is_final=is_final)
            return None
        cluster, watchdog = self._config.cluster, self._config.watchdog
        node.name, node.unfit = told["name"], ""
        line.silence_s = self._config.launcher.node_timeout_s  # for its imports, from whatever file system
        line.send(
            epoch=self.meeting.epoch,
            folder=str(self._folder.root),
            cwd=os.getcwd(),
            silence_s=self._config.launcher.node_silence_s,
            heartbeat_s=watchdog.heartbeat_s,
            cluster={name: vars(cluster)[name] for name in ("num_gpus_per_node", "num_cores_per_node")},
        )
        return node

    def _fault(self, node: FarNode, packages: dict[str, str]) -> str:
        """What of a node does not go with this one; a clock that differs is only told."""
        ours, machine = versions(), node.machine
        if abs(node.clock_s) > MAX_CLOCK_S:
            say(f"warning: the clock of node {node.name} differs by {node.clock_s:.0f} s")
        differing = [f"{key} {packages.get(key)}, {ours[key]} on node {self.own.name}" for key in ours
                     if packages.get(key) != ours[key]]  # fmt: skip
        num_gpus, own_gpus = len(machine.gpus), len(self.own.machine.gpus)
        if num_gpus != own_gpus:
            return (
                f"node {node.name} has {num_gpus} GPUs, and node {self.own.name} {own_gpus}:"
                f" cluster.num_gpus_per_node={min(num_gpus, own_gpus)} uses so many of each"
            )
        if differing:
            return f"node {node.name} has {'; '.join(differing)}: install the same on both"
        free = {"memory": machine.memory_bytes, "memory of a GPU": machine.gpu_bytes}
        short = [f"{amount(size)} of free {what}" for what, size in free.items() if 0 < size < MIN_FREE_BYTES]
        return f"node {node.name} has {listed(short)}: what else is running there?" if short else ""

    def _show(self) -> None:
        """The nodes as they were found: at first, and when others are lost or left out."""
        rows, whys = [HEADING], []
        nodes: list[OwnNode | FarNode] = [self.own, *self.far]
        for slot, node in enumerate(nodes):
            machine, seen, why = node.machine, ("here", ""), ""
            if isinstance(node, FarNode):
                seen = ("shared" if node.shares else "its own", f"{node.clock_s:+.1f} s")
                why = f"LEFT OUT: {node.unfit}" if node.unfit else node.loss
                why = why or "; ".join(f"ended {name}, which was left there" for name in node.ended)
            num_cores, num_gpus = str(len(machine.cores)), str(len(machine.gpus))
            free = amount(machine.memory_bytes), amount(machine.gpu_bytes) if machine.gpus else "-"
            rows.append((str(slot), node.name, node.address, num_cores, num_gpus, *free, *seen, why))
            whys.append(why)
        if self.far and whys != self._shown:
            say("\n  ".join(["nodes:", *table(rows, terminal_width() or UNLIMITED)]))
        self._shown = whys
