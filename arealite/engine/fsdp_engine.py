"""One Hugging Face model on the trainer ranks: scoring, updates, weights out, recovery. For scripts, ppo/actor.py."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import TrainEngineConfig
from arealite.api.errors import ConfigError, NumericalError, WeightSyncError
from arealite.api.protocols import InferenceEngine
from arealite.api.types import Batch, Dims, WeightUpdateMeta
from arealite.engine import export, recover
from arealite.engine.determinism import be_deterministic
from arealite.engine.flops import ModelFlops, peak_flops
from arealite.engine.loading import Checkpoint, materialize
from arealite.engine.lora import add_adapters, base_name, file_name, freeze
from arealite.engine.memory import CPU, Placement, checkpoint_activations, wait_for
from arealite.engine.micro_batch import MicroBatch, check_tokens, columns_of, count_loss, cut, idle
from arealite.engine.optim import (
    RoundingWatch,
    clip_gradients,
    gradient_norms,
    learning_rate,
    make_optimizer,
    not_finite,
)
from arealite.engine.packed_model import LANGUAGE, Head, PackedModel, load_model, zero_new_head
from arealite.engine.parallel.pipeline import Runner, from_last_stage, over_stages, split_stages, with_tied_sum
from arealite.engine.parallel.ranks import RankCollective, RankMesh, join_ranks, pick_device
from arealite.engine.parallel.spread import parallelize
from arealite.engine.training_stats import Update, summary
from arealite.models.fetch import resolve_model
from arealite.models.naming import hub_tensors
from arealite.observe import waits
from arealite.observe.timeline import span
from arealite.weights.link import WeightLink, unchanged, verify
from arealite.weights.wire import checksum

logger = logging.getLogger(__name__)

# (micro-batch, *what the model's head says of its tokens [P], over=counts of all ranks, **columns [P]) -> (loss,
# statistics). Over micro-batches and ranks statistics are added up; of those whose name ends in _max the largest is
# taken. It is asked about micro-batches with tokens only.
LossFn = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


class FSDPEngine:
    """Every method but the properties is a collective call: all ranks, same order.

    `version` counts the weights: 0 at the start, one more after every step of training.
    """

    collective: RankCollective

    def __init__(
        self,
        config: TrainEngineConfig,
        trainable: bool = True,
        dims: Dims | None = None,
        head: Head = LANGUAGE,
        updates_per_step: int = 1,
        keep_groups: bool = False,
    ) -> None:
        """`dims`: how the model is spread over the ranks; over all of them by data if not given. `keep_groups`: whether
        a group must be in one micro-batch."""
        if head is not LANGUAGE and config.lora is not None:
            raise ConfigError("lora is given for a model with a value head, which needs all of its weights: remove it")
        self.config, self.trainable, self._dims = config, trainable, dims
        self.head, self.updates_per_step, self._keep_groups = head, updates_per_step, keep_groups
        self.dtype: torch.dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]
        self.temperature: float = 1.0 if config.temperature is None else config.temperature
        if not self.temperature > 0:
            raise ConfigError("actor.temperature is 0: greedy answers have no logprobs to train on; set it above 0")
        self.version = self.num_updates = self._num_bad_updates = 0  # optimiser updates: applied; skipped in a row
        self._planned_steps: int | None = None
        self._adapter: dict[str, Any] | None = None  # LoRA: what PEFT's adapter_config.json says
        self.before_upload: Callable[[], object] = lambda: None  # collective, while servers have the earlier weights
        self._rollout: InferenceEngine | None = None
        self._link: WeightLink | None = None
        self._sent: WeightUpdateMeta | None = None
        self._changed_since_sent = self._made_group = False

    def initialize(self) -> None:
        """Join the ranks, load the model, shard it, make the optimizer."""
        config = self.config
        waits.configure_from_env()
        if config.deterministic:
            be_deterministic()
        self.device = pick_device()
        self._made_group = join_ranks(self.device, config.collective_timeout_s)
        dims = self._dims or Dims(d=dist.get_world_size())
        self.mesh = RankMesh(dims, self.device, config.collective_timeout_s)
        self.collective = RankCollective(config.collective_timeout_s, dims)
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(config.seed + self.collective.rank)
        self.folder = resolve_model(config.path)
        self.hf_model = load_model(self.folder, self.head)
        self._checkpoint = Checkpoint(self.folder, self.hf_model, self.head.may_lack)
        if not self.trainable or config.lora is not None:
            freeze(self.hf_model, self.dtype)
        if self.trainable and config.lora is not None:
            self._adapter = add_adapters(self.hf_model, config.lora, config.seed)
        self._flops = ModelFlops.of(self.hf_model)
        self._num_embeddings = int(self.hf_model.get_input_embeddings().weight.shape[0])
        self._tied = split_stages(self.hf_model, self.mesh)
        checkpoint_activations(self.hf_model, config.gradient_checkpointing if self.trainable else "none")
        self.model = PackedModel(self.hf_model, self.head, config.logprob_chunk_tokens, self.mesh)
        self._runner = Runner(self.model, self.mesh, self.collective, self.dtype)
        self.model._apply(lambda t: t if t.is_meta else t.to(self.device))  # buffers, adapters
        is_offloaded = config.offload == "all"
        self._sharded = parallelize(self.model, self.hf_model, self.mesh, self.dtype, is_offloaded)
        materialize(self.model, CPU if is_offloaded else self.device)
        self._checkpoint.load({base_name(name): t for name, t in self.hf_model.state_dict(keep_vars=True).items()})
        if self.head is not LANGUAGE:
            zero_new_head(self.hf_model, self._checkpoint)
        # Taken here, because modules hold the gathered compute copies instead between the passes.
        # Those that are trained: with LoRA, the adapters alone.
        self._parameters = {n: p for n, p in self.hf_model.named_parameters() if p.requires_grad == self.trainable}
        self.optimizer = make_optimizer(self._parameters.values(), config.optimizer) if self.trainable else None
        self._rounding = RoundingWatch(self._parameters.values(), self.dtype)
        self._placement = Placement(self.model, self.optimizer, self.device, config.offload)

    def destroy(self) -> None:
        """Release shared memory and leave the ranks."""
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._made_group and dist.is_initialized():
            dist.destroy_process_group()

    def plan_steps(self, num_steps: int) -> None:
        """How many steps the whole run makes: where a linear or cosine schedule ends."""
        self._planned_steps = num_steps

    # --- passes over the data

    def compute_logp(self, batch: Batch, temperature: float | None = None) -> np.ndarray:
        """float32 [T] logprobs of the batch's tokens at `temperature` (config's if not given, else 1); 0 where
        loss_mask is False."""
        return self._score(batch, self.temperature if temperature is None else temperature, "compute_logp")

    def _score(self, batch: Batch, temperature: float, what: str) -> np.ndarray:
        """float32 [T], the first thing that the model's head says of each loss token; 0 elsewhere."""
        out = np.zeros(len(batch.tokens), dtype=np.float32)
        kept: list[tuple[np.ndarray, torch.Tensor]] = []
        micro_batches = self._micro_batches(batch, what)
        with torch.no_grad():
            self._runner.run(micro_batches, temperature, lambda micro, *found: kept.append((micro.at, found[0])), what)
        for at, scores in kept:
            out[at] = scores.cpu().numpy()
        return from_last_stage(out, self.mesh, self.collective)

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
        took_s, peak = time.perf_counter() - started, peak_flops(self.device, self.dtype)
        return summary(updates, took_s, peak, self.collective.world_size), updates

    def update(self, batch: Batch, loss_fn: LossFn, columns: tuple[str, ...] = ()) -> Update | None:
        """One optimiser update with the sum of `loss_fn` over all micro-batches of all ranks; None, and no update,
        where no token of any rank is in the loss. `columns`: names of the batch's arrays that `loss_fn` is given, as
        float32 [P] (None where the batch has none), those of sequences for each of their tokens.

        A NaN or infinite loss or gradient on any rank skips the update on all, with a warning that says where.

        Raises:
            NumericalError: as many updates in a row as `max_bad_steps` steps have were skipped.
        """
        assert self.optimizer is not None, "the engine was made with trainable=False"
        over = count_loss(batch, self.collective)
        if not over.num_tokens:
            return None
        lr = learning_rate(self.config.optimizer, self.num_updates, self._planned_steps, self.updates_per_step)
        told: dict[str, list[torch.Tensor]] = defaultdict(list)

        def compute(micro: MicroBatch, *scores: torch.Tensor) -> torch.Tensor:
            if len(micro.at):
                loss, parts = loss_fn(micro, *scores, over=over, **columns_of(batch, columns, micro, self.device))
            else:  # an idle rank, which takes part in the backward pass all the same
                loss, parts = scores[0].sum(), {}
            for name, value in {"loss": loss, **parts}.items():
                told[name].append(value.detach())
            return loss

        micro_batches = self._micro_batches(batch, "update")
        self._runner.run(micro_batches, self.temperature, compute, "update")
        flops = [self._flops.count(micro) for micro in micro_batches]
        for name, value in (("num_flops", sum(flops)), ("num_sequence_tokens", len(batch.tokens))):
            told[name].append(torch.tensor(value, dtype=torch.float64))
        statistics = self.collective.reduce_columns(told)
        loss_sum = statistics.pop("loss")
        with self.collective.computing("update"):
            norms = gradient_norms(with_tied_sum(self._parameters, self._tied, self.mesh), self.device)
        norm = math.hypot(*norms.values())
        skipped = not (math.isfinite(loss_sum) and math.isfinite(norm))
        if skipped:
            self._skip(batch, micro_batches, [float(x) for x in told["loss"]], loss_sum, norm)
        else:
            self._num_bad_updates = 0
            clip_gradients(self._parameters.values(), self.config.optimizer.max_grad_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            with span("optimizer"), self._rounding.of_update(lr, norm):
                self._placement.step()
                wait_for(self.device)  # so that the update is over where its time is taken
            self.num_updates += 1
            self._changed_since_sent |= lr > 0 and norm > 0
        self.optimizer.zero_grad(set_to_none=True)
        for module in self._sharded:
            module.reshard()  # the compute copies are of the old weights
        statistics |= {f"grad_norm_{group}": value for group, value in norms.items()}
        return Update(loss_sum, norm, lr, skipped, over, statistics)

    def _micro_batches(self, batch: Batch, what: str) -> list[MicroBatch]:
        """This rank's micro-batches, filled up with idle ones to the largest number on any rank, and to one."""
        self.collective.barrier(what)
        check_tokens(batch, self._num_embeddings, self.folder)
        own = cut(batch, self.config.max_tokens_per_mb, self.device, self.config.share_prompts, self._keep_groups)
        most = int(self.collective.reduce(torch.tensor([max(len(own), 1)]), "max"))
        return own + [idle(self.device) for _ in range(most - len(own))]

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
        by_rank = self.collective.gather("; ".join(where + not_finite(self._parameters)[:2]))
        told = (
            f"update {self.num_updates} skipped on all ranks ({self._num_bad_updates} in a row): "
            f"{'gradient' if math.isfinite(loss) else 'loss'} is not finite (loss {loss}, gradient norm {norm})"
        ) + "".join(f"\n  rank {rank}: {text}" for rank, text in enumerate(by_rank) if text)
        if self.collective.rank == 0:
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
        """(checkpoint name, whole tensor in `dtype` on `device`); tied weights once. By default the compute dtype, on
        the CPU. With LoRA: those of the adapter, by PEFT's names."""
        named = {} if self._adapter is None else {"name_of": file_name}
        own = export.full_tensors(self.hf_model, dtype or self.dtype, self.device, **named)
        place = device or torch.device("cpu")
        return ((name, tensor.to(place)) for name, tensor in over_stages(own, self.mesh, self.collective))

    def connect_engine(self, rollout: InferenceEngine, link: WeightLink) -> None:
        """Where `upload_weights` sends the weights, and by which way."""
        self._rollout, self._link = rollout, link

    def upload_weights(self, meta: WeightUpdateMeta | None = None) -> int:
        """Publish the weights as the current version, have all servers load them, and verify that they did. Generation
        is paused for the swap alone, or stays paused if it is. `meta` None: publish over the link. Otherwise the
        weights that it describes are already published. Returns the version. Raises WeightSyncError (or what the
        servers' client raises) on all ranks.
        """
        if self._rollout is None or self._link is None:
            raise WeightSyncError("no inference engine to send weights to: call connect_engine(rollout, link) first")
        rollout, link, is_head = self._rollout, self._link, self.collective.rank == 0
        self.before_upload()
        self.collective.barrier("upload_weights")
        failure: WeightSyncError | None = None
        if meta is None:
            # Names as the hub has them: SGLang and vLLM know no others, experts one by one; the native server both.
            tensors = hub_tensors(self.named_full_tensors(device=link.device), self._checkpoint.hub_parts)
            self.collective.on_head(rollout.prepare_update)
            try:
                meta = link.publish(tensors, self.version, writer=is_head, adapter=self._adapter)
            except WeightSyncError as error:
                failure = error
                for _ in tensors:  # the other ranks are gathering
                    pass

        must_differ = self._changed_since_sent and not self._is_rounded_away(meta)

        def load() -> WeightUpdateMeta:
            if failure is not None:
                raise failure
            assert meta is not None
            verify(meta, rollout.update_weights(meta, link), self._sent, must_differ)
            return meta

        self._sent = self.collective.on_head(load)
        self._changed_since_sent = False
        if not is_head:
            rollout.set_version(self._sent.version)
        return self._sent.version

    def _is_rounded_away(self, meta: WeightUpdateMeta | None) -> bool:
        """Whether the weights that are checked of `meta` (given on rank 0) round to what was sent last. Collective."""
        previous, name_of = self._sent, (lambda name: name) if self._adapter is None else file_name
        same = self.collective.broadcast(meta and previous and unchanged(meta, previous)) or {}
        own = [(p, same[n]) for name, p in self._parameters.items() if (n := name_of(name)) in same]
        found = [checksum(export.whole(p.detach().to(self.dtype))) == number for p, number in own]
        everywhere = [each for of_rank in self.collective.gather(found) for each in of_rank]
        return bool(everywhere) and all(everywhere)

    def save(self, path: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write a Hugging Face folder in the compute dtype, atomically; with LoRA the adapter in float32, in PEFT's
        format. `tokenizer` comes along, that of the model's own folder if not given. OSError on rank 0 when it cannot
        be written."""
        source = self.folder if tokenizer is None else tokenizer.name_or_path
        is_writer = self.collective.rank == 0
        if self._adapter is not None:
            adapter = {name: tensor for name, tensor in self.named_full_tensors(torch.float32) if is_writer}
            if is_writer:
                export.write_adapter_folder(path, adapter, self._adapter, source)
            return
        tensors = hub_tensors(self.named_full_tensors(), self._checkpoint.hub_parts)
        if is_writer:
            end_token = None if tokenizer is None else tokenizer.eos_token_id
            export.write_folder(path, tensors, self.hf_model, self.dtype, source, end_token)
        for _ in tensors:  # the writer is through already
            pass

    # --- turns with the servers on one accelerator

    def sleep(self) -> None:
        """Leave the accelerator's memory to others until `wake`: shards and moments go to the CPU, and copies that were
        gathered for the passes are dropped. Only `wake`, recovery and the end may follow."""
        for module in self._sharded:
            module.reshard()
        self._placement.sleep()

    def wake(self) -> None:
        self._placement.wake()

    # --- recovery

    @cached_property
    def background(self) -> RankCollective:
        """The same ranks, for the calls of one other thread."""
        return RankCollective(self.config.collective_timeout_s, self.mesh.dims)

    def stage_state(self, path: str) -> Callable[[], None]:
        """Copy weights, moments, counters and random numbers of all ranks; returns the call that writes them under
        `path`, for a thread of its own. Only that call raises OSError or RuntimeError when they cannot be written."""
        counters = {"version": self.version, "num_updates": self.num_updates, "num_bad_updates": self._num_bad_updates}
        return recover.stage_state(path, self._parameters, self.optimizer, counters, self.background)

    def save_state(self, path: str) -> None:
        """`stage_state` and write at once."""
        try:
            self.stage_state(path)()
        finally:  # a rank with a full disk must not leave the others waiting here
            self.collective.barrier("save_state")

    def load_state(self, path: str) -> None:
        """Go on exactly where `save_state` was called. Raises RecoveryError."""
        counters = recover.load_state(path, self._parameters, self.optimizer, self.collective)
        self.version, self.num_updates = counters["version"], counters["num_updates"]
        self._num_bad_updates = counters["num_bad_updates"]
        self._sent, self._changed_since_sent = None, False
        for module in self._sharded:
            module.reshard()
