"""Reads rows, as they stand, from local JSONL / Parquet files or saved data sets, the hub, or reasoning_gym.

Called by dataset/loader.py. Every row comes with the words that an error message needs to find it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from arealite.api.cli_args import DatasetConfig
from arealite.api.config_rules import REASONING_GYM
from arealite.api.errors import DatasetError
from arealite.api.paths import is_local
from arealite.dataset.reasoning_gym_source import generated_rows
from arealite.models.hub import find_on_hub

SUFFIXES = (".jsonl", ".parquet")
SAVED_MARKS = ("state.json", "dataset_dict.json")  # in a folder that datasets' save_to_disk wrote


@dataclass(frozen=True)
class Row:
    """One row: `number` counts from 0 over the whole source, `where` is "file:line" or "file row n"."""

    number: int
    where: str
    values: dict[str, Any]


def read_rows(config: DatasetConfig, seed: int) -> Iterator[Row]:
    """The first `num_rows` rows of the configured source, in its own order. Raises DatasetError."""
    if config.path.startswith(REASONING_GYM):
        found = generated_rows(config, seed)
    elif (path := Path(config.path)).exists():
        found = local_rows(path, config.split)
    elif is_local(config.path):
        raise DatasetError(f"data set {config.path!r} does not exist: give a JSONL / Parquet file or a folder of them")
    else:
        found = hub_rows(config)
    for number, (where, values) in enumerate(islice(found, config.num_rows)):
        if not isinstance(values, dict):
            raise DatasetError(f"{where}: found {type(values).__name__}, expected one mapping of columns per row")
        yield Row(number, where, values)


def local_rows(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Rows of one file, or of all JSONL and Parquet files directly in a folder, in the order of their names; or of a
    folder that save_to_disk wrote, of which `split` is read if it has splits."""
    if any((path / name).is_file() for name in SAVED_MARKS):
        yield from saved_rows(path, split)
        return
    files = [path]
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES and p.name[0] != "." and not p.is_dir()]
    if not files:
        raise DatasetError(f"{path} holds no {' or '.join(SUFFIXES)} file: give the folder that does")
    for file in files:
        if file.suffix == ".parquet":
            yield from parquet_rows(file)
        elif file.suffix == ".jsonl":
            yield from jsonl_rows(file)
        else:
            raise DatasetError(f"{file} ends in {file.suffix or 'nothing'!r}, expected {' or '.join(SUFFIXES)}")


def jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = file.open("rb")
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}") from None
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                raise DatasetError(f"{where}: not JSON ({error.msg}, column {error.colno}): mend the line") from None
            except UnicodeDecodeError as error:
                raise DatasetError(
                    f"{where}: not UTF-8 ({error.reason}, byte {error.start}): convert the file"
                ) from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
                raise DatasetError(f"{where}: cannot be read ({str(error)[:80]}): mend the line") from None


def parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches():
                for values in batch.to_pylist():
                    yield f"{file} row {number}", values
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:  # damaged pages come as OSError
        raise DatasetError(f"{file} is not a readable Parquet file: {error}") from None


def saved_rows(folder: Path, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DatasetError(f"{folder} is not readable as what save_to_disk writes: {str(error)[:500]}") from None
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise DatasetError(f"{folder} has no split {split!r}: set split to one of {', '.join(rows)}")
        rows = rows[split]
    for number, values in enumerate(rows):
        yield f"{folder} row {number}", values


def hub_rows(config: DatasetConfig) -> Iterator[tuple[str, Any]]:
    find_on_hub(config.path, "dataset")
    import datasets

    named = f"{config.path} (subset {config.subset}, split {config.split})"
    try:
        rows = datasets.load_dataset(config.path, config.subset, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DatasetError(
            f"data set {named} is neither a local file or folder nor found on the hub: {str(error).strip()[:500]}."
            " Check path, subset and split, and the network"
        ) from None
    for number, values in enumerate(rows):
        yield f"{named} row {number}", values
