"""The one file that knows kinds of devices: this process's accelerator, where it has one, behind torch.accelerator.

Called wherever something is placed, copied, waited for or asked of a device; all else asks whether a device `is_gpu`. A
kind that torch.accelerator knows needs no other file. `prove/dry_run.py` adds a kind without numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch
import torch.distributed as dist

from arealite.api.errors import ConfigError

CPU = torch.device("cpu")
WITHOUT_FLOAT64 = {"mps"}  # which sampling needs: such accelerators are left alone
# Kinds with what PyTorch has for no other: FlashAttention of packed rows, float32 products of bf16.
WITH_FLASH = {"cuda"}
OLDEST_GPU = (8, 0)  # compute capability: the first one with bf16
VISIBLE = "CUDA_VISIBLE_DEVICES"  # as launcher/machine.py has it, which imports no torch


def accelerator() -> torch.device | None:
    """The one that this process computes on; None: it has the CPU alone."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type in WITHOUT_FLOAT64:
        return None
    return torch.device(found.type, torch.accelerator.current_device_index())


def num_accelerators() -> int:
    """Those that this process sees."""
    return torch.accelerator.device_count() if accelerator() is not None else 0


def is_gpu(place: torch.device | torch.Tensor) -> bool:
    """Whether it is an accelerator, or is on one."""
    return (place if isinstance(place, torch.device) else place.device).type not in ("cpu", "meta")


def has_flash(x: torch.Tensor) -> bool:
    """Whether PyTorch has FlashAttention for `x`, and products with float32 results: not of float32."""
    return x.device.type in WITH_FLASH and x.dtype != torch.float32


def device_of(name: str | None) -> torch.device:
    """`name`, "cpu" or a kind with an index or without; this process's accelerator, else the CPU, where it is None.
    Raises ConfigError: there is none such."""
    here = accelerator()
    if name is None or name == "cpu":
        return CPU if name or here is None else here
    found, num = None, num_accelerators()
    with suppress(RuntimeError):  # no kind of device at all
        found = torch.device(name)
    if found is None or here is None or found.type != here.type or (found.index or 0) >= num:
        kind = "accelerators" if here is None else f"{here.type} devices"
        raise ConfigError(f"--device is {name}, and {num} {kind} are found here: use --device cpu, or leave it out")
    return found


def device_of_rank(index: int) -> torch.device:
    """Of the `index`-th rank of this machine; the CPU where there are no accelerators. Raises ConfigError: there are
    fewer."""
    here, num_visible = accelerator(), num_accelerators()
    if here is None:
        return CPU
    if index >= num_visible:
        raise ConfigError(
            f"rank {index} of this machine has no GPU of its own: {num_visible} visible"
            f" ({VISIBLE}: {os.environ.get(VISIBLE, 'not set')}). Give the trainer at most"
            f" {num_visible} ranks here, or make more GPUs visible"
        )
    return torch.device(here.type, index)


def use(device: torch.device) -> None:
    """What a thread that computes on an accelerator calls first. All sums of bf16 products are float32 from now on, so
    that server and trainer agree."""
    if is_gpu(device):
        torch.accelerator.set_device_index(device.index or 0)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def collective_backend(device: torch.device) -> str:
    """Of process groups for tensors there: gloo for the CPU, nccl for NVIDIA's, xccl for Intel's ..."""
    return str(dist.get_default_backend_for_device(device.type))


def compute_capability() -> tuple[int, int] | None:
    """Of an NVIDIA GPU; None: the accelerator is of another kind."""
    return None if torch.version.cuda is None or not torch.cuda.is_available() else torch.cuda.get_device_capability()


def name_of(device: torch.device) -> str:
    """As its maker calls it."""
    return "cpu" if not is_gpu(device) else str(torch.get_device_module(device).get_device_name(device))


# --- what it has been asked for, and when that is done


def wait_for(device: torch.device) -> None:
    """Until `device` has done what it was asked for; the CPU always has."""
    if is_gpu(device):
        torch.get_device_module(device).synchronize(device)


def wait_for_stream(device: torch.device) -> None:
    """The same, of what this thread's stream was asked for."""
    if is_gpu(device):
        torch.accelerator.current_stream(device).synchronize()


def marked(device: torch.device) -> torch.Event:
    """To be synchronized with: all that this thread's stream was asked for until now."""
    event = torch.Event(device)
    event.record()
    return event


@cache
def _side_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Work on a GPU beside what it is doing; done at the end."""
    stream = _side_stream(device)
    try:
        with stream:
            yield
    finally:
        stream.synchronize()


class Recorder:
    """Records work of a GPU that can be replayed without the host, as CUDA graphs with one memory among them."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._memory = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """What replays `compute`, and where its result is then. Raises RuntimeError: it cannot be recorded."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            compute()  # kernels are compiled, and workspaces taken
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads go on using the GPU meanwhile
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode=mode):
            result = compute()
        return graph.replay, result


# --- memory


def free_bytes(device: torch.device, enough: int = 1 << 62) -> int:
    """Free memory of an accelerator, 0 of the CPU; PyTorch gives back what it keeps where that is not `enough`."""
    if not is_gpu(device):
        return 0
    free, _ = _memory(device)
    if free < enough:
        torch.accelerator.empty_cache()
        free, _ = _memory(device)
    return free


def _memory(device: torch.device) -> tuple[int, int]:
    free, total = torch.get_device_module(device).mem_get_info(device)
    return int(free), int(total)


def give_back() -> None:
    """What PyTorch keeps of an accelerator's memory without using it; other processes get it."""
    if accelerator() is not None:
        torch.accelerator.empty_cache()


def sizes(device: torch.device) -> dict[str, int]:
    """Bytes of an accelerator's memory: needed at the peak, reserved, free, and of how many."""
    free, total = _memory(device)
    peak, reserved = torch.accelerator.max_memory_allocated(device), torch.accelerator.memory_reserved(device)
    return {"needed at the peak": peak, "reserved": reserved, "free": free, "of": total}


def pin(address: int, num_bytes: int) -> str:
    """Let the driver copy to and from this host memory by itself; empty if it does, else why not."""
    refused = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
    if not int(refused):
        return ""
    with suppress(RuntimeError):  # the refusal is held against the next kernel
        torch.zeros(1, device="cuda")
    return str(refused)


def unpin(address: int) -> None:
    """Once `pin` did it and nothing is under way."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


# --- random numbers


def random_state() -> torch.Tensor | None:
    """Of the accelerator's generator."""
    here = accelerator()
    state: torch.Tensor | None = None if here is None else torch.get_device_module(here).get_rng_state()
    return state


def set_random_state(state: torch.Tensor | None) -> None:
    """As `random_state` returned it, on a machine that may have none."""
    here = accelerator()
    if state is not None and here is not None:
        torch.get_device_module(here).set_rng_state(state)
