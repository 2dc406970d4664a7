"""What a run will be, in words, and what would stop it, found within a second or two and before anything starts: data
sets, models, tokenizers, whether trainer and servers can compute the architecture. `arealite check`, called by cli.py;
local.py inspects alike before it starts a run.
"""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from arealite.api.cli_args import DatasetConfig, GRPOConfig, RunConfig
from arealite.api.config_keys import explain
from arealite.api.config_rules import REASONING_GYM, datasets_of, lengths
from arealite.api.errors import ConfigError, DatasetError
from arealite.api.load_config import load_run_config, to_yaml
from arealite.api.paths import is_local
from arealite.dataset.catalog import described, hub_id
from arealite.dataset.examples import check_row
from arealite.dataset.rows import task_of
from arealite.dataset.sources import parts_of, read_rows
from arealite.kernels import build
from arealite.launcher.allocation import AllocationMode, trainer_dims
from arealite.launcher.dataflow import dataflow
from arealite.launcher.machine import Machine
from arealite.launcher.memory_estimate import COLOCATED_KV_SHARE, KV_SHARE, models_parts, server_parts
from arealite.launcher.plan import Plan, make_plan
from arealite.launcher.slurm import job_script
from arealite.models.fetch import MODELS, resolve_model
from arealite.models.folder import (
    TESTED,
    find_on_hub,
    has_chat_template,
    model_fault,
    read_config,
    tokenizer_fault,
)
from arealite.models.rank_memory import ModelShape
from arealite.observe.progress import terminal_width
from arealite.observe.run_folder import RunFolder

ROWS_READ = 1000  # whose columns are looked at; all are counted
TRIAL_LIMIT_S = 120.0
UNLIMITED = 1 << 20  # columns, where no terminal shows the output
MIN_ROOM = 30  # columns for the last cell of a row; where there are fewer it has lines of its own
AS_YAML = {"None": "null", "True": "true", "False": "false"}


def check(config_path: str, overrides: list[str], explained: bool, script: str = "SCRIPT") -> str:
    """The whole answer of `arealite check`, and of `arealite run --dry-run`. Raises ConfigError."""
    config = load_run_config(config_path, overrides)
    machine = Machine.described(config.cluster)
    model, rows = inspect(config, starts=False)
    nodes = [machine] * config.cluster.num_nodes
    command = [script, "--config", config_path, *overrides]
    plan = make_plan(config, nodes, model, command)
    width = (terminal_width() or UNLIMITED) - 2
    settings = to_yaml(config, min(width, 120)).splitlines()
    if explained:
        docs = [(key, f"{AS_YAML.get(str(value), value)}  ({doc})") for key, value, doc in explain(config)]
        settings = table(docs, width)
    num_bytes = amount(machine.memory_bytes)
    facts = [
        ("folder", str(RunFolder.of(config).root)),
        ("model", f"{model} ({note_on(model)})"),
        *([("nodes", f"{len(nodes)}, each as the next line")] if nodes[1:] else []),
        ("machine", f"{machine.name}: {len(machine.cores)} cores, {len(machine.gpus)} GPUs, {num_bytes} available"),
        *([] if machine.gpus else [("CPU kernels", build.expectation())]),
        ("wiring", f"{plan.allocation}: {wiring(plan, config)}"),
        *(("data", line) for line in sources_told(config, rows)),
        ("steps", steps(config, rows.get("train_dataset"))),
        *([("staleness", staleness(config))] if isinstance(config, GRPOConfig) else []),
        *(("WARNING", warning) for warning in warnings(config, rows)),
    ]
    sections = {
        "CONFIGURATION": settings,
        "RUN": table(facts, width),
        "PROCESSES": table(process_rows(plan), width),
        "WHERE, AND WHY THERE": table([(p.name, f"node {p.node}", p.why) for p in plan.processes], width),
        **({"DATAFLOW": table(dataflow(config), width)} if isinstance(config, GRPOConfig) else {}),
        "MEMORY (estimated peaks, meant to be within 20%)": memory(plan, config, machine, width),
    }
    if config.launcher.type == "slurm":
        sections["JOB"] = job_script(config, RunFolder.of(config), plan, command).splitlines()
    return "\n\n".join("\n".join([title, *indented(lines)]) for title, lines in sections.items())


def sources_told(config: RunConfig, rows: dict[str, int]) -> Iterator[str]:
    """What each data set is: where it lies, its columns, rows and verifier."""
    for name, source in datasets_of(config):
        share = "" if source.weight is None else f"; weight {source.weight:g}"
        known = f"; {rows[name]} rows" if name in rows else ""
        what = f"a mixture of {', '.join(source.mixture)}" if source.mixture else described(source.path, source.columns)
        yield f"{name}: {what}{share}{known}"


def note_on(model: str) -> str:
    """The size of the model, or why that is unknown."""
    if model in MODELS:
        return f"not fetched yet: run `arealite fetch {model}` first"
    shape = ModelShape.read(model)
    if shape is None:
        return "size unknown: no folder with safetensors on this machine"
    return f"{shape.num_parameters / 1e6:,.1f} M parameters"


