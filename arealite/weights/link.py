"""The trainer's end of a weight link: put one version of the weights where servers can read it, or send it to them; and
check what they say they hold.

Called by the train engine's `upload_weights`; what both ends use is in wire.py.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from arealite import devices
from arealite.api.atomic import clean_folder, new_folder, remove_folder
from arealite.api.errors import ConfigError, WeightSyncError, listed
from arealite.api.types import TensorSlot, WeightUpdateMeta
from arealite.weights.wire import GroupSender, checksum, raw_bytes, slot_of, write_adapter, write_tensors

logger = logging.getLogger(__name__)

BUCKET_BYTES, GPU_BUCKET_BYTES = 64 << 20, 512 << 20  # of one broadcast, for which servers are called once each
ALIGNMENT = 64  # bytes; a cache line, and a multiple of every dtype's size
CHECKED_SHARE = 16  # one tensor in so many is confirmed at every version, and another one in so many by turns
NUM_VERSIONS_KEPT = 2
SERVED_NAME = "policy"  # what the trained adapter is called on the servers; one name: it is replaced in place
WEIGHT_UPDATES = ("shm", "disk", "distributed")


def is_checked(index: int, version: int) -> bool:
    """Whether the tensor of this position in the stream is confirmed by checksum at this version."""
    return index % CHECKED_SHARE in (0, version % CHECKED_SHARE)


class WeightLink(GroupSender):
    """One way from the trainer to all servers.

    `kind` "shm": an anonymous file in memory that servers of the same host map through /proc; it has no name, so
    nothing can be left behind however the trainer ends. `kind` "disk": Hugging Face safetensors under `folder`, on a
    file system that the servers share; the two newest versions are kept. `kind` "distributed": buckets that are
    broadcast in a process group, by NCCL from a GPU, by gloo from the CPU and where servers share the trainer's GPU, of
    which NCCL takes one process only. For these it is the WeightSender of the rollout engine.
    """

    def __init__(self, kind: str, folder: str | Path, bucket_bytes: int | None = None) -> None:
        if kind not in WEIGHT_UPDATES:
            raise ConfigError(f"weight_update is {kind!r}; expected one of {', '.join(WEIGHT_UPDATES)}")
        if kind == "shm" and not Path("/proc/self/fd").is_dir():
            raise ConfigError("weight_update: shm needs Linux (it maps memory through /proc); set weight_update: disk")
        is_shared = os.environ.get("AREALITE_COLOCATED") == "1"  # with servers
        on_gpu = kind == "shm" or (kind == "distributed" and not is_shared)
        self.device = (on_gpu and devices.accelerator()) or devices.CPU
        super().__init__(devices.collective_backend(self.device))
        self.kind = kind
        self.folder = Path(folder)
        self._segment = _Segment() if kind == "shm" else None
        usual = GPU_BUCKET_BYTES if devices.is_gpu(self.device) else BUCKET_BYTES
        self._buckets = Buckets(self.device, bucket_bytes or usual)

    def publish(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
        writer: bool = True,
        adapter: dict[str, Any] | None = None,
    ) -> WeightUpdateMeta | None:
        """Write all `tensors` (Hugging Face names, wire dtype) as `version`. `adapter`: the content of PEFT's
        adapter_config.json, when they are a LoRA adapter (PEFT's names); it becomes a folder, whatever the link's kind.

        Every rank iterates, because producing a tensor may be a collective call; only the writer keeps them and gets
        the description back.

        Raises:
            WeightSyncError: the shared memory or the folder has no room.
        """
        if not writer:
            for _ in tensors:
                pass
            return None
        try:
            if adapter is not None:
                return self._write_adapter(dict(tensors), version, adapter)
            if self._segment is not None:
                return self._segment.write(tensors, version)
            return self._write_folder(tensors, version) if self.kind == "disk" else self._fill_buckets(tensors, version)
        except (OSError, SafetensorError) as error:  # the latter, without a class of its own, on a full disk
            raise WeightSyncError(
                f"cannot write weights of version {version} by {self.kind}"
                f" ({self.folder if self.kind == 'disk' else 'memory'}): {error}; free room there,"
                " or choose the other weight_update"
            ) from error

    def send(self, bucket: int) -> None:
        """The bucket stays as it is until the next `publish`, so it may be sent again."""
        self.broadcast(self._buckets.bytes_of(bucket))

    def close(self) -> None:
        """Release the memory and leave the group; folders stay."""
        self.leave(waits=True)
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _fill_buckets(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> WeightUpdateMeta:
        checksums: dict[str, int] = {}
        for _ in self._buckets.fill(_checked(tensors, version, checksums)):
            pass
        starts = [0, *itertools.accumulate(map(len, self._buckets.slots))]
        slots = tuple(itertools.chain.from_iterable(self._buckets.slots))
        return WeightUpdateMeta("distributed", version, "", slots, checksums, tuple(itertools.pairwise(starts)))

    def _write_folder(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> WeightUpdateMeta:
        checksums: dict[str, int] = {}
        with self._new_version(version) as (partial, path):
            write_tensors(partial, _checked(tensors, version, checksums))
        return WeightUpdateMeta("disk", version, path, checksums=checksums)

    def _write_adapter(
        self, tensors: dict[str, torch.Tensor], version: int, settings: dict[str, Any]
    ) -> WeightUpdateMeta:
        """All of its tensors are confirmed: there are few bytes."""
        with self._new_version(version) as (partial, path):
            write_adapter(partial, tensors, settings)
        checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
        return WeightUpdateMeta("lora", version, path, checksums=checksums, adapter=SERVED_NAME)

    @contextmanager
    def _new_version(self, version: int) -> Iterator[tuple[Path, str]]:
        """A folder to write into, and the path that it gets at the end; then old versions go."""
        clean_folder(self.folder)
        final = self.folder / f"v{version:08d}"
        with new_folder(final) as partial:
            yield partial, str(final.resolve())
        for old in sorted(self.folder.glob("v*"))[:-NUM_VERSIONS_KEPT]:
            remove_folder(old)


def _checked(
    tensors: Iterable[tuple[str, torch.Tensor]], version: int, checksums: dict[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hands the tensors on, and notes the checksums of those that are confirmed at this version."""
    for index, (name, tensor) in enumerate(tensors):
        if is_checked(index, version):
            checksums[name] = checksum(tensor)
        yield name, tensor


class _Segment:
    """An anonymous memory file that grows to the size of the weights and is written anew at each version. From the
    second version on a GPU writes it by itself, where the driver lets the memory be pinned."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("arealite-weights")
        self._map: mmap.mmap | None = None
        self._size = self._num_written = self._num_pinned = 0
        self._may_pin = True

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> WeightUpdateMeta:
        slots: list[TensorSlot] = []
        offset = 0
        on_gpu = False
        for name, tensor in tensors:
            slot = slot_of(name, tensor, offset)
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            if devices.is_gpu(tensor) and not on_gpu:
                on_gpu = True
                self._pin()
            if tensor.nbytes:
                self._reserve(offset)
                self._bytes_of(slot).copy_(raw_bytes(tensor), non_blocking=offset <= self._num_pinned)
            slots.append(slot)
        if on_gpu:
            devices.wait_for(tensor.device)
        self._num_written = offset
        checksums = {s.name: checksum(self._bytes_of(s)) for i, s in enumerate(slots) if is_checked(i, version)}
        return WeightUpdateMeta("shm", version, f"/proc/{os.getpid()}/fd/{self._fd}", tuple(slots), checksums)

    def _bytes_of(self, slot: TensorSlot) -> torch.Tensor:
        if not slot.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        assert self._map is not None
        return torch.frombuffer(self._map, dtype=torch.uint8, count=slot.nbytes, offset=slot.offset)

    def _reserve(self, num_bytes: int) -> None:
        if num_bytes <= self._size:
            return
        self._unpin()
        # A tensor over an mmap keeps it open, so the map is replaced, never resized; doubling keeps that rare.
        self._size = max(num_bytes, 2 * self._size)
        os.ftruncate(self._fd, self._size)
        self._map = mmap.mmap(self._fd, self._size)

    def _pin(self) -> None:
        """Let the driver know what was written last, all of which has memory."""
        if self._num_pinned or not self._num_written or not self._may_pin:
            return
        assert self._map is not None
        address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
        refused = devices.pin(address, self._num_written)
        self._may_pin = not refused
        if self._may_pin:
            self._num_pinned = self._num_written
            return
        logger.info("the driver does not pin shared memory (%s): weights are copied through the CPU", refused)

    def _unpin(self) -> None:
        if self._num_pinned and self._map is not None:
            devices.unpin(torch.frombuffer(self._map, dtype=torch.uint8).data_ptr())
            self._num_pinned = 0

    def close(self) -> None:
        self._unpin()
        self._map = None
        os.close(self._fd)


class Buckets:
    """The newest version as a few runs of bytes on `device`. The memory is used again for the next version."""

    def __init__(self, device: torch.device, bucket_bytes: int) -> None:
        self.device = device
        self.slots: list[list[TensorSlot]] = []
        self._bucket_bytes = bucket_bytes
        self._flat: list[torch.Tensor] = []  # uint8 [bucket_bytes, or the bytes of the one tensor that is larger]

    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Take in all tensors, and hand each of them on. A bucket holds one dtype, end to end, so all are aligned."""
        self.slots = []
        newest: dict[torch.dtype, int] = {}
        for name, tensor in tensors:
            index = newest.get(tensor.dtype)
            if index is None or self._num_bytes(index) + tensor.nbytes > self._bucket_bytes:
                index = newest[tensor.dtype] = len(self.slots)
                self._make_room(index, tensor.nbytes)
                self.slots.append([])
            slot = slot_of(name, tensor, self._num_bytes(index))
            self._flat[index][slot.offset : slot.offset + slot.nbytes].copy_(raw_bytes(tensor))
            self.slots[index].append(slot)
            yield name, tensor
        del self._flat[len(self.slots) :]

    def bytes_of(self, index: int) -> torch.Tensor:
        """uint8 [bytes of the bucket's tensors]."""
        return self._flat[index][: self._num_bytes(index)]

    def _num_bytes(self, index: int) -> int:
        last = self.slots[index][-1:]
        return last[0].offset + last[0].nbytes if last else 0

    def _make_room(self, index: int, num_bytes: int) -> None:
        if index == len(self._flat) or len(self._flat[index]) < num_bytes:
            self._flat[index : index + 1] = [
                torch.empty(max(self._bucket_bytes, num_bytes), dtype=torch.uint8, device=self.device)
            ]


def verify(
    meta: WeightUpdateMeta,
    receipts: dict[str, dict[str, int]],
    previous: WeightUpdateMeta | None = None,
    must_differ: bool = False,
) -> None:
    """Every server's checksums equal the trainer's, and the update changed something where it had to.

    `receipts` maps server id to {tensor name: CRC-32 of the live parameter}. `must_differ`: an optimiser step lies
    between `previous` and `meta`, and its effect is no smaller than the rounding to the wire dtype.

    Raises:
        WeightSyncError: names the server and the tensors.
    """
    for server, confirmed in receipts.items():
        absent = [name for name in meta.checksums if name not in confirmed]
        if absent:
            raise WeightSyncError(
                f"{server} took weights of version {meta.version} without confirming {listed(absent)};"
                " expected the checksum of each"
            )
        wrong = [name for name, value in meta.checksums.items() if confirmed[name] != value]
        if wrong:
            raise WeightSyncError(
                f"{server} holds other weights than the trainer after the update to version {meta.version}:"
                f" {listed(wrong)} differ (CRC-32 {confirmed[wrong[0]]:08x}, trainer {meta.checksums[wrong[0]]:08x})."
                " Training on would be off-policy without anyone knowing; check weight names, dtype and server"
                " version"
            )
    if must_differ and previous is not None and (same := unchanged(meta, previous)):
        raise WeightSyncError(
            f"the update from version {previous.version} to {meta.version} changed nothing: {listed(list(same))} are"
            " the same bytes although the optimiser made a step that shows in the trainer's weights: the copy is stale"
        )


def unchanged(meta: WeightUpdateMeta, previous: WeightUpdateMeta) -> dict[str, int]:
    """{tensor: CRC-32} of those whose checksums both have, if all of them are the same; else none."""
    common = {name: meta.checksums[name] for name in sorted(meta.checksums.keys() & previous.checksums.keys())}
    return common if all(previous.checksums[name] == value for name, value in common.items()) else {}
