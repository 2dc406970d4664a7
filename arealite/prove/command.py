"""`arealite prove`: the step of the user's own model and configuration does not depend on how it is computed.

Called by cli.py. Prints a table; exit code 1 when a check fails. What needs more ranks is in step.py, what needs a
server in rollouts.py.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from arealite.api.cli_args import GRPOConfig, PPOActorConfig
from arealite.api.load_config import load_config_file
from arealite.api.types import Batch, Task
from arealite.dataset.loader import load_tasks, load_tokenizer
from arealite.dataset.prompts import prompt_of
from arealite.devices import give_back, num_accelerators
from arealite.engine.determinism import WORKSPACE_VARIABLE, WORKSPACES
from arealite.engine.micro_batch import cut
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.launcher.allocation import trainer_dims
from arealite.models.fetch import resolve_model
from arealite.observe.progress import terminal_width
from arealite.observe.run_folder import RunFolder
from arealite.prove import step as steps
from arealite.prove.rollouts import check_mismatch, check_rollouts
from arealite.prove.step import ABSOLUTE, LAYOUT, TOLERANCES, Distance, Finding, Step, judge, take_step

MAX_PROMPT_TOKENS = 64  # of a prompt its last ones are used
LONGEST_ANSWER = 10
PERMUTED = "packing order"  # the check that also changes the order of sequences and groups
IN_ROWS = "samples in rows"  # the check that also cuts sequences after each of their answers
STYLES = {"pass": None, "FAIL": "bold red", "skipped": "yellow"}


class Prover:
    """One configuration under test. `ranks`: processes that layouts may have; None: the GPUs there are, or two
    processes on the CPU. `quick`: float32 only, fewer variants, no server."""

    def __init__(self, config: GRPOConfig, quick: bool = False, ranks: int | None = None) -> None:
        self.config, self.quick = config, quick
        self.max_ranks = ranks or num_accelerators() or 2
        self.tokenizer = load_tokenizer(config)
        self.tasks = load_tasks(config.train_dataset, self.tokenizer, config.seed)
        num_groups, group_size = (2, 3) if quick else (3, 4)
        prompts = [self.prompt(task) for task in self.tasks[:num_groups]]
        prompts = (prompts * num_groups)[:num_groups]  # of a data set with fewer rows
        self.batch = steps.random_batch(prompts, group_size, LONGEST_ANSWER, len(self.tokenizer), self._rng())

    def findings(self) -> Iterator[Finding]:
        """Every check, made as it is asked for. In float32, where the tolerance is tight, and then in the
        configuration's own type."""
        dtype = self.config.actor.dtype
        yield from self._check_type("float32")
        if dtype != "float32" and self.quick:
            yield Finding(f"everything in {dtype}", "as above", "skipped", reason="--quick: float32 only")
        elif dtype != "float32":
            yield from self._check_type(dtype)
        yield from self._check_repetition()

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.config.seed)

    def prompt(self, task: Task) -> list[int]:
        """The last tokens of a task's prompt."""
        return prompt_of(self.tokenizer, task)[1][-MAX_PROMPT_TOKENS:]

    def _check_type(self, dtype: Literal["bfloat16", "float32"]) -> Iterator[Finding]:
        """All that one step can show in `dtype`."""
        config = steps.proof_config(self.config.actor, dtype)
        with engine(config) as actor:
            batch = steps.with_logprobs(self.batch, actor, self._rng())
            reference = take_step(actor, batch)
            num_tokens = sum(len(m.tokens) for m in cut(batch, 1 << 40, actor.mesh.device, config.share_prompts))
            for check, changes in packings(config, num_tokens, self.quick):
                yield self._varied(check, actor, reference, config, changes)
            apart = {"logprobs": steps.logprob_distance(reference.logp, plain_logprobs(actor, batch))}
            yield judge("Hugging Face's own forward pass", "each sequence alone, by transformers", apart, dtype)
            if dtype == "float32" and self.quick:
                check, compared = "asynchronous rollouts, eta = 0", "against synchronous ones"
                yield Finding(check, compared, "skipped", reason="--quick")
            elif dtype == "float32":
                yield from check_rollouts(self.config, self.tasks, self.prompt, actor, self.tokenizer)
            else:
                yield check_mismatch(self.config, self.tasks, self.prompt, actor)
        others = [kind for kind in ("none", "full", "selective") if kind != config.gradient_checkpointing]
        for kind in others[: 1 if self.quick else None]:
            changes = {"gradient_checkpointing": kind}
            with engine(replace(config, **changes)) as actor:
                yield self._varied("gradient checkpointing", actor, reference, config, changes)
        if dtype == "float32":
            yield from self._check_layouts(config, reference)

    def _varied(
        self, check: str, actor: FSDPPPOActor, reference: Step, config: PPOActorConfig, changes: dict[str, Any]
    ) -> Finding:
        """The step with `changes` of `config`, which the reference was made with."""
        batch = reference.batch
        order = np.arange(len(batch.tokens))
        compared = ", ".join(f"{key} {value} against {vars(config)[key]}" for key, value in changes.items())
        if check == PERMUTED:
            batch, order = steps.permuted(batch, self._rng())
            compared = f"sequences and groups permuted, {compared}"
        if check == IN_ROWS:
            batch, order = steps.in_rows(batch)
            compared = f"a row for each answer of a sample against one for all, {compared}"
        actor.config = replace(config, **changes)
        step = take_step(actor, batch, reference)
        actor.config = config
        logp = np.zeros_like(reference.logp)
        logp[order[batch.loss_mask]] = step.logp[batch.loss_mask]
        return judge(check, compared, steps.distances(replace(step, logp=logp), reference), config.dtype)

    def _check_layouts(self, config: PPOActorConfig, reference: Step) -> Iterator[Finding]:
        settings = json.loads((Path(resolve_model(config.path)) / "config.json").read_text())
        configured = trainer_dims(self.config)
        for dims in steps.candidates(
            configured, bool(settings.get("num_experts") or settings.get("num_local_experts"))
        ):
            if dims.size > self.max_ranks:
                why = f"{dims.size} ranks and there are {self.max_ranks}: give --ranks {dims.size}"
                yield Finding(LAYOUT, str(dims), "skipped", reason=why)
                continue
            finding = steps.check_layout(config, reference, dims)
            is_refused = finding.outcome == "skipped" and dims == configured
            yield replace(finding, outcome="FAIL") if is_refused else finding

    def _check_repetition(self) -> Iterator[Finding]:
        """With `deterministic`, at the configuration's own learning rate: the same steps again, and a resumed run."""
        optimizer = replace(self.config.actor.optimizer, lr_scheduler="constant", warmup_steps=0)
        optimizer = replace(optimizer, lr=optimizer.lr or 1e-5)
        config = replace(self.config.actor, deterministic=True, optimizer=optimizer, ppo_n_minibatches=1)
        try:
            with tempfile.TemporaryDirectory() as folder:
                with engine(config) as actor:
                    batch = steps.with_logprobs(self.batch, actor, self._rng())
                    first = updated(actor, batch)
                    actor.save_state(folder)
                    straight = updated(actor, batch)
                with engine(config) as actor:
                    again = updated(actor, batch)
                with engine(config) as actor:
                    actor.load_state(folder)
                    resumed = updated(actor, batch)
        finally:
            torch.use_deterministic_algorithms(False)
        compared = "weights after the update"
        yield judge("same step twice, deterministic", compared, {"weights": furthest(first, again)}, config.dtype)
        yield judge("resumed from a recovery point", compared, {"weights": furthest(straight, resumed)}, config.dtype)


