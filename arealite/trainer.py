"""The loop of GRPO, and of PPO, with everything around it: probe, checkpoints, evaluation, recovery, metrics, summary.

Scripts that need no loop of their own call `PPOTrainer(config, reward_fn).train()`; the loop itself, spelled out, is
examples/arealite/gsm8k_grpo.py. Every trainer rank runs this code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters, GRPOConfig
from arealite.api.errors import ConfigError
from arealite.api.protocols import RolloutWorkflow
from arealite.api.types import Group
from arealite.dataset.loader import StatefulDataLoader, load_tasks, load_tokenizer
from arealite.engine.checkpoint import Saver
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.ppo.actor import FSDPPPOActor, PolicyLoss, grpo_loss_fn
from arealite.engine.ppo.critic import FSDPPPOCritic
from arealite.engine.recover import RecoverHandler
from arealite.engine.roles import OtherShares, TrainedTogether, Turns
from arealite.evaluation.evaluator import Evaluator
from arealite.launcher.allocation import AllocationMode, trainer_dims
from arealite.observe import waits
from arealite.observe.run_folder import RunFolder
from arealite.observe.stats_logger import StatsLogger
from arealite.observe.summary import report
from arealite.observe.timeline import StatsTracker, timeline
from arealite.reward.pool import RewardFunction
from arealite.rollout.client import RemoteInferenceEngine, RemoteNativeEngine, RemoteSGLangEngine, RemotevLLMEngine
from arealite.weights.handshake import MismatchGuard
from arealite.weights.link import WeightLink
from arealite.workflow.rlvr import RLVRWorkflow

ENGINES: dict[str, Callable[..., RemoteInferenceEngine]] = {
    "native": RemoteNativeEngine,
    "sglang": RemoteSGLangEngine,
    "vllm": RemotevLLMEngine,
}


def remote_engine(config: GRPOConfig) -> RemoteInferenceEngine:
    """The client that speaks the wire protocol of the allocation's inference backend."""
    component = AllocationMode.parse(config.allocation_mode).inference
    assert component is not None, "the launcher's plan refuses a GRPO run without inference servers"
    return ENGINES[component.backend](config.rollout, seed=config.seed)


# Makes a workflow of how it is to sample, for training or for held-out tasks, and the policy's tokenizer: any callable,
# such as a class.
WorkflowMaker = Callable[[GenerationHyperparameters, PreTrainedTokenizerBase], RolloutWorkflow]


