"""Reads rows, as they stand, from local JSONL / Parquet files or saved data sets, the hub, or reasoning_gym, whose own
verifier gives the reward of its tasks.

Called by dataset/rows.py. Every row comes with the words that an error message needs to find it again.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from arealite.api.cli_args import DatasetConfig
from arealite.api.config_rules import REASONING_GYM
from arealite.api.errors import DatasetError
from arealite.api.paths import is_local
from arealite.dataset.catalog import CatalogEntry, entry_of, mapped, verifier_of
from arealite.models.folder import find_on_hub

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".parquet")
SAVED_MARKS = ("state.json", "dataset_dict.json")  # in a folder that datasets' save_to_disk wrote


@dataclass(frozen=True)
class Row:
    """One row: `number` counts from 0 over its data set, `where` is "file:line" or "file row n"; `verifier`: what
    grades answers to it, by name, "" if nothing says so; `prefix` tells its id from those of other data sets."""

    number: int
    where: str
    values: dict[str, Any]
    verifier: str = ""
    prefix: str = ""

    @property
    def id(self) -> str:
        return f"{self.prefix}r{self.number}"


@dataclass(frozen=True)
class DatasetPart:
    """One data set, or one level of its curriculum: `prefix` begins the ids of its rows, `source` is its name."""

    source: str
    prefix: str
    config: DatasetConfig


def parts_of(config: DatasetConfig) -> list[DatasetPart]:
    """All that `config` names, in order. Raises DatasetError: a curriculum that there is not."""
    parts = []
    for number, (name, own) in enumerate((config.mixture or {"": config}).items()):
        mark = f"s{number}" if name else ""
        if own.curriculum is None:
            parts.append(DatasetPart(name or own.path, f"{mark}-" if mark else "", own))
        else:
            levels = curriculum_levels(own)
            parts += [DatasetPart(name or own.path, f"{mark}l{level}-", each) for level, each in enumerate(levels)]
    return parts


def read_rows(config: DatasetConfig, seed: int, skipped: list[str] | None = None, prefix: str = "") -> Iterator[Row]:
    """The first `num_rows` rows of one data set, in its own order; their ids begin with `prefix`. What is wrong with
    malformed ones goes to `skipped` where `malformed_rows` is skip. Raises DatasetError."""
    entry = entry_of(config.path)
    columns = config.columns or (entry.columns if entry else {})
    for number, (where, values) in enumerate(islice(_found(config, entry, seed), config.num_rows)):
        fault = values if isinstance(values, DatasetError) else None
        if fault is None and not isinstance(values, dict):
            fault = DatasetError(f"{where}: found {type(values).__name__}, expected one mapping of columns per row")
        if fault is None:
            try:
                named = mapped(values, columns, entry.left_out if entry else ()) if columns else values
            except LookupError as error:
                whose = "columns" if config.columns else f"{config.path}, as {entry.hub if entry else ''},"
                fault = DatasetError(f"{where}: {whose} wants a column that is not there: {error.args[0]}")
        if fault is None:
            yield Row(number, where, named, verifier_of(config.path, values), prefix)
        elif config.malformed_rows == "refuse":
            raise fault
        elif skipped is not None:
            skipped.append(str(fault))


def _found(config: DatasetConfig, entry: CatalogEntry | None, seed: int) -> Iterator[tuple[str, Any]]:
    """Where each row is, and the row; or the DatasetError that says why it cannot be read."""
    path = Path(config.path)
    if config.path.startswith(REASONING_GYM):
        return generated_rows(config, seed)
    if path.is_dir() and entry is not None and not any((path / name).is_file() for name in SAVED_MARKS):
        return copied_rows(path, config, entry)
    if path.exists():
        return local_rows(path, config.split)
    if is_local(config.path):
        raise DatasetError(f"data set {config.path!r} does not exist: give a JSONL / Parquet file or a folder of them")
    return hub_rows(config, entry)


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
                fault = f"not JSON ({error.msg}, column {error.colno}): mend the line"
            except UnicodeDecodeError as error:
                fault = f"not UTF-8 ({error.reason}, byte {error.start}): convert the file"
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
                fault = f"cannot be read ({str(error)[:80]}): mend the line"
            else:
                continue
            yield where, DatasetError(f"{where}: {fault}")


def parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            rows = (values for batch in table.iter_batches() for values in batch.to_pylist())
            yield from ((f"{file} row {number}", values) for number, values in enumerate(rows))
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
    yield from ((f"{folder} row {number}", values) for number, values in enumerate(rows))


def copied_rows(folder: Path, config: DatasetConfig, entry: CatalogEntry) -> Iterator[tuple[str, Any]]:
    """Rows of a local copy of a known data set, in the hub's layout."""
    split, subset = entry.split(config.split), config.subset or entry.subset
    if entry.files:
        for file in sorted(folder.glob(entry.files)):
            yield from jsonl_rows(file)
        return
    where = {"data_dir": subset} if subset and (folder / subset).is_dir() else {}
    yield from _loaded(f"{folder} (split {split})", str(folder), split=split, **where)


