"""A run on the nodes of a Ray cluster, `launcher.type: ray`; called by local.py.

Ray has nodes and tells which are lost; the processes of the run are those of its head and agents. A placement group has
a bundle on every node, an actor in each starts the head (slot 0) or an agent in a session of its own. The kernel ends
that with its actor, and Ray the actors with this driver, however it ends. What they say is shown here, the head's exit
code is the run's, and signals that come here are passed on to the head.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from arealite.api.cli_args import ClusterSpecConfig, RunConfig
from arealite.api.errors import ConfigError, listed
from arealite.launcher import rendezvous, shim
from arealite.launcher.agent import ADDRESS_VARIABLE
from arealite.launcher.child import SAY_LIMIT_S, STDOUT, describe_exit, say, write
from arealite.launcher.machine import VISIBLE_GPUS
from arealite.launcher.rendezvous import HEAD_VARIABLE, KEY_VARIABLE, Meeting
from arealite.observe.processes import SLOT_VARIABLE
from arealite.observe.run_folder import RunFolder
from arealite.observe.waits import waiting

LOOK_S = 0.25
SILENCE_S = 30.0  # an actor that has not answered for so long is lost
TELL_S = 5.0  # without a node, before it is told
SETTLE_S = 3.0  # in which the head ends too, if it has let an agent go
MAX_SAID_BYTES = 1 << 20  # of what a process says, at one look
NODES_OWN = ("HOSTNAME", "TMPDIR")  # variables that processes have from their node; all others are the driver's
AGENT = ("-m", "arealite.launcher.agent")
Answer = tuple[int | None, bytes, Meeting | None]  # exit code, what was said, where the head listens


class NodeActor:
    """On one node. Its calls run in the main thread of Ray's worker, with which the kernel ends what it has started."""

    def land(self) -> tuple[str, str, str]:
        """Where this is: name, address, its GPUs."""
        import ray

        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return os.uname().nodename, ray.util.get_node_ip_address(), ",".join(map(str, gpus))

    def start(self, words: Sequence[str], env: Mapping[str, str], cwd: str, folder: RunFolder | None) -> Answer:
        """Start this node's interpreter with `words`; a head will publish its place in `folder`. Answers as `look`."""
        self._folder, self._output = folder, tempfile.TemporaryFile()  # noqa: SIM115 - as long as the actor
        self._meeting = self._earlier = self._published()
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)  # Ray lowers that of its workers
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", shim.__file__, str(os.getpid()), "-", sys.executable, *words],
            env={**env, **{name: os.environ[name] for name in NODES_OWN if name in os.environ}},
            cwd=cwd, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return self.look(0)

    def look(self, offset: int) -> Answer:
        """How it is; said: from `offset` on."""
        code = self._process.poll()
        if self._meeting == self._earlier:
            self._meeting = self._published()
        meeting = None if self._meeting == self._earlier else self._meeting
        return code, os.pread(self._output.fileno(), MAX_SAID_BYTES, offset), meeting

    def send(self, number: int) -> None:
        """A signal to what was started alone, which knows how its own processes are ended."""
        if self._process.poll() is None:
            os.kill(self._process.pid, number)

    def _published(self) -> Meeting | None:
        with suppress(LookupError):
            return None if self._folder is None else rendezvous.read(self._folder.root)
        return None


