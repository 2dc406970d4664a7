"""A server's end of a weight link: read the tensors that a WeightUpdateMeta describes (trainer's end: link.py).

Called by the built-in server and by vllm_worker.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from arealite.api.errors import WeightSyncError
from arealite.api.types import WeightUpdateMeta
from arealite.weights.wire import cut

MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it


def iterate_tensors(meta: WeightUpdateMeta) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, CPU tensor in the wire dtype).

    A tensor from shared memory is a view that is valid until the trainer publishes the next version: copy it.

    Raises:
        WeightSyncError: nothing is there, or it is shorter than its description.
    """
    if meta.kind == "shm":
        memory = _map(meta)
        yield from ((slot.name, cut(memory, slot)) for slot in meta.slots)
        return
    files = sorted(Path(meta.path).glob("*.safetensors"))
    if not files:
        raise WeightSyncError(f"no *.safetensors file in {meta.path}; expected a Hugging Face model folder")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightSyncError(f"{path} is not a whole safetensors file: {error}") from error


def _map(meta: WeightUpdateMeta) -> torch.Tensor:
    """uint8 [bytes], the trainer's own pages."""
    end = max((slot.offset + slot.nbytes for slot in meta.slots), default=0)
    try:
        with open(meta.path, "rb") as file:
            size = file.seek(0, 2)
            # A private map is writable, as torch wants it, and still shares the trainer's pages.
            view = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else None
    except OSError as error:
        raise WeightSyncError(
            f"cannot map the trainer's weights at {meta.path}: {error}; shared memory needs trainer and server on one"
            " host and under one user, otherwise set weight_update: disk"
        ) from error
    if view is None or end > size:
        raise WeightSyncError(f"{meta.path} holds {size} bytes, the update describes {end}; publish the weights again")
    with suppress(OSError):  # an older kernel: then the first copy meets each page
        view.madvise(MADV_POPULATE_READ)
    return torch.frombuffer(view, dtype=torch.uint8)
