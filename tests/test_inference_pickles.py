"""Pickles from clients: tensors come out as they were sent, and nothing that a pickle names is ever run."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from arealite.api.errors import RequestError
from arealite.inference.pickles import named_tensors, unpickle


def storage_bytes(values: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(values.storage(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


class Calls:
    """Pickles as the call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.made = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.made


@pytest.mark.parametrize("protocol", range(2, 6))
def test_tensors_come_out_as_they_were_sent(protocol: int) -> None:
    grid = torch.randn(4, 6)
    kinds = [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.uint8]
    sent = [("grid", grid), ("part", grid.t()[1:3]), ("parameter", torch.nn.Parameter(grid)), ("empty", grid[:0])]
    sent += [("scalar", torch.tensor(2.0)), *((str(kind), (grid * 9).to(kind)) for kind in kinds)]
    found = named_tensors("x", unpickle("x", pickle.dumps(sent, protocol=protocol)), None)
    assert [name for name, _ in found] == [name for name, _ in sent]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for (_, a), (_, b) in zip(found, sent, strict=True))
    state = torch.nn.Linear(3, 2).state_dict()
    loaded = unpickle("x", pickle.dumps(state, protocol=protocol))
    assert type(loaded) is OrderedDict and torch.equal(loaded["weight"], state["weight"])


def test_classes_of_sglang_load_without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its clients write them: dataclasses of modules that do not exist here."""
    places = {
        "sglang.srt.weight_sync.tensor_bucket": "FlattenedTensorMetadata",
        "sglang.srt.model_executor.model_runner": "LocalSerializedTensor",
        "sglang.srt.model_executor.model_runner_components.weight_updater": "LocalSerializedTensor",
    }
    kinds = {}
    for module, name in places.items():
        for depth in range(1, module.count(".") + 2):
            part = ".".join(module.split(".")[:depth])
            monkeypatch.setitem(sys.modules, part, sys.modules.get(part, ModuleType(part)))
        kinds[module] = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, kinds[module])
    layout = kinds["sglang.srt.weight_sync.tensor_bucket"]()
    vars(layout).update(name="w", shape=torch.Size([3]), dtype=torch.bfloat16, start_idx=2, end_idx=8, numel=6)
    values = torch.tensor([0.0, 1.0, 2.0, 3.0]).bfloat16()
    bucket = pickle.dumps({"flattened_tensor": values.view(torch.uint8), "metadata": [layout]})
    wrapped = []
    for module in list(places)[1:]:
        one = kinds[module]()
        one.values = [pickle.dumps(values)]
        wrapped.append((module, one))
    raw = pickle.dumps(wrapped)
    for part in [p for p in sys.modules if p.partition(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, part)
    [(name, tensor)] = named_tensors("x", unpickle("x", bucket), "flattened_bucket")
    assert name == "w" and tensor.tolist() == [1.0, 2.0, 3.0]
    assert [t.tolist() for _, t in named_tensors("x", unpickle("x", raw), None)] == [[0.0, 1.0, 2.0, 3.0]] * 2


HOSTILE: dict[str, Any] = {
    "system": Calls(os.system, "true"),
    "eval": Calls(builtins.eval, "1"),
    "exec": Calls(builtins.exec, "1"),
    "getattr": Calls(getattr, torch.Size, "__class__"),
    "import": Calls(builtins.__import__, "os"),
    "torch_load": Calls(torch.load, "file"),
    "inner": [("w", torch.zeros(2)), ("x", Calls(os.getpid))],
    "partial": Calls(__import__("functools").partial, print),
    "module": Calls(__import__("importlib").import_module, "os"),
    "type": Calls(type, "X", (), {}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_not_in_the_list_is_refused_by_name(kind: str) -> None:
    with pytest.raises(RequestError, match=r"the pickle names [\w.]+"):
        unpickle("x", pickle.dumps(HOSTILE[kind]))


def executed(folder: Path) -> bytes:
    """A payload that leaves a file when it is run by a plain unpickler."""
    return pickle.dumps(Calls(os.mkdir, str(folder / "executed")))


RAW: dict[str, bytes] = {
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x0astorage.os\x93.",
    "dunder": b"\x80\x04\x8c\x05torch\x8c\x09__class__\x93.",
    "dtype_call": b"ctorch\nfloat32\n(tR.",
    "set_on_function": b"\x80\x04\x8c\x0ctorch._utils\x8c\x0f_rebuild_tensor\x93}\x8c\x01aK\x01sb.",
    "set_slots": b"\x80\x04\x8c\x05types\x8c\x0fSimpleNamespace\x93N}\x8c\x07__new__K\x01s\x86b.",
    "persistent": b"Pid\n.",
    "memo_bomb": b"\x80\x02N" + b"r" + struct.pack("<I", 2**32 - 1) + b"j" + struct.pack("<I", 7) + b".",
    "huge_bytes": b"\x80\x05\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "huge_bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.",
    "long_number": b"I" + b"9" * 100_000 + b"\n.",
    "extension": b"\x80\x02\x82\x01.",
    "underflow": b"\x80\x02R.",
    "empty": b"",
    "no_stop": b"\x80\x02N",
    "deep": b"(" * 100_000 + b".",
}


@pytest.mark.parametrize("kind", RAW)
def test_bytes_that_mean_harm_are_refused(kind: str) -> None:
    with pytest.raises(RequestError, match="^x: "):
        unpickle("x", RAW[kind])


def test_every_cut_and_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    whole = pickle.dumps([("w", torch.arange(3.0))]) + executed(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for end in range(0, len(whole), 7):
        flipped = bytearray(whole)
        at = int(torch.randint(len(whole), (1,), generator=generator))
        flipped[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        for raw in (whole[:end], bytes(flipped), executed(tmp_path)[end % 20 :]):
            try:
                unpickle("x", raw)
            except RequestError:
                continue
    assert not (tmp_path / "executed").exists()


def rebuilt(*arguments: Any) -> Calls:
    return Calls(torch._utils._rebuild_tensor_v2, *arguments)


def loaded(raw: bytes) -> Calls:
    return Calls(torch.storage._load_from_bytes, raw)


def zip_storage(size: int) -> bytes:
    """torch's newer format, compressed: a small file that inflates."""
    file = io.BytesIO()
    torch.save(torch.zeros(size).storage(), file)
    packed = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return packed.getvalue()


