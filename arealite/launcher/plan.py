"""From configuration and machine to the list of processes: commands, environment, cores, devices. Pure.

Called by local.py, which starts them, and by describe.py, which shows them. Ports are chosen at the start: PORT in a
command and MASTER_PORT in an environment stand for them until then.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import ConfigError
from arealite.launcher.allocation import DIMENSIONS, AllocationMode, Component
from arealite.launcher.machine import Machine

PORT = "{port}"
HOST = "127.0.0.1"
# Which letters above 1 a backend can be given today.
SUPPORTED = {"native": "", "sglang": "tpe", "fsdp": ""}
# A training step on the CPU allocates and frees the same large tensors again and again. By default glibc maps each one
# anew and gives it back at once, and the kernel zeroes its pages every time: 15 to 20% of a step. Kept in the heap, on
# huge pages, they are reused; the trainer keeps the memory of its peak.
ALLOCATOR_ENV = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True)
class ProcessPlan:
    """One process. `cores` it may run on (empty: all), `devices` it computes on (empty: the CPU)."""

    name: str
    kind: Literal["server", "trainer"]
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    port: int = 0  # chosen at the start
    node: str = "localhost"

    def on_port(self, port: int) -> ProcessPlan:
        """This process with its port filled in."""
        return replace(self, port=port, command=tuple(str(port) if word == PORT else word for word in self.command))


@dataclass(frozen=True)
class Plan:
    """All processes of a run."""

    allocation: str
    processes: tuple[ProcessPlan, ...]
    colocated: bool = False

    @property
    def servers(self) -> tuple[ProcessPlan, ...]:
        return tuple(p for p in self.processes if p.kind == "server")

    @property
    def trainers(self) -> tuple[ProcessPlan, ...]:
        return tuple(p for p in self.processes if p.kind == "trainer")

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def make_plan(config: GRPOConfig, machine: Machine, model: str, trainer_command: Sequence[str]) -> Plan:
    """The processes of a run on one machine.

    `model` is what servers load (folder or hub id), `trainer_command` the script with its arguments, without the
    interpreter. Raises ConfigError for what this version or this machine cannot run.
    """
    mode = AllocationMode.parse(config.allocation_mode)
    rollout, actor = _components(mode)
    _check_supported(config, rollout, actor)
    _check_devices(config, mode, rollout, machine)
    takes_turns = mode.colocated or config.rollout.max_head_offpolicyness == 0
    cores = share_cores(machine.cores, rollout.num_servers, actor.world_size, takes_turns)
    devices = _share_devices(mode, rollout, actor, machine)
    # As torchrun does it: all ranks see all trainer devices, LOCAL_RANK picks one.
    of_trainers = tuple(d for own in devices[rollout.num_servers :] for d in own)
    processes = []
    for i, (own_cores, own_devices) in enumerate(zip(cores, devices, strict=True)):
        rank = i - rollout.num_servers
        env = {**_common_env(config, mode), "OMP_NUM_THREADS": str(len(own_cores))}
        kind: Literal["server", "trainer"] = "server" if rank < 0 else "trainer"
        if kind == "server":
            name, command, visible = f"server-{i}", server_command(config, rollout, model), own_devices
        else:
            name, command, visible = f"trainer-{rank}", (sys.executable, *trainer_command), of_trainers
            env |= _rank_env(rank, actor.world_size)
            env |= {} if machine.gpus else ALLOCATOR_ENV
        if machine.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        pinned = own_cores if config.launcher.pin_cores and not machine.gpus else ()
        env |= config.launcher.env
        processes.append(ProcessPlan(name, kind, command, env, pinned, own_devices, node=machine.name))
    return Plan(str(mode), tuple(processes), mode.colocated)


def _components(mode: AllocationMode) -> tuple[Component, Component]:
    """The rollout servers and the policy's trainer; refuses everything beside them."""
    rollout, actor = mode.inference, mode.train
    if rollout is None or actor is None:
        missing = "inference servers" if rollout is None else "trainer"
        raise ConfigError(
            f"allocation_mode {mode} has no {missing}: GRPO needs both, such as native:d1+fsdp:d1 (separate devices)"
            " or native:d1|fsdp:d1 (shared)"
        )
    others = [c for c in mode.components if c not in (rollout, actor)]
    if others:
        raise ConfigError(
            f"allocation_mode {mode}: nothing would run on {', '.join(map(str, others))}; this version runs one"
            " inference and one training component"
        )
    return rollout, actor


