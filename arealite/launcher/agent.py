"""The agent of a node: the hands of the head, the launcher on the first node. It starts, signals and ends the processes
of its node and tells how they are; what is to be done is decided by the head alone.

`python -m arealite.launcher.agent [-- COMMAND OF THE HEAD]`, on every node alike, by whatever has the nodes: on slot 0
it becomes that command. It imports the standard library only, until it has joined. When the head is gone it ends all
its processes and asks to join again; an agent that was frozen has nothing left of its old life when it is let in.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arealite.launcher import rendezvous
from arealite.launcher.rendezvous import HANDSHAKE_LIMIT_S, AgentLine, find_head, record

if TYPE_CHECKING:
    from arealite.launcher.child import Child

TICK_S = 0.05
RETRY_S = 1.0  # between two attempts to join
TELL_S = 15.0  # between two lines about what is waited for
STOP_GRACE_S = 3.0  # in which the head may have been asked to stop itself
MAX_TAIL = 1 << 16  # characters of the end of a log
SLOT_VARIABLES = ("AREALITE_SLOT", "SLURM_NODEID", "SKYPILOT_NODE_RANK", "JOB_COMPLETION_INDEX")
ADDRESS_VARIABLE = "AREALITE_ADDRESS"
STOP_SIGNAL = signal.SIGUSR2  # to the head: the nodes will be gone soon; it leaves with EXIT_GO_ON
EXIT_GO_ON, EXIT_NO_HEAD = 85, 86  # the run goes on in a new allocation; an agent has no head any more
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, STOP_SIGNAL)


class Turned(Exception):
    """The head does not let this agent in, now or (`is_final`) ever."""

    def __init__(self, why: str, is_final: bool) -> None:
        super().__init__(why)
        self.is_final = is_final


class Agent:
    """One life of an agent, from the moment it is let in. Its children have the numbers that the head gave them, until
    they have ended and that was told."""

    def __init__(self, line: AgentLine, slot: int, epoch: int, stops: list[int]) -> None:
        line.send(slot=slot, epoch=epoch, name=socket.gethostname(), pid=os.getpid())
        until = time.monotonic() + HANDSHAKE_LIMIT_S
        while not (welcome := line.receive(TICK_S)) and time.monotonic() < until:
            pass
        if "cwd" not in welcome:
            raise Turned(str(welcome.get("refused", "it does not say welcome")), bool(welcome.get("is_final")))
        self.epoch, self._line, self._stops = int(welcome["epoch"]), line, stops
        self._children: dict[int, Child] = {}
        self._told: dict[int, str] = {}  # the heartbeats
        self._heartbeat_s, self._heard_beats_s = welcome["heartbeat_s"], 0.0
        self._clean: Callable[[], list[str]] = list
        try:
            self._open(welcome, slot)
        except Exception as error:  # boundary: whatever is missing on this node, the head says it, and goes on without
            say(f"this node cannot take part: {error}")
            line.send(unfit=f"{type(error).__name__}: {error}")
        line.silence_s, line.heard_s = welcome["silence_s"], time.monotonic()

    def _open(self, welcome: dict[str, Any], slot: int) -> None:
        os.chdir(welcome["cwd"])
        from arealite.api.atomic import write_text
        from arealite.api.run_args import ClusterSpecConfig
        from arealite.launcher.child import OwnNode, hold_port
        from arealite.launcher.machine import Machine, interface_env, versions
        from arealite.observe.run_folder import RunFolder

        folder = RunFolder(Path(welcome["folder"])).create()
        machine = replace(Machine.local(ClusterSpecConfig(**welcome["cluster"])), name=socket.gethostname())
        address = os.environ.get(ADDRESS_VARIABLE) or self._line.address
        self.node = OwnNode(folder, machine, slot, address, interface_env(address))
        self._clean = self.node.clean
        ended = self.node.clean()
        hold_port(address).close()
        write_text(probe := folder.root / f"node-{slot}", "as recovery points and logs will be")
        probe.unlink()
        try:
            shares = rendezvous.read(folder.root).epoch == self.epoch
        except LookupError:
            shares = False
        self._relayed = None if shares else folder.waits_dir
        self._line.send(
            machine=asdict(machine), address=address, versions=versions(), clock=time.time(), shares=shares, ended=ended
        )

    def serve(self) -> int:
        """Obey until the head says leave; returns the exit code that it gives.

        Consumes: messages, ends of processes, signals. Produces: processes, what the head is told. Waits for: a
        message, TICK_S. Unblocked by: time. Raises OSError: the head is gone.
        """
        asked_s = 0.0
        while True:
            message = self._line.receive(TICK_S)
            if "leave" in message:
                return int(message["leave"])
            if message:
                self._obey(message)
            self._tell()
            if self._stops:
                asked_s = asked_s or time.monotonic()
                if len(self._stops) > 1:
                    return 128 + self._stops[1]
                if time.monotonic() - asked_s > STOP_GRACE_S:
                    self._line.send(stop=self._stops[0])
                    asked_s = float("inf")

    def _obey(self, message: dict[str, Any]) -> None:
        number = message.get("of", 0)
        child = self._children.get(number)
        if message["do"] == "start":
            self._start(number, message)
        elif message["do"] == "send" and child is not None:
            child.send(message["signal"], message["is_alone"])
        elif message["do"] == "kill":  # also when it has ended: what it started may live
            if child is not None:
                child.send(signal.SIGKILL)
            self.node.clean(message["name"])
        elif message["do"] == "clean":
            self._line.send(cleaned=self.node.clean())

    def _start(self, number: int, message: dict[str, Any]) -> None:
        from arealite.launcher.plan import ProcessPlan

        plan = record(ProcessPlan, message["plan"])
        try:
            child = self.node.start(plan, message["head"], message["env"])
        except OSError as error:
            self._line.send(of=number, code=1, tail=f"it could not be started: {error}", log="")
            return
        self._children[number] = child
        self._line.send(of=number, pid=child.pid, port=child.port, status=child.status, log=child.log.name)

    def _tell(self) -> None:
        """The ends of processes, and what is new in heartbeats where the head cannot read them itself."""
        for number, child in list(self._children.items()):
            if child.exit_code is not None:
                self._line.send(of=number, code=child.exit_code, tail=child.output()[-MAX_TAIL:])
                child.close()
                del self._children[number]
        if time.monotonic() - self._heard_beats_s < self._heartbeat_s:
            return
        self._heard_beats_s = time.monotonic()
        for number, child in self._children.items():
            beat = ""
            if self._relayed is not None and (path := self._relayed / f"{child.name}.json").exists():
                beat = path.read_text()
            if (told := f"{child.status} {beat}") != self._told.get(number):
                self._told[number] = told
                self._line.send(of=number, status=child.status, beat=beat)

    def end(self) -> int:
        """End all processes; returns how many lived."""
        living = [child for child in self._children.values() if child.exit_code is None]
        for child in living:
            child.send(signal.SIGKILL)
        self._clean()
        for child in self._children.values():
            child.close()
        return len(living)


def serve(folder: Path | None, slot: int, limit_s: float, stops: list[int]) -> int:
    """Join, serve, and join again, until the head says leave, at most `limit_s` without one; returns the exit code."""
    epoch, lost_s, told_s = 0, time.monotonic(), time.monotonic()
    while True:
        try:
            meeting = find_head(folder, epoch)
            line = AgentLine(
                socket.create_connection((meeting.host, meeting.port), HANDSHAKE_LIMIT_S), meeting.key, False
            )
            try:
                agent = Agent(line, slot, meeting.epoch, stops)
                epoch = agent.epoch
                say(f"joined as slot {slot}, epoch {epoch}")
                try:
                    return agent.serve()
                finally:
                    say(f"ended {agent.end()} processes of this node")
                    lost_s = time.monotonic()
            finally:
                line.close()
        except Turned as turned:
            why = str(turned)
            if turned.is_final:
                say(why)
                return 2
        except (OSError, LookupError) as error:
            why = str(error)
        if stops:
            return 128 + stops[0]
        if time.monotonic() - lost_s > limit_s:
            say(f"no head for {limit_s:g} s: {why}")
            return EXIT_NO_HEAD
        if time.monotonic() - told_s > TELL_S:
            told_s = time.monotonic()
            say(f"looking for the head for {told_s - lost_s:.0f} s: {why}")
        time.sleep(RETRY_S)


def say(text: str) -> None:
    with suppress(OSError):  # a full disk, a terminal that is gone
        print(f"arealite agent: {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Returns the exit code: the one that the head gives; 86: there is no head; 2: refused; 128 + n: signal n."""
    parser = argparse.ArgumentParser(prog="python -m arealite.launcher.agent", description="The agent of a node.")
    add = parser.add_argument
    add("--run-folder", type=Path, help=f"where the head is found; or {rendezvous.HEAD_VARIABLE}=host:port")
    add("--slot", type=int, help=f"the node's number, 0 the head's; or {', '.join(SLOT_VARIABLES)}")
    add("--limit-s", type=float, default=300.0, help="longest time without a head")
    add("head", nargs="*", help="what slot 0 runs: arealite run ...")
    given = parser.parse_args(argv)
    slots = [given.slot, *(os.environ.get(name) for name in SLOT_VARIABLES)]
    slot = next((str(slot) for slot in slots if slot is not None), "")
    if not slot.isdigit():
        parser.error(f"the slot is {slot!r}; expected the node's number, by --slot or {', '.join(SLOT_VARIABLES)}")
    if int(slot) == 0:
        if not given.head:
            parser.error("slot 0 is the head's: give its command after --, such as -- arealite run ...")
        os.execvp(given.head[0], given.head)
    stops: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: stops.append(number))
    try:
        return serve(given.run_folder, int(slot), given.limit_s, stops)
    except ValueError as error:
        say(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
