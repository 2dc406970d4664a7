"""From configuration and machines to the list of processes: nodes, commands, environment, cores, devices. Pure.

Called by local.py, which starts them, and by check.py, which shows them. Ports and addresses are known at the start:
PORT and HOST (of the process), HEAD (where trainer rank 0 is) and MASTER_PORT in an environment stand for them until
then. A server's own flags (`server.args`) come last and replace those chosen here; false takes a flag away.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from arealite.api.cli_args import GRPOConfig, RunConfig
from arealite.api.errors import ConfigError, listed
from arealite.api.types import VLLM_WORKER_EXTENSION
from arealite.launcher.allocation import DIMENSIONS, AllocationMode, Component, models_of_ranks, trainer_dims
from arealite.launcher.machine import GPU_RANK_ENV, PIPELINE_ENV, VISIBLE_GPUS, Machine
from arealite.launcher.memory_estimate import RUNNING_REQUESTS, kv_cache_bytes
from arealite.launcher.placement import Place, place_processes, share_cores
from arealite.models.fetch import resolve_model
from arealite.models.rank_memory import ModelShape

PORT, HOST, HEAD = "{port}", "{host}", "{head}"
LOOPBACK = "127.0.0.1"  # the address of every process, where there is one node
VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
UNKNOWN_KV_CACHE_BYTES = 2 << 30  # for a model that is not a folder on this machine
# How each backend calls what all of them are given.
MODULES = {
    "native": "arealite.inference.serve",
    "sglang": "sglang.launch_server",
    "vllm": "vllm.entrypoints.openai.api_server",
}
COMMON = ("model", "seed", "context_length", "max_running_requests", "tokenizer_path")
NAMES = {
    "native": COMMON,
    "sglang": ("model_path", "random_seed", *COMMON[2:]),
    "vllm": ("model", "seed", "max_model_len", "max_num_seqs", "tokenizer"),
}
# Which letters above 1 a backend can be given today.
SUPPORTED = {"native": "", "sglang": "tpe", "vllm": "t", "fsdp": "tpce"}
COMMON_ENV = {
    # Threads that spin while they wait take the cores of the other side.
    "OMP_WAIT_POLICY": "PASSIVE",
    # But for a moment: a step has thousands of parallel regions, and a sleeping thread is late for each.
    "GOMP_SPINCOUNT": "30000",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # logs are files
    # A server that changes its title would overwrite the environment by which its processes are found.
    "SPT_NOENV": "1",
}
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
    """One process: the `slot`-th of its role, on the `node`-th node, for the reason `why`. A trainer has `models`, by
    their keys in the configuration. `cores` it may run on (empty: all), `devices` it computes on (empty: the CPU). It
    is ready when it answers 200 to GET `ready_path` (empty: when it has been started); `restart` says what is started
    again when bad luck ends it, it alone or the run."""

    role: Literal["server", "trainer"]
    slot: int
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    node: int = 0
    ready_path: str = ""
    restart: Literal["alone", "run"] = "run"
    why: str = ""
    models: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.role}-{self.slot}"

    def on_port(self, port: int, host: str = LOOPBACK, head: str = LOOPBACK) -> ProcessPlan:
        """This process with port and addresses filled in."""
        known = {PORT: str(port), HOST: host, HEAD: head}
        env = {name: known.get(value, value) for name, value in self.env.items()}
        return replace(self, command=tuple(known.get(word, word) for word in self.command), env=env)


@dataclass(frozen=True)
class Plan:
    """All processes of a run."""

    allocation: str
    processes: tuple[ProcessPlan, ...]
    colocated: bool = False
    num_nodes: int = 1

    @property
    def servers(self) -> tuple[ProcessPlan, ...]:
        return tuple(p for p in self.processes if p.role == "server")

    @property
    def trainers(self) -> tuple[ProcessPlan, ...]:
        return tuple(p for p in self.processes if p.role == "trainer")


def make_plan(config: RunConfig, machines: Sequence[Machine], model: str, trainer_command: Sequence[str]) -> Plan:
    """The processes of a run on `machines`, the nodes, of which the first is the launcher's.

    `model` is what servers load (folder or hub id), `trainer_command` the script with its arguments, without the
    interpreter. Raises ConfigError for what this version or these machines cannot run.
    """
    mode = AllocationMode.parse(config.allocation_mode)
    actor, rollout, watchdog = mode.train, mode.inference, config.watchdog
    if actor is None:
        raise ConfigError(f"allocation_mode {mode} has no trainer: add one, such as fsdp:d1")
    _check_roles(config, mode, actor)
    _check_backends(config, mode)
    _check_machine(config, mode, machines[0])
    takes_turns = mode.colocated or (isinstance(config, GRPOConfig) and config.rollout.max_head_offpolicyness == 0)
    (servers, ranks), models = place_processes(mode, machines), models_of_ranks(config)
    _check_reach(config, servers)
    num_servers, num_ranks = (Counter(place.node for place in side) for side in (servers, ranks))
    shares = [iter(share_cores(m.cores, num_servers[n], num_ranks[n], takes_turns)) for n, m in enumerate(machines)]
    common = {"AREALITE_HEARTBEAT_S": str(watchdog.heartbeat_s), "AREALITE_STALL_S": str(watchdog.stall_s)}
    common |= COMMON_ENV | ({"AREALITE_COLOCATED": "1"} if mode.colocated else {})
    processes = []
    for i, place in enumerate([*servers, *ranks]):
        machine, own_cores, rank = machines[place.node], next(shares[place.node]), i - len(servers)
        env = common | {"OMP_NUM_THREADS": str(len(own_cores))}
        if rank < 0:
            assert isinstance(config, GRPOConfig) and rollout is not None
            command, visible = server_command(config, rollout, model, machine), place.devices
            env |= server_env(config, rollout, own_cores, machine)
            process = ProcessPlan("server", i, command, ready_path="/health", restart="alone")
        else:
            process = ProcessPlan("trainer", rank, (sys.executable, *trainer_command), models=models[rank])
            beside = [other for other in ranks if other.node == place.node]
            # As torchrun does it: the ranks of a node see all of its trainer devices, LOCAL_RANK picks one.
            visible = tuple(gpu for other in beside for gpu in other.devices)
            env |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank - [r.node for r in ranks].index(place.node)),
                "MASTER_ADDR": HEAD,
            }
            env |= {"WORLD_SIZE": str(len(ranks)), "LOCAL_WORLD_SIZE": str(len(beside))}
            env |= GPU_RANK_ENV if machine.gpus else ALLOCATOR_ENV
            is_stage = any(trainer_dims(config, model_key).p > 1 for model_key in models[rank])
            env |= PIPELINE_ENV if machine.gpus and is_stage else {}
        env[VISIBLE_GPUS] = ",".join(visible)  # without GPUs too: the machine may have some all the same
        pinned = own_cores if config.launcher.pin_cores and not machine.gpus else ()
        env |= config.launcher.env
        processes.append(replace(process, env=env, cores=pinned, devices=place.devices, node=place.node, why=place.why))
    return Plan(str(mode), tuple(processes), mode.colocated, len(machines))


def _check_roles(config: RunConfig, mode: AllocationMode, actor: Component) -> None:
    """Refuses components that nothing would run on, and roles that cannot share devices so."""
    roles = {"critic": config.critic, "ref": config.ref} if isinstance(config, GRPOConfig) else {}
    if isinstance(config, GRPOConfig) and mode.inference is None:
        raise ConfigError(
            f"allocation_mode {mode} has no inference servers: GRPO needs servers and a trainer, such as"
            " native:d1+fsdp:d1 (separate devices) or native:d1|fsdp:d1 (shared)"
        )
    if not isinstance(config, GRPOConfig) and mode.inference is not None:
        raise ConfigError(
            f"allocation_mode {mode} has inference servers, which kind: {config.kind} does not use: allocate the"
            f" trainer alone, such as {actor}"
        )
    for component in mode.components:
        if component in (mode.inference, actor):
            continue
        if component.role == "inference" or roles.get(component.label) is None:
            known = f"; roles that can be named are {' and '.join(roles)}, where the configuration has them"
            raise ConfigError(f"allocation_mode {mode}: nothing would run on {component}{known if roles else ''}")
        group = next(group for group in mode.groups if component in group)
        if actor not in group and mode.inference in group:
            raise ConfigError(
                f"allocation_mode {mode}: {component} shares devices with servers, which take turns with {actor} alone:"
                f" give it devices of its own (+{component}), or let it share those of {actor}"
            )
        if actor not in group and component.engine_dims != group[0].engine_dims:
            raise ConfigError(
                f"allocation_mode {mode}: {component} and {group[0]} share devices and are cut differently, which only"
                f" those can that share the devices of {actor}: give both the same dimensions, or join them by '+'"
            )


def _check_backends(config: RunConfig, mode: AllocationMode) -> None:
    """Refuses what a backend cannot do, whatever the machine."""
    for component in mode.components:
        if component.backend not in SUPPORTED:
            same_role = [b for b in SUPPORTED if Component(b, component.dims).role == component.role]
            raise ConfigError(
                f"allocation_mode: this version cannot run {component.backend}; for {component.role} it has"
                f" {' and '.join(same_role)}"
            )
        wide = {
            k: n for k, n in asdict(component.dims).items() if n > 1 and k not in "d" + SUPPORTED[component.backend]
        }
        if wide:
            what = ", ".join(f"{DIMENSIONS[k]} parallelism ({k}{n})" for k, n in wide.items())
            raise ConfigError(
                f"allocation_mode: {component.backend} has no {what} in this version; use"
                f" {component.backend}:d{component.world_size}"
            )
        if (ffn := component.ffn) is not None and ffn.t > 1:
            wider = replace(component, ffn=replace(ffn, t=1, d=ffn.d * ffn.t))
            raise ConfigError(
                f"allocation_mode: {component} cuts every expert into t{ffn.t}, and here experts stay whole:"
                f" they go to ranks by e alone, and tokens to them. Use t1 for ffn, such as {wider}, or a larger e"
            )
    if (rollout := mode.inference) is not None and isinstance(config, GRPOConfig):
        reads_no_shm = config.weight_update == "shm" and rollout.backend == "sglang"
        if reads_no_shm or (config.weight_update == "distributed" and rollout.dims.p > 1):
            raise ConfigError(
                f"weight_update is {config.weight_update}, which {rollout} servers do not read: set weight_update=disk"
            )


def _check_machine(config: RunConfig, mode: AllocationMode, machine: Machine) -> None:
    """Refuses servers that this kind of machine cannot run."""
    rollout = mode.inference
    if rollout is not None and rollout.backend == "vllm":
        assert isinstance(config, GRPOConfig)
        _check_vllm(config, machine)
    if rollout is not None and not machine.gpus:
        if rollout.backend == "sglang":
            raise ConfigError(
                "sglang servers need GPUs and this machine has none: use native or vllm (to plan for another machine:"
                " arealite check ... cluster.num_gpus_per_node=8)"
            )
        if rollout.backend == "vllm" and rollout.dims.t > 1:
            raise ConfigError(f"vllm:t{rollout.dims.t} needs GPUs and this machine has none: use vllm:d1")


def _check_reach(config: RunConfig, servers: Sequence[Place]) -> None:
    """Refuses weights in memory where a server lies on another node than trainer rank 0, which writes them."""
    far = [f"server-{i} (node {place.node})" for i, place in enumerate(servers) if place.node]
    if far and isinstance(config, GRPOConfig) and config.weight_update == "shm":
        raise ConfigError(
            f"weight_update is shm, memory of the host of trainer-0 (node 0), which {listed(far)} cannot read: set"
            " weight_update=distributed, or disk where all nodes share cluster.fileroot"
        )


def _check_vllm(config: GRPOConfig, machine: Machine) -> None:
    """Raises ConfigError for what vLLM servers cannot do, or when there is no vLLM."""
    if not machine.vllm_python:
        raise ConfigError(
            "allocation_mode: no vLLM was found on this machine: `make vllm-cpu` builds one for CPUs; otherwise set"
            " AREALITE_VLLM_PYTHON to the Python interpreter of an environment that has vLLM"
        )
    g = config.gconfig
    if g.top_p < 1 or g.top_k > 0 or g.min_p > 0:
        raise ConfigError(
            "vLLM's logprobs are those after top_p, top_k and min_p, and the trainer's those of the full vocabulary:"
            " set gconfig.top_p=1 gconfig.top_k=-1 gconfig.min_p=0, or use another inference backend"
        )
    if config.server.deterministic and not machine.gpus:
        raise ConfigError("server.deterministic is true, which vLLM cannot do on CPUs: leave it out, or use native")


def server_command(config: GRPOConfig, rollout: Component, model: str, machine: Machine) -> tuple[str, ...]:
    """The words that start one server; PORT stands for its port."""
    server, dims, lora, backend = config.server, rollout.dims, config.actor.lora, rollout.backend
    running = server.max_running_requests or (None if machine.gpus else RUNNING_REQUESTS)  # on GPUs the server's own
    has_tokenizer = config.tokenizer_path not in (None, config.actor.path)
    tokenizer = resolve_model(str(config.tokenizer_path), asks_hub=False) if has_tokenizer else None
    values = (model, config.seed, server.context_length, running, tokenizer)
    options: dict[str, Any] = {"host": HOST, "port": PORT, "dtype": server.dtype}
    options |= dict(zip(NAMES[backend], values, strict=True))
    if backend == "native":
        options |= {"kv_cache_tokens": server.kv_cache_tokens}
        options |= {"weight_version": "0", "deterministic": server.deterministic}
    elif backend == "sglang":
        options |= {"max_total_tokens": server.kv_cache_tokens, "tp_size": dims.t, "pp_size": dims.p, "ep_size": dims.e}
        options |= {"enable_deterministic_inference": server.deterministic}
        if lora is not None:
            options |= {"enable_lora": True, "max_lora_rank": lora.rank, "lora_target_modules": lora.target_modules}
    else:
        options |= {"tensor_parallel_size": dims.t, "logprobs_mode": "processed_logprobs", "enable_scale_out": True}
        options |= {"worker_extension_cls": VLLM_WORKER_EXTENSION, "enable_prompt_tokens_details": True}
        options |= {"enforce_eager": not machine.gpus}  # compiling for the CPU takes a minute at each start
        if not machine.gpus or server.kv_cache_tokens:  # else it takes what is left of gpu_memory_utilization
            shape = ModelShape.read(model)
            num_bytes = UNKNOWN_KV_CACHE_BYTES if shape is None else kv_cache_bytes(config, shape)
            options |= {"kv_cache_memory_bytes": num_bytes}
        if lora is not None:
            max_rank = next((rank for rank in VLLM_LORA_RANKS if rank >= lora.rank), lora.rank)
            options |= {"enable_lora": True, "max_lora_rank": max_rank}
    python = machine.vllm_python if backend == "vllm" else sys.executable
    own = {key.lstrip("-").replace("-", "_"): value for key, value in server.args.items()}
    return (python, "-m", MODULES[backend], *flags({**options, **own}))


def server_env(config: GRPOConfig, rollout: Component, cores: tuple[int, ...], machine: Machine) -> dict[str, str]:
    """Environment variables of one server, beside those of every process of the run."""
    if rollout.backend == "sglang":
        # Its /health generates a token, which waits while generation is paused: the server would look dead then.
        return {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
    if rollout.backend != "vllm":
        return {}
    env = {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause generation and update weights
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": HOST,
    }
    checkout = Path(__file__).parents[2]
    if machine.vllm_python != sys.executable and checkout.name != "site-packages":
        env["PYTHONPATH"] = str(checkout)  # its workers run arealite/weights/vllm_worker.py
    if machine.gpus:
        return env | ({"VLLM_BATCH_INVARIANT": "1"} if config.server.deterministic else {})
    pinned = ",".join(map(str, cores)) if config.launcher.pin_cores else "nobind"
    return {**env, "VLLM_CPU_OMP_THREADS_BIND": pinned}


def flags(args: Mapping[str, Any]) -> list[str]:
    """A server's own flags: `{mem_fraction_static: 0.8, trust_remote_code: true}` as --key value and --key."""
    words: list[str] = []
    for key, value in args.items():
        if value is None or value is False:
            continue
        words.append("--" + key.lstrip("-").replace("_", "-"))
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words