def _check_supported(config: GRPOConfig, rollout: Component, actor: Component) -> None:
    for component in (rollout, actor):
        if component.backend not in SUPPORTED:
            same_role = [b for b in SUPPORTED if Component(b, component.dims).role == component.role]
            raise ConfigError(
                f"allocation_mode: this version cannot run {component.backend}; for {component.role} it has"
                f" {' and '.join(same_role)}"
            )
        sizes = asdict(component.dims)
        too_wide = [k for k in sizes if k != "d" and sizes[k] > 1 and k not in SUPPORTED[component.backend]]
        if too_wide or component.ffn is not None:
            what = ", ".join(f"{DIMENSIONS[k]} parallelism ({k}{sizes[k]})" for k in too_wide) or "the attn / ffn form"
            raise ConfigError(
                f"allocation_mode: {component.backend} has no {what} in this version; use"
                f" {component.backend}:d{component.world_size}"
            )
    if config.cluster.num_nodes > 1:
        raise ConfigError(
            f"cluster.num_nodes is {config.cluster.num_nodes}, but the local launcher starts processes on this machine"
            " only: set it to 1"
        )
    if rollout.backend != "native" and config.weight_update == "shm":
        raise ConfigError(f"weight_update is shm, which {rollout.backend} servers do not read: set weight_update=disk")


def _check_devices(config: GRPOConfig, mode: AllocationMode, rollout: Component, machine: Machine) -> None:
    if not machine.gpus:
        if rollout.backend != "native":
            raise ConfigError(f"{rollout.backend} servers need GPUs and this machine has none: use native")
        return
    if mode.num_devices > len(machine.gpus):
        groups = ", ".join(f"{'|'.join(map(str, group))} {group[0].world_size}" for group in mode.groups)
        raise ConfigError(
            f"allocation_mode {mode} needs {mode.num_devices} GPUs ({groups}), and there are {len(machine.gpus)}"
            f" (cluster.num_gpus_per_node: {config.cluster.num_gpus_per_node}): lower the dimensions, or join"
            " components by '|' so that they share devices"
        )


def share_cores(cores: Sequence[int], num_servers: int, num_trainers: int, takes_turns: bool) -> list[tuple[int, ...]]:
    """The cores of each process, servers first.

    Side by side: disjoint shares. Taking turns: servers share all cores among themselves, trainers too. More
    processes than cores: one core each, by turns, so that no core has two more than another.
    """
    if takes_turns:
        return _split(cores, num_servers) + _split(cores, num_trainers)
    return _split(cores, num_servers + num_trainers)


def _split(cores: Sequence[int], num_parts: int) -> list[tuple[int, ...]]:
    if num_parts > len(cores):
        return [(cores[i % len(cores)],) for i in range(num_parts)]
    bounds = [i * len(cores) // num_parts for i in range(num_parts + 1)]
    return [tuple(cores[a:b]) for a, b in itertools.pairwise(bounds)]


def _share_devices(
    mode: AllocationMode, rollout: Component, actor: Component, machine: Machine
) -> list[tuple[str, ...]]:
    """The GPUs of each server, then of each trainer rank; empty tuples without GPUs."""
    if not machine.gpus:
        return [()] * (rollout.num_servers + actor.world_size)
    gpus: dict[str, tuple[str, ...]] = {}
    offset = 0
    for group in mode.groups:
        size = group[0].world_size
        gpus |= {component.label: machine.gpus[offset : offset + size] for component in group}
        offset += size
    width = rollout.world_size // rollout.num_servers
    starts = range(0, rollout.world_size, width)
    return [gpus[rollout.label][at : at + width] for at in starts] + [(gpu,) for gpu in gpus[actor.label]]


def _common_env(config: GRPOConfig, mode: AllocationMode) -> dict[str, str]:
    env = {
        # Threads that spin while they wait take the cores of the other side.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # logs are files
        # A server that changes its title would overwrite the environment by which its processes are found.
        "SPT_NOENV": "1",
        "AREALITE_HEARTBEAT_S": str(config.watchdog.heartbeat_s),
        "AREALITE_STALL_S": str(config.watchdog.stall_s),
    }
    return env | ({"AREALITE_COLOCATED": "1"} if mode.colocated else {})


def _rank_env(rank: int, world_size: int) -> dict[str, str]:
    """torchrun's variables; MASTER_PORT is set at the start."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
    }


def server_command(config: GRPOConfig, rollout: Component, model: str) -> tuple[str, ...]:
    """How one inference server is started; PORT stands for its port."""
    server = config.server
    options = {
        "host": HOST,
        "port": PORT,
        "dtype": server.dtype,
        "max_running_requests": server.max_running_requests,
        "context_length": server.context_length,
    }
    if rollout.backend == "sglang":
        module = "sglang.launch_server"
        options |= {"model_path": model, "random_seed": config.seed, "max_total_tokens": server.kv_cache_tokens}
        options |= {"tp_size": rollout.dims.t, "pp_size": rollout.dims.p, "ep_size": rollout.dims.e}
        options |= {"enable_deterministic_inference": server.deterministic}
    else:
        module = "arealite.inference.serve"
        options |= {"model": model, "seed": config.seed, "kv_cache_tokens": server.kv_cache_tokens}
        options |= {"weight_version": "0", "deterministic": server.deterministic}
    return (sys.executable, "-m", module, *flags(options), *flags(server.args))


def flags(args: Mapping[str, Any]) -> list[str]:
    """A server's own flags: `{mem_fraction_static: 0.8, trust_remote_code: true}` as --key value and --key."""
    words: list[str] = []
    for key, value in args.items():
        flag = "--" + key.lstrip("-").replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words
