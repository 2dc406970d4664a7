"""Files and folders that appear whole or not at all. Called by everything that writes what another process, or the
next life of a run, reads.

What a kill leaves is hidden: its name begins with one of the prefixes below, and `clean_folder` removes it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

PARTIAL, REPLACED, REMOVED = ".partial-", ".replaced-", ".removed-"


def sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write `path` so that a reader sees the old content or the new, never a part; `durable` waits for the disk, so
    that this holds through a power cut. Makes the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        # Half a surrogate pair is no character; backslashreplace writes what JSON reads back as the same.
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as out:
            out.write(text)
            out.flush()
            if durable:
                os.fsync(out.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def finite_json(value: Any) -> Any:
    """`value` with every NaN and infinity inside replaced by None, and numpy numbers by Python's: valid JSON."""
    if isinstance(value, dict):
        return {str(k): finite_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON document for people to read. Raises OSError."""
    write_text(path, json.dumps(finite_json(value), indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSONL. Raises OSError."""
    lines = [json.dumps(finite_json(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file written by `write_jsonl`; none when there is no such file."""
    if not path.is_file():
        return []
    # Not splitlines: a completion may hold line separators of Unicode, which JSON leaves as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def partial_name(final: Path) -> Path:
    """Where to build what is to become `final`: beside it, hidden."""
    return final.with_name(f"{PARTIAL}{final.name}")


def put_in_place(partial: Path, final: Path) -> None:
    """Rename a finished folder `partial` to `final`, in place of what is there. Raises OSError."""
    replaced = final.with_name(f"{REPLACED}{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A hidden folder to write into; at the end it takes the place of `final`. Raises OSError."""
    partial = partial_name(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    put_in_place(partial, final)


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill in between leaves no half of it under its name. Never raises OSError."""
    hidden = path.with_name(f"{REMOVED}{path.name}")
    try:
        path.rename(hidden)
    except OSError as error:
        logger.warning("cannot remove %s: %s", path, error)
        return
    shutil.rmtree(hidden, ignore_errors=True)


def clean_folder(parent: Path) -> None:
    """Remove what a kill left behind in `parent`; a folder that was being replaced gets its name back."""
    for replaced in parent.glob(f"{REPLACED}*"):
        final = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not final.exists():
            replaced.rename(final)
    for prefix in (PARTIAL, REPLACED, REMOVED):
        for leftover in parent.glob(f"{prefix}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
