"""Supervised training with everything around it: held-out loss, checkpoints, recovery, metrics, summary.

Scripts call `SFTTrainer(config).train()` or `RWTrainer(config).train()`. Every trainer rank runs this code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.text import Text

from arealite.algorithm.packing import karmarkar_karp
from arealite.api.atomic import write_json
from arealite.api.cli_args import DatasetConfig, SFTConfig, TrainEngineConfig
from arealite.api.errors import ArealiteError
from arealite.api.types import Batch, Dims
from arealite.dataset.examples import Example, load_answers, load_preferences, pack_examples
from arealite.dataset.loader import StatefulDataLoader, load_tokenizer
from arealite.engine.checkpoint import Saver
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.recover import RecoverHandler
from arealite.engine.rw.reward_engine import FSDPRWEngine
from arealite.engine.sft.lm_engine import FSDPLMEngine
from arealite.launcher.allocation import trainer_dims
from arealite.observe import waits
from arealite.observe.frequency import Frequency
from arealite.observe.progress import show
from arealite.observe.run_folder import RunFolder
from arealite.observe.stats_logger import StatsLogger
from arealite.observe.summary import MEASURES, report
from arealite.observe.timeline import StatsTracker, timeline

# What an engine makes of this rank's share of a batch: statistics over all ranks.
Pass = Callable[[Batch], dict[str, float]]


class NoRollout:
    """Stands for the rollout client in recovery points of runs that have none."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class SupervisedTrainer:
    """One rank of a run: owns the model and the records of the run. All ranks draw the same rows, each has a share."""

    def __init__(self, config: SFTConfig) -> None:
        waits.configure_from_env()
        self.config = config
        self.folder = RunFolder.of(config)
        self.tokenizer = load_tokenizer(config)
        self.engine, self.learn, self.measure = self.make_engine(config.model, trainer_dims(config))
        self.engine.initialize()
        self.collective = self.engine.collective
        self.is_head = self.collective.rank == 0
        timeline.open(self.folder, config.stats_logger.timeline, self.collective.rank)

        self.dataloader: StatefulDataLoader[Example] = StatefulDataLoader(self.load_rows(config.train_dataset), config)
        self.held_out = [] if config.valid_dataset is None else self.load_rows(config.valid_dataset)
        self.total_steps = self.dataloader.total_steps
        self.engine.plan_steps(self.total_steps)
        self.stats = StatsTracker()
        self.logger = StatsLogger(self.folder, config.stats_logger, self.total_steps)
        self.saver = Saver(config.saver, self.folder, self.tokenizer)
        self.recover = RecoverHandler(config.recover, self.folder, config)
        self.evaluation = Frequency(config.evaluator)

    def make_engine(self, config: TrainEngineConfig, dims: Dims) -> tuple[FSDPEngine, Pass, Pass]:
        """The engine, and its passes that learn from a batch and that measure it."""
        raise NotImplementedError

    def load_rows(self, source: DatasetConfig) -> list[Example]:
        raise NotImplementedError

    def train(self) -> None:
        """Run all steps that are left and write the summary. Consumes: rows. Produces: weights, checkpoints, metrics.
        Waits for: the other ranks, within the engine's named waits. Unblocked by: their calls, or a rank's death."""
        try:
            with self.recover.session(self.engine, NoRollout(), self.dataloader) as step:
                self.saver.begin(step, self.recover.epoch, self.engine, self.total_steps)
                self.evaluation.restart(self.recover.epoch)
                if step == 0 and self.config.evaluator.at_start:
                    self.evaluate(0)
                if self.is_head:
                    self.logger.begin(step)
                while step < self.total_steps:
                    self.train_step(step)
                    step += 1
                    self.after_step(step)
            if self.is_head:
                self.logger.close()
                report(self.folder)
        finally:
            self.engine.destroy()

    def train_step(self, step: int) -> None:
        """One optimiser update on the next `batch_size` rows."""
        timeline.begin_step(step)
        with self.stats.timer("step"):
            rows = [next(self.dataloader) for _ in range(self.dataloader.batch_size)]
            self.stats.update(self.learn(self.share_of(rows)))
        self.stats.scalar("num_sequence_tokens", sum(row.num_tokens for row in rows))

    def after_step(self, step: int) -> None:
        """Everything that happens between steps; `step` counts finished ones."""
        epoch, last = step // self.dataloader.steps_per_epoch, step == self.total_steps
        with self.stats.timer("save"):
            self.saver.maybe_save(step, epoch, self.engine, last)
        if self.evaluation.due(step, epoch, self.collective, last and self.config.evaluator.at_end):
            with self.stats.timer("eval"):
                self.stats.update({f"eval_{name}": value for name, value in self.evaluate(step).items()})
        if self.is_head:
            self.logger.commit(step - 1, epoch, self.stats.export())
        self.recover.maybe_save(step, epoch, self.engine, NoRollout(), self.dataloader, last)

    def evaluate(self, step: int) -> dict[str, float]:
        """The held-out numbers of the current weights, written to the run folder; none without held-out rows."""
        if not self.held_out:
            return {}
        result = self.measure(self.share_of(self.held_out))
        self.collective.on_head(lambda: self._write(step, result))
        return result

    def _write(self, step: int, result: dict[str, float]) -> None:
        try:
            write_json(self.folder.evaluation(step).with_suffix(".json"), {"step": step, **result})
            measured = "  ".join(f"{name} {result[name]:.4f}" for name in MEASURES if name in result)
            show(Text(f"held-out rows ({len(self.held_out)}) after {step} steps:  {measured}"))
        except OSError as error:
            raise ArealiteError(f"cannot write to {self.folder.evaluation_dir}: {error.strerror}; make room") from error

    def share_of(self, rows: Sequence[Example]) -> Batch:
        """This rank's part of a step's rows; parts have about the same number of tokens."""
        parts = karmarkar_karp([row.num_tokens for row in rows], self.collective.num_shares)
        own = parts[self.engine.mesh.share]
        return pack_examples([rows[i] for i in own], own, len(rows))


class SFTTrainer(SupervisedTrainer):
    """Learns answers: dataset.examples.load_answers says which rows and which of their tokens."""

    def make_engine(self, config: TrainEngineConfig, dims: Dims) -> tuple[FSDPEngine, Pass, Pass]:
        engine = FSDPLMEngine(config, dims=dims)
        return engine, engine.train_lm, engine.evaluate_lm

    def load_rows(self, source: DatasetConfig) -> list[Example]:
        return load_answers(source, self.tokenizer, self.config.seed)


class RWTrainer(SupervisedTrainer):
    """Learns preferences: dataset.examples.load_preferences says which rows."""

    def make_engine(self, config: TrainEngineConfig, dims: Dims) -> tuple[FSDPEngine, Pass, Pass]:
        engine = FSDPRWEngine(config, dims=dims)
        return engine, engine.train_rw, engine.evaluate_rw

    def load_rows(self, source: DatasetConfig) -> list[Example]:
        return load_preferences(source, self.tokenizer, self.config.seed)