def hub_rows(config: DatasetConfig, entry: CatalogEntry | None) -> Iterator[tuple[str, Any]]:
    """Rows of the hub's copy, also of those in its cache."""
    if entry is None:
        path, subset, split = config.path, config.subset, config.split
    else:
        path, subset, split = entry.hub, config.subset or entry.subset, entry.split(config.split)
    find_on_hub(path, "dataset")
    named = f"{path} (subset {subset}, split {split})"
    if entry is not None and entry.files:  # its script is not run
        yield from _loaded(named, "json", data_files=f"hf://datasets/{path}/{entry.files}", split="train")
    else:
        yield from _loaded(named, path, subset, split=split)


def _loaded(named: str, *place: str | None, **options: Any) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(*place, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DatasetError(
            f"data set {named} is neither a local file or folder nor found on the hub: {str(error).strip()[:500]}."
            " Check path, subset and split, and the network"
        ) from None
    yield from ((f"{named} row {number}", values) for number, values in enumerate(rows))


def generated_rows(config: DatasetConfig, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """`num_rows` generated tasks. `params` are the task's own parameters; its seed follows from `seed` and the split,
    so that train and test draw different problems. Raises DatasetError: unknown task, parameters it does not take."""
    size = config.num_rows
    if size is None:
        raise DatasetError(f"{config.path} makes as many tasks as asked for: set num_rows")
    # Task i is drawn from seed + i, so neighbouring seeds would share all tasks but one: spread them out.
    spread = zlib.crc32(f"{seed}/{config.split}".encode())
    recipe = {"name": config.path.removeprefix(REASONING_GYM), "size": size, "seed": spread} | config.params
    tasks = generator(json.dumps(recipe, sort_keys=True))
    for index in range(size):
        entry = tasks[index]
        answer = entry.get("answer")
        values = {"question": entry["question"], "answer": "" if answer is None else str(answer)}
        yield f"{config.path} task {index}", values | {"reasoning_gym": recipe | {"index": index}}


def curriculum_levels(config: DatasetConfig) -> list[DatasetConfig]:
    """`config` at each level of its task's curriculum, easiest first. What `params` say stays so at every level. Levels
    that are like an earlier one are left out; so are, with a warning, those that the task itself refuses.

    Raises DatasetError: there is no curriculum, or no level is left.
    """
    name = config.path.removeprefix(REASONING_GYM)
    reasoning_gym = _reasoning_gym()
    if name == config.path or not reasoning_gym.factory.has_curriculum(name):
        raise DatasetError(f"{config.path} has no curriculum: only tasks of {REASONING_GYM} do; leave curriculum out")
    curriculum = reasoning_gym.factory.create_curriculum(name)
    attributes = curriculum.attributes.values()
    levels: list[DatasetConfig] = []
    for level in range(max(len(attribute.levels) for attribute in attributes)):
        curriculum.set_global_level(level)
        made = vars(curriculum.generate_configuration())
        named = {key: made[key] for attribute in attributes for key in _fields_of(attribute)}
        params = named | config.params
        if any(params == each.params for each in levels):
            continue
        try:
            generator(json.dumps({"name": name, "size": 1, "seed": 0} | params, sort_keys=True))
        except DatasetError as error:
            logger.warning("level %d of the curriculum of %s is left out: %s", level, config.path, error)
            continue
        levels.append(replace(config, params=params))
    if not levels:
        raise DatasetError(f"no level of the curriculum of {config.path} can be made: set the parameters that it lacks")
    return levels


def _fields_of(attribute: Any) -> list[str]:
    """The parameters that an attribute of a curriculum sets: one, or the ends of a range."""
    names = ("field_name", "lower_field_name", "upper_field_name")
    return [vars(attribute)[name] for name in names if vars(attribute).get(name)]


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.composite
        import reasoning_gym.factory
    except ImportError:
        raise DatasetError(f"{REASONING_GYM} tasks need the package: pip install 'arealite[quickstart]'") from None
    return reasoning_gym


@lru_cache(maxsize=8)
def generator(recipe: str) -> Any:
    """The task generator of a JSON recipe {name, size, seed, parameters}; one per process and recipe."""
    reasoning_gym = _reasoning_gym()
    parameters = json.loads(recipe)
    name = parameters.pop("name")
    try:
        if name == "composite":  # a mixture of tasks: its parts are records in the package, mappings in JSON and YAML
            parts = parameters.get("datasets", [])
            parameters["datasets"] = [
                reasoning_gym.composite.DatasetSpec(**({"weight": 1.0, "config": {}} | part)) for part in parts
            ]
        return reasoning_gym.create_dataset(name, **parameters)
    except (ValueError, TypeError, AssertionError) as error:
        raise DatasetError(f"reasoning_gym cannot make task {name!r} with {parameters}: {error}") from None


def reasoning_gym_reward(
    prompt: str,
    completion: str,
    prompt_ids: list[int],
    completion_ids: list[int],
    *,
    reasoning_gym: dict[str, Any],
    answer: str = "",
) -> float:
    """The verifier's score, 0 .. 1, of the text in <answer> tags, or of the whole completion without tags.

    `reasoning_gym` is the task's extra of that name: it regenerates the very entry, since entries hold values that
    do not survive JSON.
    """
    from reasoning_gym.utils import extract_answer

    recipe = {key: value for key, value in reasoning_gym.items() if key != "index"}
    tasks = generator(json.dumps(recipe, sort_keys=True))
    given = extract_answer(completion)
    return float(tasks.score_answer(completion.strip() if given is None else given, tasks[reasoning_gym["index"]]))
