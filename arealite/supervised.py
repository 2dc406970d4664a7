"""Supervised training: answers (SFT) and preferences (reward models), with held-out loss.

Scripts call `SFTTrainer(config).train()` or `RWTrainer(config).train()`. Every trainer rank runs this code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text

from arealite.algorithm.packing import karmarkar_karp
from arealite.api.atomic import write_json
from arealite.api.cli_args import DatasetConfig, SFTConfig, TrainEngineConfig
from arealite.api.errors import ArealiteError
from arealite.api.types import Batch, Dims
from arealite.dataset.examples import Example, load_answers, load_preferences, pack_examples
from arealite.dataset.loader import StatefulDataLoader
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.rw import FSDPRWEngine
from arealite.engine.sft import FSDPLMEngine
from arealite.launcher.allocation import trainer_dims
from arealite.observe.progress import show
from arealite.observe.summary import MEASURES
from arealite.run import Run

# What an engine makes of this rank's share of a batch: statistics over all ranks.
Pass = Callable[[Batch], dict[str, float]]


class SupervisedTrainer:
    """One rank of a run. All ranks draw the same rows, each has a share."""

    def __init__(self, config: SFTConfig) -> None:
        self.config = config

    def make_engine(self, config: TrainEngineConfig, dims: Dims) -> tuple[FSDPEngine, Pass, Pass]:
        """The engine, and its passes that learn from a batch and that measure it."""
        raise NotImplementedError

    def load_rows(self, source: DatasetConfig, run: Run) -> list[Example]:
        raise NotImplementedError

    def train(self) -> None:
        """Run all steps that are left and write the summary. Consumes: rows. Produces: weights, checkpoints, metrics.
        Waits for: the other ranks, within the engine's named waits. Unblocked by: their calls, or a rank's death."""
        config = self.config
        with Run(config) as run:
            engine, learn, measure = self.make_engine(config.model, trainer_dims(config))
            run.open(engine)
            dataloader: StatefulDataLoader[Example] = StatefulDataLoader(
                self.load_rows(config.train_dataset, run), config
            )
            held_out = [] if config.valid_dataset is None else self.load_rows(config.valid_dataset, run)

            def evaluate(step: int) -> dict[str, float]:
                result = measure(share_of(held_out, engine))
                run.collective.on_head(lambda: write_held_out(run, step, len(held_out), result))
                return result

            run.begin(engine, dataloader)
            for _ in run.steps(evaluate if held_out else None):
                rows = [next(dataloader) for _ in range(dataloader.batch_size)]
                run.stats.update(learn(share_of(rows, engine)))
                run.stats.scalar("num_sequence_tokens", sum(row.num_tokens for row in rows))


def share_of(rows: Sequence[Example], engine: FSDPEngine) -> Batch:
    """This rank's part of a step's rows; parts have about the same number of tokens."""
    parts = karmarkar_karp([row.num_tokens for row in rows], engine.collective.num_shares)
    chosen = parts[engine.mesh.share]
    return pack_examples([rows[i] for i in chosen], chosen, len(rows))


def write_held_out(run: Run, step: int, num_rows: int, result: dict[str, float]) -> None:
    """Into the run folder, and onto the terminal. Raises ArealiteError when it cannot be written."""
    try:
        write_json(run.folder.evaluation(step).with_suffix(".json"), {"step": step, **result})
    except OSError as error:
        raise ArealiteError(f"cannot write to {run.folder.evaluation_dir}: {error.strerror}; make room") from error
    measured = "  ".join(f"{name} {result[name]:.4f}" for name in MEASURES if name in result)
    show(Text(f"held-out rows ({num_rows}) after {step} steps:  {measured}"))


class SFTTrainer(SupervisedTrainer):
    """Learns answers: dataset.examples.load_answers says which rows and which of their tokens."""

    def make_engine(self, config: TrainEngineConfig, dims: Dims) -> tuple[FSDPEngine, Pass, Pass]:
        engine = FSDPLMEngine(config, dims=dims)
        return engine, engine.train_lm, engine.evaluate_lm

    def load_rows(self, source: DatasetConfig, run: Run) -> list[Example]:
        return load_answers(source, run.tokenizer, self.config.seed)


class RWTrainer(SupervisedTrainer):
    """Learns preferences: dataset.examples.load_preferences says which rows."""

    def make_engine(self, config: TrainEngineConfig, dims: Dims) -> tuple[FSDPEngine, Pass, Pass]:
        engine = FSDPRWEngine(config, dims=dims)
        return engine, engine.train_rw, engine.evaluate_rw

    def load_rows(self, source: DatasetConfig, run: Run) -> list[Example]:
        return load_preferences(source, run.tokenizer, self.config.seed)