def packings(config: PPOActorConfig, num_tokens: int, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What can be changed between two steps of one engine: how its batch is packed. `num_tokens`: it computes."""
    for budget in (1, num_tokens // 2) if quick else (1, num_tokens // 4, num_tokens // 2):
        yield "micro-batches", {"max_tokens_per_mb": budget}
    yield "share_prompts", {"share_prompts": not config.share_prompts}
    yield PERMUTED, {"max_tokens_per_mb": num_tokens // 2}
    for share in (True, False):
        yield IN_ROWS, {"share_prompts": share}


@contextmanager
def engine(config: PPOActorConfig) -> Iterator[FSDPPPOActor]:
    """A fresh policy on one rank; its memory is given back."""
    actor = FSDPPPOActor(config)
    actor.initialize()
    try:
        yield actor
    finally:
        actor.destroy()
        vars(actor).clear()
        gc.collect()
        give_back()


def updated(actor: FSDPPPOActor, batch: Batch) -> dict[str, torch.Tensor]:
    """Make one update; the float32 weights after it."""
    mine = replace(batch)
    actor.compute_advantages(mine)
    actor.grpo_update(mine)
    return {name: tensor.clone() for name, tensor in actor.named_full_tensors(torch.float32)}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Distance:
    """Of weights that must be equal in every bit; NaN equals nothing."""
    return float(torch.stack([(one[name] - other[name]).abs().max() for name in one]).max()), 0.0


def plain_logprobs(actor: FSDPPPOActor, batch: Batch) -> np.ndarray:
    """float32 [T] of the loss tokens: every sequence alone, through transformers' forward pass and its own attention.
    An adapter that has not been trained yet adds nothing."""
    model = AutoModelForCausalLM.from_pretrained(
        actor.sharded.folder, dtype=actor.sharded.dtype, attn_implementation="sdpa"
    )
    model = model.to(actor.mesh.device).eval()
    out = np.zeros(len(batch.tokens), np.float32)
    for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        tokens = torch.from_numpy(batch.tokens[begin:end]).to(actor.mesh.device)
        with torch.no_grad():
            logp = (model(input_ids=tokens[None]).logits[0, :-1].float() / actor.temperature).log_softmax(-1)
        out[begin + 1 : end] = logp.gather(-1, tokens[1:, None])[:, 0].cpu().numpy()
    return np.where(batch.loss_mask, out, 0)


def table(findings: list[Finding]) -> Table:
    """`worst`: the quantity that came nearest to its tolerance, or went beyond it; all tolerances are below."""
    notes = [
        "Tolerances, relative where nothing is said; of the loss: to the larger of itself and the mean |advantage|"
    ]
    for dtype, of in TOLERANCES.items():
        if any(finding.compared.endswith(dtype) for finding in findings):
            allowed = (f"{name} {'absolute ' if name in ABSOLUTE else ''}{most:g}" for name, most in of.items())
            notes.append(f"{dtype}: {', '.join(allowed)}")
    rows = Table(title="Largest differences", title_justify="left", title_style="bold", caption="\n".join(notes))
    rows.caption_justify = "left"
    for heading in ("check", "compared", "worst", "absolute", "relative", "tolerance", ""):
        rows.add_column(heading, overflow="fold", justify="right" if heading in ("absolute", "relative") else "left")
    for f in findings:
        numbers = [f"{x:.1e}" if f.worst else "" for x in (f.absolute, f.relative, f.tolerance)]
        rows.add_row(*map(Text, (f.check, f.compared, f.worst, *numbers, f.outcome)), style=STYLES[f.outcome])
    return rows


def prove(path: str, overrides: list[str], quick: bool, ranks: int | None, report_path: str | None) -> int:
    """Returns the exit code: 0 nothing failed, 1 a check did. Raises ArealiteError: the configuration is refused."""
    os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACES[0])  # read at the first product, long before the last check
    set_verbosity_error()
    disable_progress_bar()
    console = Console(highlight=False, width=terminal_width() or 140)
    say: Callable[[str], None] = lambda text: console.print(Text(text), soft_wrap=True)  # noqa: E731
    config = load_config_file(path, overrides, GRPOConfig)
    findings = []
    for finding in Prover(config, quick, ranks).findings():
        findings.append(finding)
        say(f"{finding.outcome:<8}{finding.check}: {finding.compared}")
    console.print(table(findings))
    for finding in findings:
        if finding.reason:
            say(f"{finding.outcome} {finding.check}, {finding.compared}: {finding.reason}")
    report = Path(report_path) if report_path else RunFolder.of(config).create().prove_json
    report.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    counts = {outcome: sum(f.outcome == outcome for f in findings) for outcome in STYLES}
    say(", ".join(f"{n} {outcome}" for outcome, n in counts.items()) + f"; {report}")
    return 1 if counts["FAIL"] else 0