class RayNode:
    """A bundle of the placement group, through all of its actors: the newest is asked where it is; then it starts the
    head or an agent, and is asked again and again how that is. `is_idle`: it is there, and has started nothing."""

    def __init__(self, ray: Any, new_actor: Callable[[], Any]) -> None:
        self._ray, self._new_actor, self.name = ray, new_actor, ""
        self.place()

    def place(self) -> None:
        """Have Ray make an actor, which it does as soon as the bundle has a node."""
        self.actor, self.address, self.is_idle, self._is_told = self._new_actor(), "", False, False
        self.exit_code: int | None = None
        self.meeting: Meeting | None = None
        self._ask(self.actor.land.remote())

    def start(self, words: Sequence[str], env: Mapping[str, str], slot: int, folder: RunFolder | None = None) -> None:
        own = {VISIBLE_GPUS: self._gpus, ADDRESS_VARIABLE: self.address, SLOT_VARIABLE: str(slot)}
        self._offset, self._ended_s, self.is_idle = 0, 0.0, False
        self._ask(self.actor.start.remote(words, {**env, **own}, os.getcwd(), folder))

    def look(self) -> str:
        """Take the actor's answer if it is there, and show what its process says. Returns why it is lost, if it is."""
        if self.is_idle:
            return ""
        if not self._ray.wait([self._answer], timeout=0)[0]:
            silent_s = time.monotonic() - self._asked_s
            return f"it is silent for {silent_s:.0f} s" if self.address and silent_s > SILENCE_S else ""
        try:
            answer = self._ray.get(self._answer)
        except self._ray.exceptions.RayTaskError as error:
            return str(error.cause)
        except self._ray.exceptions.RayError as error:
            return first_line(error)
        if not self.address:
            host, self.address, self._gpus = answer
            self.name, self.is_idle = f"{host} ({self.address})", True
            return ""
        self.exit_code, said, self.meeting = answer
        write(STDOUT, said, SAY_LIMIT_S)
        self._offset += len(said)
        self._ask(self.actor.look.remote(self._offset))
        return ""

    def lacks_node(self) -> bool:
        """Whether Ray has had none for it for TELL_S; once for each actor."""
        is_late = not (self.address or self._is_told) and time.monotonic() - self._asked_s > TELL_S
        self._is_told |= is_late
        return is_late

    def has_ended(self, limit_s: float = 0.0) -> bool:
        """Whether its process has, that long ago."""
        if self.exit_code is not None and not self._ended_s:
            self._ended_s = time.monotonic()
        return self.exit_code is not None and time.monotonic() - self._ended_s >= limit_s

    def _ask(self, answer: Any) -> None:
        self._answer, self._asked_s = answer, time.monotonic()


def run_on_ray(config: RunConfig, folder: RunFolder, words: Sequence[str], stops: list[int]) -> int:
    """Run the head, the interpreter of its node with `words`, and an agent on each other node, to the head's end;
    returns its exit code. `stops` gets the signals. Raises ConfigError: there is no Ray cluster, or it is too small."""
    ray = connect(config)
    try:
        nodes = reserve(ray, config, stops)
        return watch(ray, nodes, config, folder, words, stops) if nodes else 128 + stops[0]
    finally:
        ray.shutdown()  # with which Ray ends the actors, and has its nodes back


def connect(config: RunConfig) -> Any:
    """The module, connected to a cluster that is there: none is started. Raises ConfigError."""
    try:
        import ray
    except ImportError:
        raise ConfigError("launcher.type is ray, and Ray is not installed: pip install 'arealite[ray]'") from None
    actions = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    address = config.ray.address or os.environ.get("RAY_ADDRESS", "auto")
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"cannot join the Ray cluster {address!r} (ray.address, else RAY_ADDRESS): {first_line(error)}. This"
            " machine must be one of its nodes; `ray job submit` runs a command on one"
        ) from error
    finally:
        for number, action in actions.items():  # Ray has put its own there
            signal.signal(number, action)
    return ray


