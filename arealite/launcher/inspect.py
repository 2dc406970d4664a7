"""What would stop a run, found within a second or two and before anything starts: data sets, models, tokenizers, and
whether trainer and servers can compute the architecture. Called by local.py and describe.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from arealite.api.cli_args import DatasetConfig, GRPOConfig, RunConfig
from arealite.api.config_rules import REASONING_GYM, lengths
from arealite.api.errors import ConfigError, DatasetError
from arealite.api.paths import is_local
from arealite.dataset.examples import check_row
from arealite.dataset.rows import task_of
from arealite.dataset.sources import read_rows
from arealite.models.fetch import resolve_model
from arealite.models.folder import TESTED, has_chat_template, model_fault, read_config, tokenizer_fault
from arealite.models.hub import find_on_hub

ROWS_READ = 1000  # whose columns are looked at; all are counted
TRIAL_LIMIT_S = 120.0


def inspect(config: RunConfig, starts: bool) -> tuple[str, dict[str, int]]:
    """The folder or hub id of the trained model, and the rows of each data set that is on this machine.

    `starts`: a run follows, so what is to be fetched has to be there to be fetched. Raises ConfigError with all that
    was found, one line each.
    """
    problems: list[str] = []
    found = {key: _find(key, path, starts, problems) for key, path in _model_paths(config).items()}
    tokenizer = found["tokenizer_path"]
    sources = {"train_dataset": config.train_dataset, "valid_dataset": config.valid_dataset}
    rows: dict[str, int] = {}
    for key, source in sources.items():
        if source is None:
            continue
        try:
            if source.path.startswith(REASONING_GYM):
                count_rows(replace(source, num_rows=1), config, True)
                rows[key] = source.num_rows or 0
            elif is_local(source.path):
                rows[key] = count_rows(source, config, has_chat_template(tokenizer))
            elif starts:
                find_on_hub(source.path, "dataset")
        except DatasetError as error:
            problems.append(f"{key}: {error}")
    key, _ = config.trained
    model = found[f"{key}.path"]
    if not problems and Path(model).is_dir():
        problems += _uncomputable(key, model, config)
    if problems:
        num = len(problems)
        raise ConfigError(f"{num} reason{'s' * (num != 1)} why this cannot run:\n  " + "\n  ".join(problems))
    return model, rows


def warnings(config: RunConfig, rows: dict[str, int]) -> Iterator[str]:
    """What is probably not meant, although it runs."""
    batch, num_rows = config.train_dataset.batch_size, rows.get("train_dataset", 0)
    if 0 < num_rows < batch:
        yield (
            f"train_dataset.batch_size ({batch}) is above the number of rows ({num_rows}), so each step takes rows"
            f" several times: lower it, or give more data"
        )


def count_rows(source: DatasetConfig, config: RunConfig, chat: bool) -> int:
    """Rows of a data set. Raises DatasetError when there is none, or one of the first is not what the run needs."""
    num_rows = 0
    for num_rows, row in enumerate(read_rows(source, config.seed), start=1):
        if num_rows > ROWS_READ:
            continue
        if isinstance(config, GRPOConfig):
            task_of(row, source, chat)
        else:
            check_row(row, source, config.kind)
    if not num_rows:
        raise DatasetError(f"data set {source.path!r} has no rows: check path, split and num_rows")
    return num_rows


def _model_paths(config: RunConfig) -> dict[str, str]:
    """All that has to be a model, and the tokenizer, by their keys."""
    key, trained = config.trained
    paths = {f"{key}.path": trained.path, "tokenizer_path": config.tokenizer_path or trained.path}
    if isinstance(config, GRPOConfig):
        others = {"ref.path": config.ref, "critic.path": config.critic}
        paths |= {name: other.path for name, other in others.items() if other is not None}
    return paths


def _find(key: str, path: str, starts: bool, problems: list[str]) -> str:
    """The folder or hub id that `path` is; what is wrong with it goes to `problems`."""
    try:
        found = resolve_model(path, asks_hub=starts)
        fault = tokenizer_fault if key == "tokenizer_path" else model_fault
        said = fault(found) if is_local(found) else ""
    except DatasetError as error:
        found, said = path, str(error) if starts or is_local(path) else ""
    if said and not any(path in problem for problem in problems):
        problems.append(f"{key}: {path} {said}" if path not in said else f"{key}: {said}")
    return found


def _uncomputable(key: str, model: str, config: RunConfig) -> list[str]:
    """Why trainer or servers would refuse the model; asked of their own code where the architecture is untested."""
    settings = read_config(Path(model))
    server = config.server if isinstance(config, GRPOConfig) and "native" in config.allocation_mode else None
    context, limit = (server.context_length if server else None) or 0, settings.get("max_position_embeddings")
    if isinstance(limit, int) and context > limit:
        return [f"server.context_length ({context}) is above what {model} can read, {limit} tokens: lower it"]
    if isinstance(limit, int) and isinstance(config, GRPOConfig) and config.server.context_length is None:
        problems = list(lengths(config, limit))
        if problems:
            return problems
    if settings["model_type"] in TESTED:
        return []
    command = [sys.executable, "-m", "arealite.prove.trial", model, config.kind]
    command += [server.dtype] if server else []
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return []  # they will tell themselves
    return [f"{key}.path: {ran.stdout.strip()}"] if ran.returncode == 2 else []