def test_tensors_that_are_not_what_they_say_are_refused(tmp_path: Path) -> None:
    four = storage_bytes(torch.zeros(4))
    claims = four.replace(b"K\x04Nt", b"J\xff\xff\xff\x7fNt")  # many more elements than there are bytes
    assert claims != four
    code = io.BytesIO()
    torch.save(Calls(os.mkdir, str(tmp_path / "executed")), code, _use_new_zipfile_serialization=False)
    bad = {
        "grown": rebuilt(loaded(four), 0, (2**40,), (1,), False, OrderedDict()),
        "repeated": rebuilt(loaded(four), 0, (2**40,), (0,), False, OrderedDict()),
        "outside": rebuilt(loaded(four), 3, (2,), (1,), False, OrderedDict()),
        "negative": rebuilt(loaded(four), 0, (2,), (-1,), False, OrderedDict()),
        "float": rebuilt(loaded(four), 0, (2.0,), (1,), False, OrderedDict()),
        "uneven": rebuilt(loaded(four), 0, (2, 2), (1,), False, OrderedDict()),
        "no_storage": rebuilt(b"1234", 0, (1,), (1,), False, OrderedDict()),
        "claims": loaded(claims),
        "cut": loaded(four[:-3]),
        "zip": loaded(zip_storage(1 << 16)),
        "code": loaded(code.getvalue()),
        "no_bytes": Calls(torch.storage._load_from_bytes, "text"),
    }
    for payload in bad.values():
        with pytest.raises(RequestError):
            unpickle("x", pickle.dumps(payload))
    assert not (tmp_path / "executed").exists()


def test_the_same_bytes_cannot_be_asked_for_again_and_again() -> None:
    """A short pickle would fill the memory."""
    own = storage_bytes(torch.zeros(4000))
    function = b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93\x94"
    raw = function + b"B" + struct.pack("<I", len(own)) + own + b"\x94" + b"h\x00h\x01\x85R" * 50 + b"."
    with pytest.raises(RequestError, match="more bytes than it has"):
        unpickle("x", raw)


def test_a_pickle_cannot_leave_anything_behind() -> None:
    unpickle("x", pickle.dumps(SimpleNamespace(name="w", __setstate__=3)))
    assert vars(unpickle("x", pickle.dumps(SimpleNamespace()))) == {}
    assert not vars(SimpleNamespace).get("name")