def bundle_of(cluster: ClusterSpecConfig, nodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """What the run takes of each of its nodes, which ray.nodes() has told; what `cluster` leaves open is all that each
    of the largest has. Raises ConfigError with what is missing."""
    alive = [node for node in nodes if node["Alive"]]
    sizes = sorted(([int(n["Resources"].get(kind, 0)) for kind in ("GPU", "CPU")] for n in alive), reverse=True)
    num_gpus, num_cpus = map(min, zip(*(sizes[: cluster.num_nodes] or [[0, 1]]), strict=True))
    num_gpus = num_gpus if cluster.num_gpus_per_node is None else cluster.num_gpus_per_node
    bundle = {"CPU": cluster.num_cores_per_node or max(1, num_cpus)} | ({"GPU": num_gpus} if num_gpus else {})
    num_missing = cluster.num_nodes - sum(gpu >= num_gpus and cpu >= bundle["CPU"] for gpu, cpu in sizes)
    if num_missing > 0:
        seen = listed([f"{node['NodeManagerAddress']} with {told(node['Resources'])}" for node in alive])
        raise ConfigError(
            f"the run needs {cluster.num_nodes} nodes with {told(bundle)} each, and {num_missing} of these are missing"
            f" in the Ray cluster, which has {seen}: see cluster.num_nodes, num_gpus_per_node and num_cores_per_node"
        )
    return bundle


def told(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def reserve(ray: Any, config: RunConfig, stops: list[int]) -> list[RayNode]:
    """The nodes of the run, each with an actor: slot 0 on the driver's machine if that is among them, then by address;
    none when a stop is asked for. Raises ConfigError, WaitTimeout."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    num_nodes, bundle = config.cluster.num_nodes, bundle_of(config.cluster, ray.nodes())
    asked = f"{num_nodes} nodes with {told(bundle)} each"
    say(f"asking Ray for {asked}")
    group = ray.util.placement_group([bundle] * num_nodes, strategy="STRICT_SPREAD")
    env = {f"RAY_EXPERIMENTAL_NOSET_{VISIBLE_GPUS}": "1"}  # processes are told their devices
    env |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "runtime_env": {"env_vars": env}}
    places = [PlacementGroupSchedulingStrategy(group, index) for index in range(num_nodes)]
    actors = [ray.remote(NodeActor).options(**options, max_restarts=0, scheduling_strategy=place) for place in places]
    nodes = [RayNode(ray, actor.remote) for actor in actors]

    def pending() -> list[str]:
        return [f"{asked}; free in all: {told(ray.available_resources())}"]

    with waiting("nodes", "Ray", config.launcher.node_timeout_s, pending) as wait:
        while not (stops or all(node.is_idle for node in nodes)):
            if faults := list(filter(None, [node.look() for node in nodes])):
                raise ConfigError(f"Ray could not start an actor on each node: {listed(faults)}")
            wait.check()
            time.sleep(LOOK_S)
    here = ray.util.get_node_ip_address()
    return [] if stops else sorted(nodes, key=lambda node: (node.address != here, ip_address(node.address)))


def watch(
    ray: Any, nodes: list[RayNode], config: RunConfig, folder: RunFolder, words: Sequence[str], stops: list[int]
) -> int:
    """Start the head, agents as soon as it listens, and another agent wherever Ray has a node for a lost one; returns
    the head's exit code, or 1 when its node is lost.

    Consumes: answers of actors, signals. Produces: what they say. Waits for: the end of the head, and then of the
    agents, looking every LOOK_S. Unblocked by: those, the loss of the head's node, a third signal, stop_grace_s.
    """
    say("nodes: " + ", ".join(f"{slot} {node.name}" for slot, node in enumerate(nodes)))
    head, num_sent = nodes[0], 0
    head.start(words, os.environ, 0, folder)
    while len(stops) < 3:
        time.sleep(LOOK_S)
        for slot, node in enumerate(nodes):
            fault = node.look()
            if node is not head and not head.has_ended() and node.exit_code and node.has_ended(SETTLE_S):
                fault = f"its agent {describe_exit(node.exit_code)}"
            if fault:
                say(f"node {node.name}, slot {slot}, is lost: {fault}")
                if node is head:
                    return 1
                ray.kill(node.actor)
                node.place()
            elif node.is_idle and (at := head.meeting) is not None:
                node.start(AGENT, {**os.environ, HEAD_VARIABLE: f"{at.host}:{at.port}", KEY_VARIABLE: at.key}, slot)
            elif node.lacks_node():
                alive = [str(other["NodeManagerAddress"]) for other in ray.nodes() if other["Alive"]]
                there = f"there are {listed(alive)}, and free in all {told(ray.available_resources())}"
                say(f"slot {slot} waits for a node of Ray, in place of {node.name}: {there}")
        for number in stops[num_sent:]:
            head.actor.send.remote(number)
        num_sent = len(stops)
        all_ended = all(node.is_idle or node.has_ended() for node in nodes)
        if head.exit_code is not None and (all_ended or head.has_ended(config.launcher.stop_grace_s)):
            if head.exit_code < 0:
                say(f"the head {describe_exit(head.exit_code)}; the same command goes on")
            return max(head.exit_code, 0) or int(head.exit_code < 0)
    return 128 + stops[0]
