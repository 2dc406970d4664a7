"""Pickles that clients send, read without running anything of theirs: a short list of names, rebuilt by code of ours.

Called by control.py for weights and adapters in request bodies. Payloads made by SGLang's clients load without SGLang.
"""

from __future__ import annotations

import base64
import binascii
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch

from arealite.api.errors import RequestError
from arealite.api.types import TensorSlot
from arealite.inference.bodies import field, of_type, shown
from arealite.weights.buckets import cut

# Python's own unpickler, because the C one allocates whatever index a memo opcode names.
_PythonUnpickler: Any = pickle._Unpickler
_RECORDS = {
    ("types", "SimpleNamespace"),
    ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"),
    ("sglang.srt.model_executor.model_runner", "LocalSerializedTensor"),
    ("sglang.srt.model_executor.model_runner_components.weight_updater", "LocalSerializedTensor"),
}
_ZIP_MARK = b"PK"


def unpickle_text(name: str, text: Any) -> Any:
    """The object in a base64 pickle; `name` is what errors call it.

    Raises:
        RequestError: it is none, or it names anything outside of the list.
    """
    try:
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name}: not base64: {error}") from error
    if raw is None:
        raise RequestError(f"{name}: expected a string, a base64 pickle; found {type(text).__name__}")
    return unpickle(name, raw)


def unpickle(name: str, raw: bytes) -> Any:
    """As unpickle_text, of the bytes themselves."""
    try:
        return _SafeUnpickler(raw).load()
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from error
    except Exception as error:  # boundary: hostile bytes make pickle and torch raise anything
        raise RequestError(f"{name}: not a pickle of tensors ({type(error).__name__}: {str(error)[:200]})") from error


def load_format(body: dict[str, Any]) -> str | None:
    """How the tensors of a call are laid out: None or "direct" one by one, or "flattened_bucket"."""
    found = field(body, "load_format", str, None)
    if found not in (None, "direct", "flattened_bucket"):
        raise RequestError(f"load_format: expected null, direct or flattened_bucket; found {shown(found)}")
    return found


def tensor_reader(body: dict[str, Any]) -> Callable[[], list[tuple[str, torch.Tensor]]]:
    """Reads the pickled tensors of a body, when it is called. Raises RequestError, as what it returns does."""
    layout = load_format(body)
    payloads = of_type("serialized_named_tensors", body.get("serialized_named_tensors"), list)
    if len(payloads) != 1:
        raise RequestError(f"serialized_named_tensors: expected one, for the one rank here; found {len(payloads)}")
    name = "serialized_named_tensors[0]"
    return lambda: named_tensors(name, unpickle_text(name, payloads[0]), layout)


def named_tensors(name: str, payload: Any, load_format: str | None) -> list[tuple[str, torch.Tensor]]:
    """What an unpickled payload holds: (tensor name, tensor), in order. `load_format` None or "direct": a list of such
    pairs, or a mapping; "flattened_bucket": flattened_tensor (uint8 [N]) and metadata.

    Raises:
        RequestError: the payload is something else.
        WeightSyncError: a bucket's layout does not fit its bytes.
    """
    if load_format == "flattened_bucket":
        flat, layout = (payload.get(k) if isinstance(payload, dict) else None for k in ("flattened_tensor", "metadata"))
        if not isinstance(flat, torch.Tensor) or flat.dim() != 1 or not isinstance(layout, list | tuple):
            raise RequestError(f"{name}: expected flattened_tensor, a tensor of bytes, and metadata, a list")
        raw = flat.contiguous().view(torch.uint8)
        slots = [_slot(f"{name}.metadata[{i}]", entry) for i, entry in enumerate(layout)]
        return [(slot.name, cut(raw, slot)) for slot in slots]
    pairs = list(payload.items()) if isinstance(payload, dict) else payload
    if not isinstance(pairs, list | tuple):
        raise RequestError(f"{name}: expected a list of (name, tensor); found {type(payload).__name__}")
    return [_pair(f"{name}[{i}]", pair) for i, pair in enumerate(pairs)]


def _pair(name: str, pair: Any) -> tuple[str, torch.Tensor]:
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise RequestError(f"{name}: expected a pair of name and tensor")
    tensor = pair[1]
    if isinstance(tensor, SimpleNamespace):  # one serialised tensor per rank, of which this server is the only one
        values = vars(tensor).get("values")
        first = values[0] if isinstance(values, list | tuple) and values else None
        tensor = unpickle(name, first) if isinstance(first, bytes) else unpickle_text(name, first)
    if not isinstance(tensor, torch.Tensor):
        raise RequestError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    return pair[0], tensor


