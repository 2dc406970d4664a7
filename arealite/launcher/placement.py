"""Where the processes of a plan lie: their nodes, devices and cores, and why. Pure.

Called by plan.py, and by evaluation/asking.py for the cores of a server. Trainer ranks lie next to each other from node
0 on, where the launcher is; then each server goes to the node with the most free devices, the first of equals. On a
node devices are given out in the order of the allocation mode. Nodes without GPUs have places instead, so many that all
are equally full.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from arealite.api.errors import ConfigError
from arealite.launcher.allocation import AllocationMode, Component
from arealite.launcher.machine import Machine

ONLY_NODE = "the only node"


@dataclass(frozen=True)
class Place:
    """Of one process: its node, counted from 0, the GPUs that it computes on there (none: the CPU), and why there."""

    node: int
    devices: tuple[str, ...]
    why: str


def place_processes(mode: AllocationMode, machines: Sequence[Machine]) -> tuple[list[Place], list[Place]]:
    """The places of all servers, and of all trainer ranks. Raises ConfigError where they find none."""
    _check_machines(mode, machines)
    rollout, sets = mode.inference, mode.trainer_sets
    per_node = len(machines[0].gpus) or math.ceil(mode.num_devices / len(machines))
    free = [per_node] * len(machines)
    nodes: dict[int, list[int]] = {}  # of each group, the node of each of its devices
    whys: dict[int, list[str]] = {}
    orders = [next((i for i, of_set in enumerate(sets) if of_set[0] in group), len(sets)) for group in mode.groups]
    for at in sorted(range(len(mode.groups)), key=lambda at: orders[at]):
        spread = _each_on_one_node if orders[at] == len(sets) else _in_a_row
        nodes[at], whys[at] = spread(mode.groups[at][0], free, per_node)
    gpus = [iter(machine.gpus) for machine in machines]
    devices = [[(node, next(gpus[node], "")) for node in nodes[at]] for at in range(len(mode.groups))]

    def places(component: Component, width: int) -> list[Place]:
        at = next(at for at, group in enumerate(mode.groups) if component in group)
        found = []
        for begin in range(0, component.world_size, width):
            part, why = devices[at][begin : begin + width], whys[at][begin]
            if part[0][0] != part[-1][0]:
                raise ConfigError(
                    f"allocation_mode {mode}: the devices {begin} to {begin + width - 1} of {component}, one server's,"
                    f" lie on two nodes of {per_node} devices each: choose t and p so that their product divides"
                    f" {per_node}"
                )
            own_devices = tuple(gpu for _, gpu in part if gpu)
            found.append(Place(part[0][0], own_devices, ONLY_NODE if len(machines) == 1 else why))
        return found

    servers = [] if rollout is None else places(rollout, rollout.world_size // rollout.num_servers)
    return servers, [place for of_set in sets for place in places(of_set[0], 1)]


def _check_machines(mode: AllocationMode, machines: Sequence[Machine]) -> None:
    """Refuses machines that differ in their GPUs, or have too few."""
    num_gpus, first = len(machines[0].gpus), machines[0]
    for machine in machines:
        if len(machine.gpus) != num_gpus:
            raise ConfigError(
                f"node {first.name} has {num_gpus} GPUs and node {machine.name} has {len(machine.gpus)}: nodes of a run"
                f" are alike; cluster.num_gpus_per_node={min(num_gpus, len(machine.gpus))} uses so many of each"
            )
    if num_gpus and mode.num_devices > num_gpus * len(machines):
        groups = ", ".join(f"{'|'.join(map(str, group))} {group[0].world_size}" for group in mode.groups)
        total = num_gpus * len(machines)
        sharing = "|".join(f"{c.backend}:d{total}" for c in (mode.inference, mode.train) if c is not None)
        raise ConfigError(
            f"allocation_mode {mode} needs {mode.num_devices} GPUs ({groups}), and there are {total}"
            f" ({num_gpus} on each of cluster.num_nodes={len(machines)}): lower the dimensions, or join components by"
            f" '|' so that they share devices: allocation_mode='{sharing}'"
        )


def _in_a_row(component: Component, free: list[int], per_node: int) -> tuple[list[int], list[str]]:
    """The node of each device, and why: next to each other from the first node on that has any left."""
    nodes: list[int] = []
    for node, num_free in enumerate(free):
        num_taken = min(num_free, component.world_size - len(nodes))
        free[node] -= num_taken
        nodes += [node] * num_taken
    return nodes, ["trainer ranks lie together, from node 0 on"] * len(nodes)


def _each_on_one_node(component: Component, free: list[int], per_node: int) -> tuple[list[int], list[str]]:
    """The same for servers, each of which needs all of its devices on one node."""
    width = component.world_size // component.num_servers
    nodes: list[int] = []
    whys: list[str] = []
    for server in range(component.num_servers):
        node = max(range(len(free)), key=lambda node: free[node])
        if free[node] < width:
            left = ", ".join(f"node {node} {num_free}" for node, num_free in enumerate(free))
            raise ConfigError(
                f"allocation_mode: each server of {component} needs {width} GPUs of one node, which have {per_node}"
                f" each, and for server {server} there are {width - free[node]} too few (still free: {left}): lower t"
                " or p, or the number of servers or ranks"
            )
        nodes += [node] * width
        whys += [f"the node with the most free devices ({free[node]} of {per_node})"] * width
        free[node] -= width
    return nodes, whys


def share_cores(cores: Sequence[int], num_servers: int, num_trainers: int, takes_turns: bool) -> list[tuple[int, ...]]:
    """The cores of each process of one node, servers first.

    Side by side: disjoint shares. Taking turns: servers share all cores among themselves, trainers too. More
    processes than cores: one core each, by turns, so that no core has two more than another.
    """

    def split(num_parts: int) -> list[tuple[int, ...]]:
        if num_parts > len(cores):
            return [(cores[i % len(cores)],) for i in range(num_parts)]
        bounds = [i * len(cores) // num_parts for i in range(num_parts + 1)] if num_parts else []
        return [tuple(cores[a:b]) for a, b in itertools.pairwise(bounds)]

    return split(num_servers) + split(num_trainers) if takes_turns else split(num_servers + num_trainers)
