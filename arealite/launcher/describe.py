"""What a run will be, in words, without starting anything: `arealite check`. Called by cli.py."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import groupby

from arealite.api.cli_args import GRPOConfig, RunConfig
from arealite.api.errors import DatasetError
from arealite.api.load_config import explain, load_run_config, to_yaml
from arealite.kernels import build
from arealite.launcher.allocation import AllocationMode, trainer_dims
from arealite.launcher.inspect import inspect, warnings
from arealite.launcher.machine import Machine
from arealite.launcher.memory import COLOCATED_KV_SHARE, KV_SHARE, ModelShape, Part, server_parts, trainer_parts
from arealite.launcher.plan import Plan, make_plan
from arealite.models.fetch import MODELS, resolve_model
from arealite.observe.progress import terminal_width
from arealite.observe.run_folder import RunFolder

UNLIMITED = 1 << 20  # columns, where no terminal shows the output
AS_YAML = {"None": "null", "True": "true", "False": "false"}
MIN_ROOM = 30  # columns for the last cell of a row; where there are fewer it has lines of its own


def check(config_path: str, overrides: list[str], explained: bool) -> str:
    """The whole answer of `arealite check`. Raises ConfigError."""
    config = load_run_config(config_path, overrides)
    machine = Machine.described(config.cluster)
    model, rows = inspect(config, starts=False)
    plan = make_plan(config, machine, model, ["SCRIPT", "--config", config_path, *overrides])
    width = (terminal_width() or UNLIMITED) - 2
    settings = to_yaml(config, min(width, 120)).splitlines()
    if explained:
        settings = table(
            [(key, f"{AS_YAML.get(str(value), value)}  ({doc})") for key, value, doc in explain(config)], width
        )
    num_bytes = amount(machine.memory_bytes)
    facts = [
        ("folder", str(RunFolder.of(config).root)),
        ("model", f"{model} ({note_on(model)})"),
        ("machine", f"{machine.name}: {len(machine.cores)} cores, {len(machine.gpus)} GPUs, {num_bytes} available"),
        *([] if machine.gpus else [("CPU kernels", build.expectation())]),
        ("wiring", f"{plan.allocation}: {wiring(plan, config)}"),
        ("steps", steps(config, rows.get("train_dataset"))),
    ]
    facts += [("staleness", staleness(config))] if isinstance(config, GRPOConfig) else []
    facts += [("WARNING", warning) for warning in warnings(config, rows)]
    sections = {
        "CONFIGURATION": settings,
        "RUN": table(facts, width),
        "PROCESSES": table(processes(plan), width),
        "MEMORY (estimated peaks, meant to be within 20%)": memory(plan, config, machine, width),
    }
    return "\n\n".join("\n".join([title, *indented(lines)]) for title, lines in sections.items())


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


def steps(config: RunConfig, rows: int | None) -> str:
    """Optimiser steps and what each consumes; `rows` are None when counting would need a download."""
    source = config.train_dataset
    answers = f" prompts x {config.gconfig.n_samples} answers" if isinstance(config, GRPOConfig) else " rows"
    each = f"each {source.batch_size}{answers}"
    found = "unknown here (not a local data set)" if rows is None else str(rows)
    if source.max_prompt_tokens is not None and rows is not None:
        found += f", less those with prompts above {source.max_prompt_tokens} tokens"
    if config.total_train_steps is not None:
        count = f"{config.total_train_steps} (total_train_steps)"
        if rows:
            count += f", {config.total_train_steps * source.batch_size / rows:.1f} passes over the data"
    elif rows is None:
        count = f"unknown: {config.total_train_epochs} passes over the data"
    else:
        per_epoch = math.ceil(rows / source.batch_size)
        count = f"{config.total_train_epochs * per_epoch} ({config.total_train_epochs} x {per_epoch})"
    return f"{count}; {each}; rows: {found}"


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


def processes(plan: Plan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("name", "where", "devices", "cores", "threads", "port", "command")]
    for p in plan.processes:
        runs = [[n for _, n in run] for _, run in groupby(enumerate(p.cores), lambda pair: pair[1] - pair[0])]
        cores = ",".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs) or "all"
        port = str(p.port or ("chosen at start" if p.kind == "server" else "-"))
        command = " ".join(p.command[1:])
        rows.append((p.name, p.node, ",".join(p.devices) or "cpu", cores, p.env["OMP_NUM_THREADS"], port, command))
    return rows


def memory(plan: Plan, config: RunConfig, machine: Machine, width: int) -> list[str]:
    """What each kind of process takes, part by part, and whether it fits."""
    shape = read_shape(config.trained[1].path)
    reference = config.ref if isinstance(config, GRPOConfig) else None
    ref = None if reference is None else read_shape(reference.path)
    if shape is None or (reference is not None and ref is None):
        return ["unknown: no model folder with safetensors on this machine"]
    mode = AllocationMode.parse(config.allocation_mode)
    kinds: list[tuple[str, int, list[Part]]] = []
    if mode.inference is not None and isinstance(config, GRPOConfig):
        num_shards = mode.inference.world_size // mode.inference.num_servers
        share = machine.gpu_bytes * (COLOCATED_KV_SHARE if plan.colocated else KV_SHARE)
        of_server = server_parts(config, shape, num_shards, mode.inference.backend, share)
        kinds.append(("server", len(plan.servers), of_server))
    parts = trainer_parts(config, shape, trainer_dims(config), ref, bool(machine.gpus))
    kinds.append(("trainer", len(plan.trainers), parts))
    lines, each = [], {}
    for kind, count, parts in kinds:
        each[kind] = sum(part.num_bytes for part in parts)
        lines.append(f"each {kind} ({count}): {amount(each[kind])}")
        lines += indented(table([(part.name, amount(part.num_bytes), part.assumption) for part in parts], width - 2))
    if machine.gpus:
        on_card = [sum(each[p.kind] for p in plan.processes if gpu in p.devices) for gpu in machine.gpus]
        total, free = max(on_card), machine.gpu_bytes
        lines.append(f"the fullest GPU: {amount(total)} of {amount(free)} free")
    else:
        total, free = sum(count * each[kind] for kind, count, _ in kinds), machine.memory_bytes
        lines.append(f"all processes: {amount(total)} of {amount(free)} available")
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
    """Columns as wide as their widest cell; the last one is folded to fit into `width`."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    begin = sum(widths) + 2 * len(widths)
    longest = max(len(word) for row in rows for word in row[-1].split() or [""])
    lines = []
    for row in rows:
        cells = "".join(f"{cell.ljust(size)}  " for cell, size in zip(row, widths, strict=False))
        if width - begin < max(MIN_ROOM, longest):
            lines.append(cells.rstrip())
            cells, indent = "    ", "    "
        else:
            indent = " " * begin
        folded = textwrap.wrap(row[-1], width - len(indent), break_on_hyphens=False, break_long_words=False) or [""]
        lines += [cells + folded[0], *(indent + line for line in folded[1:])]
    return lines


def indented(lines: list[str]) -> list[str]:
    return ["  " + line for line in lines]
