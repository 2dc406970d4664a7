"""One Hugging Face model on the trainer ranks: scoring, updates, weights out, recovery. For scripts, ppo/actor.py."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import TrainEngineConfig
from arealite.api.errors import ArealiteError, ConfigError, NumericalError, WeightSyncError
from arealite.api.protocols import InferenceEngine
from arealite.api.types import Batch, Dims, WeightUpdateMeta
from arealite.devices import wait_for
from arealite.engine import recover
from arealite.engine.determinism import be_deterministic
from arealite.engine.flops import peak_flops
from arealite.engine.micro_batch import MicroBatch, Uncut, check_tokens, columns_of, count_loss, cut, idle
from arealite.engine.optim import clip_gradients, gradient_norms, learning_rate, not_finite
from arealite.engine.packed_model import LANGUAGE, Head
from arealite.engine.parallel.pipeline import from_last_stage, with_tied_sum
from arealite.engine.parallel.ranks import PASS_LIMITS, RankCollective, RankMesh, join_ranks, pick_device
from arealite.engine.sharded_model import ShardedModel, build_sharded
from arealite.engine.training_stats import Update, summary
from arealite.engine.upload import Upload
from arealite.observe import waits
from arealite.observe.timeline import span
from arealite.weights.link import WeightLink

logger = logging.getLogger(__name__)

# (micro-batch, *what the model's head says of its tokens [P], over=counts of all ranks, **columns [P]) -> (loss,
# statistics). Over micro-batches and ranks statistics are added up; of those whose name ends in _max the largest is
# taken. It is asked about micro-batches with tokens only.
LossFn = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


class FSDPEngine:
    """Every method but the properties is a collective call: all ranks of the run, same order. Where other models have
    ranks of their own, most do nothing on these (`is_here` False).

    `version` counts the weights: 0 at the start, one more after every step of training.
    """

    def __init__(
        self,
        config: TrainEngineConfig,
        trainable: bool = True,
        dims: Dims | None = None,
        head: Head = LANGUAGE,
        updates_per_step: int = 1,
        uncut: Uncut = "sequence",
        layouts: tuple[Dims, ...] = (),
    ) -> None:
        """`dims`: how the model is spread, and over which ranks; over all of them by data if not given. `uncut`:
        what must be in one micro-batch. `layouts`: of a run where models have ranks of their own, how each
        set of ranks shares out a batch, in their order."""
        if head is not LANGUAGE and config.lora is not None:
            raise ConfigError("lora is given for a model with a value head, which needs all of its weights: remove it")
        self.config, self.trainable, self._dims, self._layouts = config, trainable, dims, layouts
        self.head, self.updates_per_step, self._uncut = head, updates_per_step, uncut
        self.temperature: float = 1.0 if config.temperature is None else config.temperature
        if not self.temperature > 0:
            raise ConfigError("actor.temperature is 0: greedy answers have no logprobs to train on; set it above 0")
        self.version = self.num_updates = self._num_bad_updates = 0  # optimiser updates: applied; skipped in a row
        self._planned_steps: int | None = None
        self.before_upload: Callable[[], object] = lambda: None  # collective, while servers have the earlier weights
        self._made_group = False
        self._rollout: InferenceEngine | None = None
        self._mesh: RankMesh | None = None
        self._sharded: ShardedModel | None = None
        self._upload: Upload | None = None

    def initialize(self) -> None:
        """Join the ranks, load the model, shard it, make the optimizer."""
        config = self.config
        waits.configure_from_env()
        if config.deterministic:
            be_deterministic()
        device, limit_s = pick_device(), config.collective_timeout_s
        self._made_group = join_ranks(device, limit_s)
        world_size = dist.get_world_size()
        dims = self._dims or Dims(d=world_size)
        self._layouts = self._layouts or (dims,)
        num_ranks = sum(layout.size for layout in self._layouts)
        if num_ranks != world_size:
            raise ConfigError(
                f"the trainer's layout {'+'.join(map(str, self._layouts))} has {num_ranks} ranks and {world_size} were"
                " started: give allocation_mode and the number of processes the same product d x t x c x p"
            )
        self._mesh, ranks = RankMesh(dims, device, limit_s), RankCollective(limit_s, dims)
        if self._mesh.is_here:
            self._sharded = build_sharded(config, self._mesh, ranks, self.head, self.trainable)

    @property
    def sharded(self) -> ShardedModel:
        """The model on the ranks that have it, whole."""
        if self._sharded is None:
            why = "no model yet: call initialize() first" if self._mesh is None else "its model on other ranks"
            raise ArealiteError(f"{type(self).__name__} has {why}")
        return self._sharded

    @property
    def ranks(self) -> RankCollective:
        """Those that have the model."""
        return self.sharded.collective

    @cached_property
    def collective(self) -> RankCollective:
        """All ranks of the run. Collective when it is first asked for."""
        limit_s = self.config.collective_timeout_s * PASS_LIMITS
        return RankCollective(limit_s, *self._layouts) if self._is_among_others else self.ranks

    @property
    def mesh(self) -> RankMesh:
        return self.sharded.mesh if self._mesh is None else self._mesh

    @property
    def is_here(self) -> bool:
        """Whether this rank has a part of the model."""
        return self.mesh.is_here

    @property
    def _is_among_others(self) -> bool:
        return len(self._layouts) > 1

    def destroy(self) -> None:
        """Release shared memory and leave the ranks; also after an `initialize` that failed."""
        if self._upload is not None:
            self._upload.link.close()
            self._upload = None
        if self._made_group and dist.is_initialized():
            dist.destroy_process_group()

    def plan_steps(self, num_steps: int) -> None:
        """How many steps the whole run makes: where a linear or cosine schedule ends."""
        self._planned_steps = num_steps

    # --- passes over the data

    def compute_logp(self, batch: Batch, temperature: float | None = None) -> np.ndarray:
        """float32 [T] logprobs of the batch's tokens at `temperature` (config's if not given, else 1); 0 where
        loss_mask is False. NaN on ranks without the model."""
        return self._score(batch, self.temperature if temperature is None else temperature, "compute_logp")

    def _score(self, batch: Batch, temperature: float, what: str) -> np.ndarray:
        """float32 [T], the first thing that the model's head says of each loss token; 0 elsewhere."""
        if not self.is_here:
            return np.full(len(batch.tokens), np.nan, np.float32)
        out = np.zeros(len(batch.tokens), dtype=np.float32)
        kept: list[tuple[np.ndarray, torch.Tensor]] = []
        micro_batches = self._micro_batches(batch, what)
        with torch.no_grad():
            self.sharded.runner.run(
                micro_batches, temperature, lambda micro, *found: kept.append((micro.at, found[0])), what
            )
        for at, scores in kept:
            out[at] = scores.cpu().numpy()
        return from_last_stage(out, self.mesh, self.ranks)

    def compute_values(self, batch: Batch) -> np.ndarray:
        """float32 [T], of a model with a value head: for each loss token the value of what stands before it; 0
        elsewhere. Collective."""
        return self._score(batch, 1.0, "compute_values")

    def learn(
        self,
        batch: Batch,
        loss_fn: LossFn,
        columns: tuple[str, ...] = (),
        note: Callable[[Batch, Update | None], None] = lambda part, update: None,
    ) -> tuple[dict[str, float], list[Update]]:
        """A step of `updates_per_step` updates, each on its own groups; then the weights are another version.

        `note` hears of each part of the batch, and of its update if it has tokens in the loss. Returns the summary, and
        the updates. Collective. Raises as `update`.
        """
        started = time.perf_counter()
        part_of = batch.group_ids * self.updates_per_step // max(batch.num_groups, 1)
        updates: list[Update] = []
        for index in range(self.updates_per_step):
            part = batch.select(np.flatnonzero(part_of == index))
            update = self.update(part, loss_fn, columns)
            updates += [] if update is None else [update]
            note(part, update)
        self.version += 1
        took_s, peak = time.perf_counter() - started, peak_flops(self.mesh.device, self.sharded.dtype)
        return summary(updates, took_s, peak, self.ranks.world_size), updates

    def update(self, batch: Batch, loss_fn: LossFn, columns: tuple[str, ...] = ()) -> Update | None:
        """One optimiser update with the sum of `loss_fn` over all micro-batches of all ranks; None, and no update,
        where no token of any rank is in the loss. `columns`: names of the batch's arrays that `loss_fn` is given, as
        float32 [P] (None where the batch has none), those of sequences for each of their tokens.

        A NaN or infinite loss or gradient on any rank skips the update on all, with a warning that says where.

        Raises:
            NumericalError: as many updates in a row as `max_bad_steps` steps have were skipped.
        """
        sharded, optimizer, device = self.sharded, self.sharded.optimizer, self.mesh.device
        assert optimizer is not None, "the engine was made with trainable=False"
        over = count_loss(batch, self.ranks)
        if not over.num_tokens:
            return None
        lr = learning_rate(self.config.optimizer, self.num_updates, self._planned_steps, self.updates_per_step)
        told: dict[str, list[torch.Tensor]] = defaultdict(list)

        def compute(micro: MicroBatch, *scores: torch.Tensor) -> torch.Tensor:
            if len(micro.at):
                loss, parts = loss_fn(micro, *scores, over=over, **columns_of(batch, columns, micro, device))
            else:  # an idle rank, which takes part in the backward pass all the same
                loss, parts = scores[0].sum(), {}
            for name, value in {"loss": loss, **parts}.items():
                told[name].append(value.detach())
            return loss

        micro_batches = self._micro_batches(batch, "update")
        sharded.runner.run(micro_batches, self.temperature, compute, "update")
        flops = [sharded.flops.count(micro) for micro in micro_batches]
        for name, value in (("num_flops", sum(flops)), ("num_sequence_tokens", len(batch.tokens))):
            told[name].append(torch.tensor(value, dtype=torch.float64))
        statistics = self.ranks.reduce_columns(told)
        loss_sum = statistics.pop("loss")
        with self.ranks.computing("update"):
            norms = gradient_norms(with_tied_sum(sharded.parameters, sharded.tied, sharded.mesh), self.ranks.group)
        norm = math.hypot(*norms.values())
        skipped = not (math.isfinite(loss_sum) and math.isfinite(norm))
        if skipped:
            self._skip(batch, micro_batches, [float(x) for x in told["loss"]], loss_sum, norm)
        else:
            self._num_bad_updates = 0
            clip_gradients(sharded.parameters.values(), self.config.optimizer.max_grad_norm, norm)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with span("optimizer"), sharded.rounding.of_update(lr, norm):
                sharded.placement.step()
                wait_for(device)  # so that the update is over where its time is taken
            self.num_updates += 1
            if self._upload is not None:
                self._upload.is_changed |= lr > 0 and norm > 0
        optimizer.zero_grad(set_to_none=True)
        sharded.reshard()
        statistics |= {f"grad_norm_{group}": value for group, value in norms.items()}
        return Update(loss_sum, norm, lr, skipped, over, statistics)

    def _micro_batches(self, batch: Batch, what: str) -> list[MicroBatch]:
        """This rank's micro-batches, filled up with idle ones to the largest number on any rank, and to one."""
        self.ranks.barrier(what)
        check_tokens(batch, self.sharded.num_embeddings, self.sharded.folder)
        device = self.mesh.device
        own = cut(batch, self.config.max_tokens_per_mb, device, self.config.share_prompts, self._uncut)
        most = int(self.ranks.reduce(torch.tensor([max(len(own), 1)]), "max"))
        return own + [idle(device) for _ in range(most - len(own))]

    def _skip(
        self, batch: Batch, micro_batches: list[MicroBatch], losses: list[float], loss: float, norm: float
    ) -> None:
        """Count and explain a bad update; raise on all ranks at the configured number in a row."""
        self._num_bad_updates += 1
        where: list[str] = []
        bad = next((i for i, value in enumerate(losses) if not math.isfinite(value)), None)
        if bad is not None:
            tasks = sorted({batch.task_ids[s] for s in micro_batches[bad].sequences})
            where = [f"loss of micro-batch {bad} of {len(losses)} (tasks {', '.join(tasks[:8])}) is {losses[bad]}"]
        by_rank = self.ranks.gather("; ".join(where + not_finite(self.sharded.parameters)[:2]))
        told = (
            f"update {self.num_updates} skipped on all ranks ({self._num_bad_updates} in a row): "
            f"{'gradient' if math.isfinite(loss) else 'loss'} is not finite (loss {loss}, gradient norm {norm})"
        ) + "".join(f"\n  rank {rank}: {text}" for rank, text in enumerate(by_rank, self.mesh.dims.first) if text)
        if self.ranks.rank == 0:
            logger.warning(told)
        if self._num_bad_updates >= self.config.max_bad_steps * self.updates_per_step:
            raise NumericalError(
                f"{told}\nmax_bad_steps={self.config.max_bad_steps} reached: lower optimizer.lr or max_grad_norm, or"
                " look at the rewards and logprobs of these tasks"
            )

    # --- weights out

    def named_full_tensors(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As ShardedModel.named_full_tensors."""
        return self.sharded.named_full_tensors(dtype, device)

    def save(self, path: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """As ShardedModel.save."""
        if self.is_here:
            self.sharded.save(path, tokenizer)

    def connect_engine(self, rollout: InferenceEngine, link: WeightLink) -> None:
        """Where `upload_weights` sends the weights, and by which way."""
        self._rollout = rollout
        if self.is_here:
            self._upload = Upload(self.sharded, rollout, link)

    def upload_weights(self, meta: WeightUpdateMeta | None = None) -> int:
        """Publish the weights as the current version, have all servers load them, and verify that they did. Generation
        is paused for the swap alone, or stays paused if it is. `meta` None: publish over the link. Otherwise the
        weights that it describes are already published. Returns the version. Raises WeightSyncError (or what the
        servers' client raises) on all ranks.
        """
        if self._upload is None and self.is_here:
            raise WeightSyncError("no inference engine to send weights to: call connect_engine(rollout, link) first")
        self.before_upload()
        sent = self.version if self._upload is None else self._upload.send(self.version, meta)
        if self._is_among_others:
            sent = self.collective.broadcast(sent)
        if not self.is_here and self._rollout is not None:
            self.version = sent
            self._rollout.set_version(sent)
        return sent

    # --- turns with the servers on one accelerator

    def sleep(self) -> None:
        """Leave the accelerator's memory to others until `wake`: shards and moments go to the CPU, and copies that were
        gathered for the passes are dropped. Only `wake`, recovery and the end may follow."""
        if self.is_here:
            self.sharded.reshard()
            self.sharded.placement.sleep()

    def wake(self) -> None:
        if self.is_here:
            self.sharded.placement.wake()

    # --- recovery

    @cached_property
    def background(self) -> RankCollective:
        """As Trained.background. Collective when it is first asked for, as `_writers` is."""
        return RankCollective(self.config.collective_timeout_s, *self._layouts)

    @cached_property
    def _writers(self) -> RankCollective:
        """The ranks that have the model, for the thread that writes."""
        limit_s = self.config.collective_timeout_s
        return RankCollective(limit_s, self.mesh.dims) if self._is_among_others else self.background

    def stage_state(self, path: str) -> Callable[[], None]:
        """Copy weights, moments, counters and random numbers of all ranks; returns the call that writes them under
        `path`, for a thread of its own. Only that call raises OSError or RuntimeError when they cannot be written."""
        writers = self._writers
        if not self.is_here:
            return lambda: None
        counters = {"version": self.version, "num_updates": self.num_updates, "num_bad_updates": self._num_bad_updates}
        return recover.stage_state(path, self.sharded.parameters, self.sharded.optimizer, counters, writers)

    def save_state(self, path: str) -> None:
        """`stage_state` and write at once."""
        try:
            self.stage_state(path)()
        finally:  # a rank with a full disk must not leave the others waiting here
            self.collective.barrier("save_state")

    def load_state(self, path: str) -> None:
        """Go on exactly where `save_state` was called. Raises RecoveryError."""
        if not self.is_here:
            return
        sharded = self.sharded
        counters = recover.load_state(path, sharded.parameters, sharded.optimizer, sharded.collective)
        self.version, self.num_updates = counters["version"], counters["num_updates"]
        self._num_bad_updates = counters["num_bad_updates"]
        if self._upload is not None:
            self._upload.forget()
        sharded.reshard()