def wiring(plan: Plan, config: RunConfig) -> str:
    if not isinstance(config, GRPOConfig):
        return "training alone"
    if plan.colocated:
        return "colocated; servers and trainers share devices and take turns"
    if config.rollout.max_head_offpolicyness == 0:
        return "synchronous; servers and trainers take turns, each with all cores of the machine"
    return "servers generate while trainers train, side by side"


def steps(config: RunConfig, num_rows: int | None) -> str:
    """Optimiser steps and what each consumes; `num_rows` is None when counting would need a download."""
    source, num_steps = config.train_dataset, config.total_train_steps
    answers = f" prompts x {config.gconfig.n_samples} answers" if isinstance(config, GRPOConfig) else " rows"
    rows = "unknown here (not a local data set)" if num_rows is None else str(num_rows)
    if source.max_prompt_tokens is not None and num_rows is not None:
        rows += f", less those with prompts above {source.max_prompt_tokens} tokens"
    if num_steps is not None:
        count = f"{num_steps} (total_train_steps)"
        if num_rows:
            count += f", {num_steps * source.batch_size / num_rows:.1f} passes over the data"
    elif num_rows is None:
        count = f"unknown: {config.total_train_epochs} passes over the data"
    else:
        per_epoch = math.ceil(num_rows / source.batch_size)
        count = f"{config.total_train_epochs * per_epoch} ({config.total_train_epochs} x {per_epoch})"
    return f"{count}; each {source.batch_size}{answers}; rows: {rows}"


def staleness(config: GRPOConfig) -> str:
    """The bound that admission keeps, in words."""
    eta, batch = config.rollout.max_head_offpolicyness, config.train_dataset.batch_size
    bound = (eta + 1) * batch
    concurrent = min(config.rollout.max_concurrent_rollouts or bound, bound)
    if eta == 0:
        return f"0: every token is trained by the weights that made it; {concurrent} groups in flight at most"
    return (
        f"at most {eta} weight version(s) between a group's start and its training; (eta + 1) x B ="
        f" {eta + 1} x {batch} = {bound} groups issued and not yet trained at most, {concurrent} of them in flight"
    )


def process_rows(plan: Plan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("name", "node", "devices", "cores", "threads", "port", "command")]
    for p in plan.processes:
        runs = [[n for _, n in run] for _, run in groupby(enumerate(p.cores), lambda pair: pair[1] - pair[0])]
        cores = ",".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs) or "all"
        port = "chosen at start" if p.role == "server" else "-"
        command = " ".join(p.command[1:])
        devices, name = ",".join(p.devices) or "cpu", p.name + (f" ({', '.join(p.models)})" if p.models else "")
        rows.append((name, str(p.node), devices, cores, p.env["OMP_NUM_THREADS"], port, command))
    return rows


def memory(plan: Plan, config: RunConfig, machine: Machine, width: int) -> list[str]:
    """What each kind of process takes, part by part, and whether it fits."""
    paths = {config.trained[0]: config.trained[1].path}
    if isinstance(config, GRPOConfig):
        roles = {"critic": config.critic, "ref": config.ref}
        paths |= {role: engine.path for role, engine in roles.items() if engine is not None}
    found = {role: read_shape(path) for role, path in paths.items()}
    shapes = {role: shape for role, shape in found.items() if shape is not None}
    if shapes.keys() != found.keys():
        return ["unknown: no model folder with safetensors on this machine"]
    rollout, shape = AllocationMode.parse(config.allocation_mode).inference, shapes[config.trained[0]]
    parts = {}
    if rollout is not None and isinstance(config, GRPOConfig):
        num_shards = rollout.world_size // rollout.num_servers
        share = machine.gpu_bytes * (COLOCATED_KV_SHARE if plan.colocated else KV_SHARE)
        parts["server"] = server_parts(config, shape, num_shards, rollout.backend, share)
    are_apart = len({p.models for p in plan.trainers}) > 1
    kinds = {
        p.name: f"trainer of {' and '.join(p.models)}" if are_apart and p.models else p.role for p in plan.processes
    }
    for p in plan.trainers:
        dims = trainer_dims(config, p.models[0])
        beside = 1 if machine.gpus else sum(q.node == p.node for q in plan.trainers)
        free = (machine.gpu_bytes if machine.gpus else machine.memory_bytes) / beside
        parts[kinds[p.name]] = models_parts(config, p.models, shapes, dims, bool(machine.gpus), free)
    each = {kind: sum(part.num_bytes for part in of_kind) for kind, of_kind in parts.items()}
    lines = []
    for kind, of_kind in parts.items():
        lines.append(f"each {kind} ({list(kinds.values()).count(kind)}): {amount(each[kind])}")
        lines += indented(table([(p.name, amount(p.num_bytes), p.assumption) for p in of_kind], width - 2))
    if machine.gpus:
        sharing = {
            (p.node, gpu): [q for q in plan.processes if q.node == p.node and gpu in q.devices]
            for p in plan.processes
            for gpu in p.devices
        }
        total = max(sum(each[kinds[p.name]] for p in of_gpu) for of_gpu in sharing.values())
        free = machine.gpu_bytes
        lines.append(f"the fullest GPU: {amount(total)} of {amount(free)} free")
    else:
        of_nodes = [
            sum(each[kinds[p.name]] for p in plan.processes if p.node == node) for node in range(plan.num_nodes)
        ]
        total, free = max(of_nodes), machine.memory_bytes
        whose = "all processes" if plan.num_nodes == 1 else "the processes of the fullest node"
        lines.append(f"{whose}: {amount(total)} of {amount(free)} available")
    if free and total > free:
        lines.append(
            "WARNING: this does not fit. Lower actor.max_tokens_per_mb or server.kv_cache_tokens, or set"
            " actor.gradient_checkpointing=full"
        )
    return lines


