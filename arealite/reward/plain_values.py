"""Values as JSON that keeps Python's plain types: how arguments and results cross the line between a program and what
checks it. Decoding makes plain values only: nothing that the program made is ever run. Used on both sides of a sandbox.
"""

from __future__ import annotations

import collections
import collections.abc
import itertools
from typing import Any

MAX_DEPTH = 200  # of levels of nesting
MAX_YIELDED = 1_000_000  # values that an iterator is asked for
PLAIN: tuple[Any, ...] = (int, float, str, tuple, list, set)


def encode(value: Any, depth: int = 0) -> Any:
    """JSON of a plain value. Raises TypeError, or RecursionError at more than MAX_DEPTH levels."""
    if depth > MAX_DEPTH:
        raise RecursionError(f"the value is nested more than {MAX_DEPTH} deep")
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return {"int": hex(value)} if abs(value) > 2**53 else value
    if kind is float:
        return {"float": repr(value)}
    if kind is complex:
        return {"complex": [repr(value.real), repr(value.imag)]}
    if kind in (bytes, bytearray):
        return {"bytes": value.hex()}
    if kind is list:
        return [encode(entry, depth + 1) for entry in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(entry, depth + 1) for entry in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, depth + 1), encode(entry, depth + 1)] for key, entry in value.items()]}
    for base in PLAIN:  # subclasses: Counter, namedtuple, IntEnum ...
        if isinstance(value, base):
            return encode(base(value), depth + 1)
    if isinstance(value, collections.abc.Iterator | collections.deque | range):
        return encode(list(itertools.islice(value, MAX_YIELDED)), depth + 1)
    try:
        return encode(value.tolist(), depth + 1)  # numpy's
    except AttributeError:
        raise TypeError(f"{kind.__name__} is no plain value") from None


def decode(value: Any, depth: int = 0) -> Any:
    """The value again. Raises ValueError on anything that `encode` does not write."""
    if depth > 2 * MAX_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(value, list):
        return [decode(entry, depth + 1) for entry in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"{list(value)[:4]} is no value")
    [(kind, content)] = value.items()
    try:
        if kind == "int":
            return int(content, 16)
        if kind == "float":
            return float(content)
        if kind == "complex":
            return complex(float(content[0]), float(content[1]))
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind == "dict":
            return {decode(key, depth + 1): decode(entry, depth + 1) for key, entry in content}
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(entry, depth + 1) for entry in content)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{kind} of {str(content)[:100]} is no value") from error
