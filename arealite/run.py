"""One `Run` around every training loop: folder, metrics, checkpoints, evaluation, recovery, and the end of it all.

Used by trainer.py (GRPO and PPO), supervised.py (answers, preferences) and scripts with a loop of their own, such as
examples/arealite/gsm8k_grpo.py, on every trainer rank:

    with Run(config) as run:
        actor = run.open(FSDPPPOActor(config.actor))
        run.begin(actor, dataloader, rollout)
        for step in run.steps(evaluate):
            run.stats.update(actor.grpo_update(...))
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

from arealite.api.cli_args import RunConfig
from arealite.api.protocols import Stateful, Trained
from arealite.api.types import Group
from arealite.dataset.loader import StatefulDataLoader, load_tokenizer
from arealite.engine.checkpoint import Saver
from arealite.engine.recover import RecoverHandler
from arealite.observe import waits
from arealite.observe.frequency import Frequency
from arealite.observe.run_folder import RunFolder
from arealite.observe.stats_logger import StatsLogger
from arealite.observe.summary import report
from arealite.observe.timeline import StatsTracker, timeline


class Opened(Protocol):
    """An engine or a client of servers; `destroy` also undoes an `initialize` that failed half way."""

    def initialize(self, *args: Any) -> None: ...

    def destroy(self) -> None: ...


class Closed(Protocol):
    """A workflow, or what else ends with the run."""

    def close(self) -> None: ...


class Rollout(Stateful, Protocol):
    """What a run records of its rollout client: numbers, the groups of the last step, the state for recovery points."""

    last_groups: list[Group]

    def stats(self) -> dict[str, float]: ...


AnyOpened = TypeVar("AnyOpened", bound=Opened)
AnyClosed = TypeVar("AnyClosed", bound=Closed)

logger = logging.getLogger(__name__)

# Measures the weights after so many steps on what is held out, or begins to; held-out numbers that are there, by name.
# On all ranks.
Evaluate = Callable[[int], Mapping[str, float]]


class Run:
    """One rank of a run. A context manager: however its block ends, all that was opened in it is closed, the last
    opened first, and records that are whole stay so.

    Ctrl-C and SIGTERM end the block where nothing is lost by it (engine/recover.py) with SystemExit. A block that ends
    well has the summary written and shown.
    """

    def __init__(self, config: RunConfig) -> None:
        waits.configure_from_env()
        self.config = config
        self.folder = RunFolder.of(config)
        self.tokenizer = load_tokenizer(config)
        self.stats = StatsTracker()  # of the step that is being made
        self._stack = ExitStack()
        self._saver = Saver(config.saver, self.folder, self.tokenizer)
        self._evaluation = Frequency(config.evaluator)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def open(self, part: AnyOpened, *args: Any) -> AnyOpened:
        """`part.initialize(*args)`; its `destroy` is called at the end of the run, also when this fails."""
        self._stack.push(partial(_end, part.destroy))
        part.initialize(*args)
        return part

    def closing(self, part: AnyClosed) -> AnyClosed:
        """`part`, whose `close` is called at the end of the run."""
        self._stack.push(partial(_end, part.close))
        return part

    def begin(self, trained: Trained, dataloader: StatefulDataLoader[Any], rollout: Rollout | None = None) -> None:
        """Go on where a killed or stopped run was, or at the beginning. Call it once, when all is open and before the
        first upload of weights. Collective.

        Raises:
            RecoveryError: the folder holds another run, or recovery points of which none is complete.
        """
        self._trained, self._dataloader, self._rollout = trained, dataloader, rollout
        self.collective, self.total_steps = trained.collective, dataloader.total_steps
        self.is_head = self.collective.rank == 0
        if self.is_head:  # what agents of a killed trainer left
            shutil.rmtree(self.folder.agents_dir, ignore_errors=True)
        timeline.open(self.folder, self.config.stats_logger.timeline, self.collective.rank)
        self._logger = StatsLogger(self.folder, self.config.stats_logger, self.total_steps)
        self._stack.push(self._report)
        trained.plan_steps(self.total_steps)
        self._recover = RecoverHandler(self.config, self.folder, trained, rollout, dataloader)
        self._next = self._stack.enter_context(self._recover.session())
        self._saver.begin(self._next, self._recover.epoch, trained, self.total_steps)
        self._evaluation.restart(self._recover.epoch)

    def steps(self, evaluate: Evaluate | None = None) -> Iterator[int]:
        """The steps that are left, counted from 0; the block of each is timed as `step_s`. After it: checkpoint,
        evaluation, metrics (what is in `stats`, and what the rollout client says) and recovery point, each when due."""
        if evaluate is not None and ((self._next == 0 and self.config.evaluator.at_start) or self._owes_evaluation()):
            evaluate(self._next)
        if self.is_head:
            self._logger.begin(self._next)
        for step in range(self._next, self.total_steps):
            timeline.begin_step(step)
            with self.stats.timer("step"):
                yield step
            self._end_step(step + 1, evaluate)

    def _end_step(self, finished: int, evaluate: Evaluate | None) -> None:
        epoch, last = finished // self._dataloader.steps_per_epoch, finished == self.total_steps
        with self.stats.timer("save"):
            self._saver.maybe_save(finished, epoch, self._trained, last)
        if evaluate is not None and self._evaluation.due(
            finished, epoch, self.collective, last and self.config.evaluator.at_end
        ):
            with self.stats.timer("eval"):
                self.note_evaluation(evaluate(finished))
        stats = self.stats.export()
        if self.is_head:
            groups = None if self._rollout is None else self._rollout.last_groups
            told = self._dataloader.stats() | ({} if self._rollout is None else self._rollout.stats())
            self._logger.commit(finished - 1, epoch, stats | told, groups, self.tokenizer)
        # Last of all, because what comes after it is done again after a kill.
        self._recover.maybe_save(finished, epoch, last)

    def note_evaluation(self, numbers: Mapping[str, float]) -> None:
        """Held-out numbers, for the line of the step that is being made."""
        self.stats.update({f"eval_{name}": value for name, value in numbers.items()})

    def _owes_evaluation(self) -> bool:
        """Whether one of these weights had begun when the run was killed. Collective."""
        owed: bool = self.collective.on_head(self.folder.owed_evaluation(self._next).is_file)
        return owed

    def _report(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.is_head:
            self._logger.close()
            if kind is None:
                report(self.folder)


def _end(end: Callable[[], None], _: object, error: BaseException | None, __: object) -> None:
    try:
        end()
    except Exception:  # of what ends after an error; that error is what the run's owner is to see
        if error is None:
            raise
        logger.warning("at the end of a run that failed", exc_info=True)