def _slot(name: str, entry: Any) -> TensorSlot:
    fields = vars(entry) if isinstance(entry, SimpleNamespace) else {}
    tensor_name, shape, dtype = (fields.get(key) for key in ("name", "shape", "dtype"))
    start, end = fields.get("start_idx"), fields.get("end_idx")
    if (
        not isinstance(tensor_name, str)
        or not isinstance(dtype, torch.dtype)
        or not isinstance(shape, list | tuple)
        or not all(type(number) is int and number >= 0 for number in (start, end, *shape))
    ):
        raise RequestError(f"{name}: expected name, shape, dtype, start_idx and end_idx of a tensor")
    assert isinstance(start, int) and isinstance(end, int)
    return TensorSlot(tensor_name, str(dtype).removeprefix("torch."), tuple(shape), start, end - start)


class _Storage(NamedTuple):
    bytes: torch.UntypedStorage
    dtype: torch.dtype


class _SafeUnpickler(_PythonUnpickler):
    """Every name is one of ours or refused, and nothing but a record of ours can be given attributes."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        self._max_bytes = 2 * len(raw)  # of all copies that calls make: a pickle may name the same bytes many times
        self._record = type("Record", (SimpleNamespace,), {})  # of this pickle alone
        self._known: dict[tuple[str, str], Any] = {
            **dict.fromkeys(_RECORDS, self._record),
            ("collections", "OrderedDict"): OrderedDict,
            ("_codecs", "encode"): self._encode,
            ("torch", "Size"): torch.Size,
            ("torch.storage", "_load_from_bytes"): self._load_storage,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }

    def find_class(self, module: str, name: str) -> Any:
        known = self._known.get((module, name))
        if known is None and module == "torch" and isinstance(torch.__dict__.get(name), torch.dtype):
            known = torch.__dict__[name]
        if known is None:
            raise RequestError(f"the pickle names {module}.{name}, which a payload of tensors has no use for")
        return known

    def persistent_load(self, _: Any) -> Any:
        raise RequestError("the pickle refers to something outside of it (a persistent id); expected plain tensors")

    def load_build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if type(instance) is OrderedDict:  # a state_dict; what stands beside its entries is of no interest
            return
        if type(instance) is not self._record or not isinstance(state, dict):
            raise RequestError(f"the pickle sets attributes of {type(instance).__name__}, which is not allowed")
        vars(instance).update(state)

    dispatch[pickle.BUILD[0]] = load_build

    def _spend(self, num_bytes: int) -> None:
        self._max_bytes -= num_bytes
        if self._max_bytes < 0:
            raise RequestError("the pickle makes more bytes than it has")

    def _encode(self, text: str, encoding: str) -> bytes:
        """How the oldest protocols write bytes."""
        self._spend(len(text))
        return str.encode(text, {"latin1": "latin1"}[encoding])

    def _load_storage(self, raw: Any) -> _Storage:
        """What torch itself pickles for a storage: torch.save's older format. The newer one, a zip, may inflate."""
        self._spend(len(raw))
        if type(raw) is not bytes or raw[:2] == _ZIP_MARK:
            raise RequestError("a storage of the pickle is not in the form that torch gives it")
        loaded = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        if not isinstance(loaded, torch.storage.TypedStorage) or loaded._untyped_storage.nbytes() > len(raw):
            raise RequestError(f"a storage of the pickle is {type(loaded).__name__}, or longer than its bytes")
        return _Storage(loaded._untyped_storage, loaded.dtype)


def _rebuild_tensor(
    storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
) -> torch.Tensor:
    """torch's own would let a tensor grow its storage, or repeat one element without end."""
    num, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        num, last = num * length, last + (length - 1) * step
    room = storage.bytes.nbytes() // storage.dtype.itemsize
    numbers = (offset, *size, *stride)
    if not all(type(n) is int and n >= 0 for n in numbers) or num > room or (num and last >= room):
        raise RequestError(f"a tensor of size {shown(size)}, stride {shown(stride)} has {room} elements in its storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage.bytes, offset, tuple(size), tuple(stride))


def _rebuild_parameter(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    return tensor