def read_shape(path: str) -> ModelShape | None:
    try:
        return ModelShape.read(resolve_model(path, asks_hub=False))
    except DatasetError:  # not fetched yet
        return None


def amount(num_bytes: float) -> str:
    return "unknown" if not num_bytes else f"{num_bytes / 2**30:.2f} GiB"


def table(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """Columns as wide as their widest cell; the last one is folded to fit into `width`, on lines of its own where there
    is little room."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    begin = sum(widths) + 2 * len(widths)
    longest = max(len(word) for row in rows for word in row[-1].split() or [""])
    indent = " " * (begin if width - begin >= max(MIN_ROOM, longest) else 4)
    lines = []
    for row in rows:
        cells = "".join(f"{cell.ljust(size)}  " for cell, size in zip(row, widths, strict=False))
        folded = textwrap.wrap(row[-1], width - len(indent), break_on_hyphens=False, break_long_words=False) or [""]
        if len(indent) == begin:
            lines += [cells + folded[0], *(indent + line for line in folded[1:])]
        else:
            lines += [cells.rstrip(), *(indent + line for line in folded)]
    return lines


def indented(lines: list[str]) -> list[str]:
    return ["  " + line for line in lines]


def inspect(config: RunConfig, starts: bool) -> tuple[str, dict[str, int]]:
    """The folder or hub id of the trained model, and the rows of each data set that is on this machine.

    `starts`: a run follows, so what is to be fetched has to be there to be fetched. Raises ConfigError with all that
    was found, one line each.
    """
    problems: list[str] = []
    key, trained = config.trained
    paths = {f"{key}.path": trained.path, "tokenizer_path": config.tokenizer_path or trained.path}
    if isinstance(config, GRPOConfig):
        others = {"ref.path": config.ref, "critic.path": config.critic}
        paths |= {name: other.path for name, other in others.items() if other is not None}
    folders = {name: _find(name, path, starts, problems) for name, path in paths.items()}
    rows: dict[str, int] = {}
    for name, source in datasets_of(config):
        try:
            if source.mixture:
                continue
            if source.path.startswith(REASONING_GYM):
                levels = parts_of(source)
                for level in levels:
                    count_rows(replace(level.config, num_rows=1), config, True)
                rows[name] = (source.num_rows or 0) * len(levels)
            elif is_local(source.path):
                rows[name] = count_rows(source, config, has_chat_template(folders["tokenizer_path"]))
            elif starts:
                find_on_hub(hub_id(source.path), "dataset")
        except DatasetError as error:
            problems.append(f"{name}: {error}")
    for name, source in datasets_of(config):
        counts = [rows.get(f"{name}.mixture.{part}") for part in source.mixture]
        if counts and None not in counts:
            rows[name] = sum(filter(None, counts))
    model = folders[f"{key}.path"]
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


def _find(key: str, path: str, starts: bool, problems: list[str]) -> str:
    """The folder or hub id that `path` is; what is wrong with it goes to `problems`."""
    try:
        folder = resolve_model(path, asks_hub=starts)
        fault_of = tokenizer_fault if key == "tokenizer_path" else model_fault
        fault = fault_of(folder) if is_local(folder) else ""
    except DatasetError as error:
        folder, fault = path, str(error) if starts or is_local(path) else ""
    if fault and not any(path in problem for problem in problems):
        problems.append(f"{key}: {path} {fault}" if path not in fault else f"{key}: {fault}")
    return folder


def _uncomputable(key: str, model: str, config: RunConfig) -> list[str]:
    """Why trainer or servers would refuse the model; asked of their own code where the architecture is untested."""
    settings = read_config(Path(model))
    server = config.server if isinstance(config, GRPOConfig) and "native" in config.allocation_mode else None
    context, limit = (server.context_length if server else None) or 0, settings.get("max_position_embeddings")
    if isinstance(limit, int) and context > limit:
        return [f"server.context_length ({context}) is above what {model} can read, {limit} tokens: lower it"]
    problems: list[str] = []
    if isinstance(limit, int) and isinstance(config, GRPOConfig) and config.server.context_length is None:
        problems = list(lengths(config, limit))
    if problems or settings["model_type"] in TESTED:
        return problems
    command = [sys.executable, "-m", "arealite.prove.trial", model, config.kind, *([server.dtype] if server else [])]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return []  # they will tell themselves
    return [f"{key}.path: {ran.stdout.strip()}"] if ran.returncode == 2 else []
