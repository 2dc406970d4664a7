"""`arealite prove`: the step of the user's own model and configuration does not depend on how it is computed.

Run by cli.py as `python -m arealite.evaluation.prove`. Prints a table; exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from arealite.api.cli_args import GRPOConfig, PPOActorConfig
from arealite.api.errors import ArealiteError
from arealite.api.load_config import load_config_file
from arealite.api.types import Batch, Task
from arealite.dataset.fetch import resolve_model
from arealite.dataset.loader import load_tasks
from arealite.engine.micro_batch import cut
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.evaluation import proof
from arealite.evaluation.proof import TOLERANCES, Distance, Finding, Step, judge, logprob_distance, skipped, take_step
from arealite.evaluation.proof_layouts import LayoutTask, candidates, check_layouts
from arealite.evaluation.proof_rollout import check_rollouts
from arealite.launcher.allocation import AllocationMode
from arealite.observe.run_folder import RunFolder

MAX_PROMPT_TOKENS = 64  # of a prompt its last ones are used
LONGEST_ANSWER = 10
CHECKPOINTING = ("none", "full", "selective")
EXACT = {"weights": 0.0}


@dataclass(frozen=True)
class Options:
    """`ranks`: processes that layouts may have; None: the GPUs there are, or two processes on the CPU."""

    quick: bool = False
    ranks: int | None = None


class Prover:
    """One configuration under test; `findings` grows check by check, each told by `tell` as soon as it is there."""

    def __init__(self, config: GRPOConfig, options: Options, tell: Callable[[Finding], None] = lambda _: None) -> None:
        self.config, self.options, self.tell = config, options, tell
        self.findings: list[Finding] = []
        folder = resolve_model(config.tokenizer_path or config.actor.path)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.num_groups, self.group_size = (2, 3) if options.quick else (3, 4)
        self.tasks = load_tasks(config.train_dataset, self.tokenizer, config.seed)
        prompts = [self.prompt(task) for task in self.tasks[: self.num_groups]]
        vocabulary, rng = len(self.tokenizer), self._rng()
        prompts = (prompts * self.num_groups)[: self.num_groups]  # of a data set with fewer rows
        self.batch = proof.random_batch(prompts, self.group_size, LONGEST_ANSWER, vocabulary, rng)

    def run(self) -> list[Finding]:
        """Every check. In float32, where the tolerance is tight, and then in the configuration's own type."""
        dtype = self.config.actor.dtype
        self._check_type("float32")
        if dtype != "float32":
            if self.options.quick:
                self._add(skipped(f"everything in {dtype}", "as above", "--quick: float32 only"))
            else:
                self._check_type(dtype)
        self._check_repetition()
        return self.findings

    def _add(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.tell(finding)

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.config.seed)

    def prompt(self, task: Task) -> list[int]:
        """The last tokens of a task's prompt."""
        text = task.prompt
        if task.messages is not None:
            text = self.tokenizer.apply_chat_template(task.messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=task.messages is None)["input_ids"]
        return list(ids[-MAX_PROMPT_TOKENS:])

    def _check_type(self, dtype: str) -> None:
        """All that one step can show in `dtype`."""
        config = proof.proof_config(self.config.actor, dtype)
        with engine(config) as actor:
            batch = proof.with_logprobs(self.batch, actor, self._rng())
            reference = take_step(actor, batch)
            self._check_packing(actor, batch, reference)
            compared = f"padded, by transformers alone, {dtype}"
            apart = {"logprobs": logprob_distance(reference.logp, plain_logprobs(actor, batch))}
            self._add(judge("Hugging Face's own forward pass", compared, apart, TOLERANCES[dtype]))
            if dtype == "float32" and self.options.quick:
                self._add(skipped("asynchronous rollouts, eta = 0", "against synchronous ones", "--quick"))
            elif dtype == "float32":
                self._add(*check_rollouts(self.config, self.tasks, self.prompt, actor))
        others = [kind for kind in CHECKPOINTING if kind != config.gradient_checkpointing]
        for kind in others[: 1 if self.options.quick else None]:
            with engine(replace(config, gradient_checkpointing=kind)) as actor:
                step = take_step(actor, batch, reference.gradients)
            compared = f"{kind} against {config.gradient_checkpointing}, {dtype}"
            self._judge("gradient checkpointing", compared, step, reference)
        if dtype == "float32":
            self._check_layouts(config, batch, reference)

    def _judge(self, check: str, compared: str, step: Step, reference: Step) -> None:
        dtype = "float32" if "float32" in compared else "bfloat16"
        apart = proof.distances(step, reference)
        self._add(judge(check, compared, apart, TOLERANCES[dtype]))

    def _check_packing(self, actor: FSDPPPOActor, batch: Batch, reference: Step) -> None:
        """What can be changed between two steps of one engine: how its batch is packed."""
        config, dtype = actor.config, actor.config.dtype
        computed = sum(len(micro.tokens) for micro in cut(batch, 1 << 40, actor.device, config.share_prompts))
        for budget in (1, computed // 2) if self.options.quick else (1, computed // 4, computed // 2):
            actor.config = replace(config, max_tokens_per_mb=budget)
            step = take_step(actor, batch, reference.gradients)
            compared = f"max_tokens_per_mb {budget} against {config.max_tokens_per_mb}, {dtype}"
            self._judge("micro-batches", compared, step, reference)
        actor.config = replace(config, share_prompts=not config.share_prompts)
        step = take_step(actor, batch, reference.gradients)
        compared = f"{not config.share_prompts} against {config.share_prompts}, {dtype}".lower()
        self._judge("share_prompts", compared, step, reference)
        actor.config = replace(config, max_tokens_per_mb=computed // 2)
        changed, tokens = proof.permuted(batch, self._rng())
        step = take_step(actor, changed, reference.gradients)
        actor.config = config
        back = np.zeros_like(step.logp)
        back[tokens] = step.logp
        compared = f"sequences and groups permuted, max_tokens_per_mb {computed // 2}, {dtype}"
        self._judge("packing order", compared, replace(step, logp=back), reference)

    def _check_layouts(self, config: PPOActorConfig, batch: Batch, reference: Step) -> None:
        num_gpus = torch.cuda.device_count()
        component = AllocationMode.parse(self.config.allocation_mode).train
        assert component is not None, "load_config_file refuses a run without a trainer"
        settings = json.loads((Path(resolve_model(config.path)) / "config.json").read_text())
        has_experts = bool(settings.get("num_experts") or settings.get("num_local_experts"))
        layouts, left_out = candidates(component.dims, self.options.ranks or num_gpus or 2, has_experts)
        self._add(*check_layouts(LayoutTask(config, batch, reference, tuple(layouts))), *left_out)

    def _check_repetition(self) -> None:
        """With `deterministic`, at the configuration's own learning rate: the same steps again, and a resumed run."""
        optimizer = replace(self.config.actor.optimizer, lr_scheduler="constant", warmup_steps=0)
        optimizer = replace(optimizer, lr=optimizer.lr or 1e-5)
        config = replace(self.config.actor, deterministic=True, optimizer=optimizer, ppo_n_minibatches=1)
        try:
            with tempfile.TemporaryDirectory() as folder:
                with engine(config) as actor:
                    batch = proof.with_logprobs(self.batch, actor, self._rng())
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
        for check, one, other in (
            ("same step twice, deterministic", first, again),
            ("resumed from a recovery point", straight, resumed),
        ):
            self._add(
                judge(check, f"weights after the update, {config.dtype}", {"weights": furthest(one, other)}, EXACT)
            )


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
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def updated(actor: FSDPPPOActor, batch: Batch) -> dict[str, torch.Tensor]:
    """Make one update; the float32 weights after it."""
    mine = replace(batch)
    actor.compute_advantages(mine)
    actor.grpo_update(mine)
    return {name: tensor.clone() for name, tensor in actor.named_full_tensors(torch.float32)}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Distance:
    """Of weights that must be equal in every bit."""
    worst = max(float((one[name] - other[name]).abs().max()) for name in one)
    same = all(torch.equal(one[name], other[name]) for name in one)
    return Distance(worst, 0.0, 0.0 if same else max(worst, 1e-45))


def plain_logprobs(actor: FSDPPPOActor, batch: Batch) -> np.ndarray:
    """float32 [T] of the loss tokens: every sequence on a line of its own, padded, through transformers' forward pass
    and its own attention. An adapter that has not been trained yet adds nothing."""
    model = AutoModelForCausalLM.from_pretrained(actor.folder, dtype=actor.dtype, attn_implementation="sdpa")
    model = model.to(actor.device).eval()
    out = np.zeros(len(batch.tokens), np.float32)
    for group in range(batch.num_groups):
        chosen = np.flatnonzero(batch.group_ids == group)
        lengths = batch.lengths[chosen]
        seen = torch.arange(int(lengths.max()))[None] < torch.from_numpy(lengths)[:, None]
        tokens = torch.zeros(seen.shape, dtype=torch.int64)
        starts = batch.cu_seqlens[chosen]
        tokens[seen] = torch.from_numpy(
            np.concatenate([batch.tokens[s : s + n] for s, n in zip(starts, lengths, strict=True)])
        )
        with torch.no_grad():
            found = model(input_ids=tokens.to(actor.device), attention_mask=seen.long().to(actor.device))
            logp = (found.logits[:, :-1].float() / actor.temperature).log_softmax(-1)
        picked = logp.gather(-1, tokens[:, 1:, None].to(actor.device))[..., 0].cpu().numpy()
        for row, start, length in zip(picked, starts, lengths, strict=True):
            out[start + 1 : start + length] = row[: length - 1]
    return np.where(batch.loss_mask, out, 0)


def line(finding: Finding) -> tuple[str, ...]:
    """A row of the table."""
    if not finding.worst:
        return finding.check, finding.compared, "", "", "", "", finding.outcome
    shown = f"{finding.absolute:.1e}", f"{finding.relative:.1e}", f"{finding.tolerance:.1e}"
    return finding.check, finding.compared, finding.worst, *shown, finding.outcome


def table(findings: list[Finding]) -> Table:
    """`worst`: the quantity that came nearest to its tolerance, or went beyond it."""
    made = Table(title="Largest differences", title_justify="left", title_style="bold")
    for heading in ("check", "compared", "worst", "absolute", "relative", "tolerance", ""):
        made.add_column(heading, overflow="fold", justify="right" if heading in ("absolute", "relative") else "left")
    styles = {"pass": "green", "FAIL": "bold red", "skipped": "yellow"}
    for finding in findings:
        made.add_row(*map(Text, line(finding)), style=styles[finding.outcome] if finding.outcome != "pass" else None)
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="arealite prove", allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 nothing failed, 1 a check did, 2 the configuration was refused."""
    args = parse(argv)
    set_verbosity_error()
    disable_progress_bar()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    try:
        config = load_config_file(args.config, args.overrides, GRPOConfig)
        told = lambda finding: print(f"{finding.outcome:<8}{finding.check}: {finding.compared}", flush=True)  # noqa: E731
        findings = Prover(config, Options(args.quick, args.ranks), told).run()
    except ArealiteError as error:
        print(f"arealite: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    console.print(table(findings))
    for finding in findings:
        if finding.reason:
            console.print(
                Text(f"{finding.outcome} {finding.check}, {finding.compared}: {finding.reason}"), soft_wrap=True
            )
    report = Path(args.json) if args.json else RunFolder.of(config).create().prove_json
    report.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    counts = {outcome: sum(f.outcome == outcome for f in findings) for outcome in ("pass", "FAIL", "skipped")}
    console.print(Text(", ".join(f"{n} {outcome}" for outcome, n in counts.items()) + f"; {report}"), soft_wrap=True)
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