class PPOTrainer:
    """One rank of a run: owns the policy, the rollout client and the records of the run.

    Args:
        reward_fn: what single-turn answers are worth (workflow/rlvr.py); not needed beside a `workflow`.
        should_accept: whether to train on a group; called on rank 0.
        workflow: makes what runs the episodes; or one object, which then runs those of held-out tasks as well.
        loss_fn: the loss of the policy, as in engine/ppo/actor.py.
    """

    def __init__(
        self,
        config: GRPOConfig,
        reward_fn: RewardFunction | None = None,
        should_accept: Callable[[Group], bool] | None = None,
        *,
        workflow: RolloutWorkflow | WorkflowMaker | None = None,
        loss_fn: PolicyLoss = grpo_loss_fn,
    ) -> None:
        waits.configure_from_env()
        self.config = config
        self.should_accept = should_accept
        self.folder = RunFolder.of(config)
        self.tokenizer = load_tokenizer(config)
        self._workflows: list[RolloutWorkflow] = []
        self._make_workflow = partial(self._add_workflow, workflow, reward_fn)
        self.workflow = self._make_workflow(config.gconfig)  # refuses what is wrong before anything loads

        self.actor = FSDPPPOActor(config.actor, trainer_dims(config), loss_fn)
        self.actor.initialize()
        self.collective = self.actor.collective
        self.is_head = self.collective.rank == 0
        timeline.open(self.folder, config.stats_logger.timeline, self.collective.rank)
        self.ref: FSDPEngine | None = None
        if config.ref is not None:
            self.ref = FSDPEngine(config.ref, trainable=False, dims=trainer_dims(config, "ref"))
            self.ref.initialize()
            self.ref_shares = OtherShares(self.actor, self.ref)
        self.critic: FSDPPPOCritic | None = None
        self.trained: FSDPPPOActor | TrainedTogether = self.actor
        if config.critic is not None:
            self.critic = FSDPPPOCritic(config.critic, trainer_dims(config, "critic"))
            self.critic.initialize()
            self.critic_shares = OtherShares(self.actor, self.critic)
            self.trained = TrainedTogether(self.actor, self.critic)

        self.rollout = remote_engine(config)
        self.rollout.initialize(self.collective)
        self.actor.connect_engine(self.rollout, WeightLink(config.weight_update, self.folder.root / "weights"))

        engines = [e for e in (self.actor, self.ref, self.critic) if e is not None]
        self.turns = Turns(self.rollout, *engines)

        self.dataloader = StatefulDataLoader(
            load_tasks(config.train_dataset, self.tokenizer, config.seed, reward_fn), config
        )
        self.total_steps = self.dataloader.total_steps
        self.actor.plan_steps(self.total_steps)
        if self.critic is not None:
            self.critic.plan_steps(self.total_steps)
        self.stats = StatsTracker()
        self.logger = StatsLogger(self.folder, config.stats_logger, self.total_steps)
        self.guard = MismatchGuard(config.stats_logger, config.gconfig)
        self.saver = Saver(config.saver, self.folder, self.tokenizer)
        self.recover = RecoverHandler(config.recover, self.folder, config)
        self.evaluator = self._make_evaluator(reward_fn)

    def _add_workflow(
        self,
        workflow: RolloutWorkflow | WorkflowMaker | None,
        reward_fn: RewardFunction | None,
        gconfig: GenerationHyperparameters,
    ) -> RolloutWorkflow:
        if workflow is None:
            if reward_fn is None:
                raise ConfigError("PPOTrainer was given neither a reward_fn nor a workflow: give one of them")
            limit, rollout = self.config.server.context_length, self.config.rollout
            workflow = RLVRWorkflow(reward_fn, gconfig, self.tokenizer, config=rollout, context_length=limit)
        elif callable(workflow):
            workflow = workflow(gconfig, self.tokenizer)
        if not isinstance(workflow, RolloutWorkflow):
            raise ConfigError(
                f"workflow is a {type(workflow).__name__}; expected arun_episode and close, as in api/protocols.py"
            )
        if workflow not in self._workflows:
            self._workflows.append(workflow)
        return workflow

    def _make_evaluator(self, reward_fn: RewardFunction | None) -> Evaluator | None:
        config = self.config
        if config.valid_dataset is None:
            return None
        tasks = load_tasks(config.valid_dataset, self.tokenizer, config.seed, reward_fn)
        workflow = self._make_workflow(config.eval_gconfig)
        return Evaluator(config.evaluator, self.folder, self.rollout, workflow, tasks, self.collective)

    def train(self) -> None:
        """Run all steps that are left and write the summary.

        Consumes: finished groups. Produces: weights, checkpoints, metrics. Waits for: `consumer_batch_size` groups
        within the staleness bound (a named wait of the rollout head). Unblocked by: servers finishing answers, or by
        an error of the rollout head.
        """
        try:
            with self.recover.session(self.trained, self.rollout, self.dataloader) as step:
                self.saver.begin(step, self.recover.epoch, self.trained, self.total_steps)
                self.actor.upload_weights()
                if self.evaluator is not None:
                    self.evaluator.frequency.restart(self.recover.epoch)
                    if step == 0:
                        self.evaluator.maybe_evaluate(step, 0)
                if self.is_head:
                    self.logger.begin(step)
                while step < self.total_steps:
                    self.train_step(step)
                    step += 1
                    self.after_step(step)
            self.finish()
        finally:
            self.close()

    def train_step(self, step: int) -> None:
        """One step: a batch, its advantages, the update, and the new weights on the servers."""
        stats = self.stats
        timeline.begin_step(step)
        with stats.timer("step"):
            with stats.timer("rollout_wait"), self.turns.of_servers():
                batch = self.rollout.prepare_batch(self.dataloader, self.workflow, self.should_accept)
            with stats.timer("probe"):
                stats.update(self.guard.check(step, batch, self.actor, self.rollout))
            with self.turns.of_trainer():
                with stats.timer("train"):
                    if self.actor.needs_prox_logp:
                        batch.prox_logp = self.actor.compute_logp(batch)
                    if self.ref is not None:
                        batch.ref_logp = self.ref_shares.score(batch, self.ref.compute_logp)
                    if self.critic is not None:
                        batch.values = self.critic_shares.score(batch, self.critic.compute_values)
                    self.actor.compute_advantages(batch)
                    update = self.actor.grpo_update(batch)
                    if self.critic is not None:
                        learned = self.critic.ppo_update(self.critic_shares.batch(batch))
                        stats.update({f"critic_{name}": value for name, value in learned.items()})
                self.rollout.mark_trained(step, self.actor.untrained)
                with stats.timer("sync"):
                    self.actor.upload_weights()  # pauses generation for the swap
        stats.update(update)

    def after_step(self, step: int) -> None:
        """Everything that happens between steps; `step` counts finished ones."""
        epoch, last = step // self.dataloader.steps_per_epoch, step == self.total_steps
        with self.stats.timer("save"):
            self.saver.maybe_save(step, epoch, self.trained, last)
        if self.evaluator is not None:
            with self.stats.timer("eval"):
                result = self.evaluator.maybe_evaluate(step, epoch, last)
            if result is not None:
                self.stats.scalar("eval_accuracy", result.accuracy)
        if self.is_head:
            self.stats.update(self.rollout.stats())
            self.logger.commit(step - 1, epoch, self.stats.export(), self.rollout.last_groups, self.tokenizer)
        self.recover.maybe_save(step, epoch, self.trained, self.rollout, self.dataloader, last)

    def finish(self) -> None:
        """The summary, the plot, and the table for the person who started the run."""
        if self.is_head:
            self.logger.close()
            report(self.folder)

    def close(self) -> None:
        self.rollout.destroy()
        for workflow in self._workflows:
            workflow.close()
        self.actor.destroy()
