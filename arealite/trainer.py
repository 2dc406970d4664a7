"""The loop of GRPO, and of PPO where there is a critic, for scripts that need none of their own.

Scripts call `PPOTrainer(config, reward_fn).train()`. The same loop, spelled out from the same pieces, is
examples/arealite/gsm8k_grpo.py. Every trainer rank runs this code.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters, GRPOConfig
from arealite.api.errors import ConfigError
from arealite.api.protocols import RolloutWorkflow
from arealite.api.types import Group
from arealite.dataset.loader import StatefulDataLoader, load_tasks
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.ppo.actor import FSDPPPOActor, PolicyLoss, grpo_loss_fn
from arealite.engine.ppo.critic import FSDPPPOCritic
from arealite.engine.roles import Critic, Reference, TrainedTogether, Turns
from arealite.evaluation.evaluator import Evaluator
from arealite.launcher.allocation import AllocationMode, trainer_dims, trainer_layouts
from arealite.reward.named import named_reward
from arealite.reward.pool import RewardFunction
from arealite.rollout.client import ENGINES, RemoteInferenceEngine
from arealite.run import Evaluate, Run
from arealite.weights.handshake import MismatchGuard
from arealite.weights.link import WeightLink
from arealite.workflow.agents import AgentWorkflow
from arealite.workflow.rlvr import RLVRWorkflow
from arealite.workflow.runners import AgentRunner

# Makes a workflow of how it is to sample, for training or for held-out tasks, and the policy's tokenizer: any callable,
# such as a class.
WorkflowMaker = Callable[[GenerationHyperparameters, PreTrainedTokenizerBase], RolloutWorkflow]


def open_models(
    run: Run, config: GRPOConfig, loss_fn: PolicyLoss = grpo_loss_fn
) -> tuple[FSDPPPOActor, Reference | None, Critic | None]:
    """The policy, and the reference and the critic where `config` has them; each in its layout, on the policy's ranks
    or on its own, as `config.allocation_mode` says. All ranks have all these objects, and make the same calls."""
    layouts = trainer_layouts(config)
    actor = run.open(FSDPPPOActor(config.actor, trainer_dims(config), loss_fn, layouts))
    reference, critic = None, None
    if config.ref is not None:
        dims = trainer_dims(config, "ref")
        reference = Reference(actor, run.open(FSDPEngine(config.ref, trainable=False, dims=dims, layouts=layouts)))
    if config.critic is not None:
        critic = Critic(actor, run.open(FSDPPPOCritic(config.critic, trainer_dims(config, "critic"), layouts)))
    return actor, reference, critic


def open_rollout(run: Run, config: GRPOConfig, actor: FSDPPPOActor) -> RemoteInferenceEngine:
    """The client of the allocation's servers, which `actor.upload_weights` sends to."""
    component = AllocationMode.parse(config.allocation_mode).inference
    assert component is not None, "the launcher's plan refuses a GRPO run without inference servers"
    rollout = run.open(ENGINES[component.backend](config.rollout, seed=config.seed), actor.collective)
    actor.connect_engine(rollout, WeightLink(config.weight_update, run.folder.root / "weights"))
    return rollout


def rlvr_workflow(run: Run, config: GRPOConfig, reward_fn: RewardFunction, held_out: bool = False) -> RLVRWorkflow:
    """Single-turn answers to training tasks, or to `held_out` ones, with `reward_fn`'s reward."""
    gconfig, limit = config.eval_gconfig if held_out else config.gconfig, config.server.context_length
    return run.closing(RLVRWorkflow(reward_fn, gconfig, run.tokenizer, config=config.rollout, context_length=limit))


def agent_workflow(config: GRPOConfig, runner: AgentRunner, reward_fn: RewardFunction | None = None) -> WorkflowMaker:
    """For PPOTrainer: agents that `runner` runs, within the limits of `config`."""

    def make(gconfig: GenerationHyperparameters, tokenizer: PreTrainedTokenizerBase) -> RolloutWorkflow:
        return AgentWorkflow(
            runner, gconfig, tokenizer, gateway=config.gateway, reward_fn=reward_fn, config=config.rollout
        )

    return make


def open_evaluation(
    run: Run,
    config: GRPOConfig,
    actor: FSDPPPOActor,
    rollout: RemoteInferenceEngine,
    workflow: RolloutWorkflow,
    reward_fn: RewardFunction | None,
) -> Evaluate | None:
    """What `run.steps` calls to ask the held-out tasks with `workflow`; None where `config` has none.

    They are asked beside the next step's rollouts and training. The upload at its end waits for the answers that are
    left, so that all of them are by the weights that were to be measured; the numbers stand in that step's line.
    """
    if config.valid_dataset is None:
        return None
    tasks = load_tasks(config.valid_dataset, run.tokenizer, config.seed, reward_fn)
    evaluator = Evaluator(run.folder, rollout, workflow, tasks, actor.collective)

    def finish() -> dict[str, float]:
        result = evaluator.finish()
        return {} if result is None else result.metrics()

    def before_upload() -> None:
        if evaluator.is_running:
            with run.stats.timer("eval"):
                run.note_evaluation(finish())

    def measure(step: int) -> dict[str, float]:
        numbers = finish()  # where a step uploads nothing
        evaluator.begin(step)
        # After the last step no upload comes, and servers that take turns with the trainer stand still in a step.
        is_alone = step == run.total_steps or AllocationMode.parse(config.allocation_mode).colocated
        return finish() if is_alone else numbers

    actor.before_upload = before_upload
    return measure


class PPOTrainer:
    """One rank of a run: what it learns from, and the loop.

    Args:
        reward_fn: what single-turn answers are worth (workflow/rlvr.py); not needed beside a `workflow`, or where the
            data set has a verifier of its own (dataset/catalog.py).
        should_accept: whether to train on a group; called on rank 0.
        workflow: makes what runs the episodes; or one object, which then runs those of held-out tasks as well.
        loss_fn: the loss of the policy, as in engine/ppo/actor.py.

    Raises:
        ConfigError: the workflow or the reward_fn cannot be used.
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
        if workflow is None and reward_fn is None:
            reward_fn = named_reward
        if workflow is not None and not callable(workflow):
            _check_workflow(workflow)
        self.config = config
        self.reward_fn = reward_fn
        self.should_accept = should_accept
        self.workflow = workflow
        self.loss_fn = loss_fn

    def train(self) -> None:
        """Run all steps that are left and write the summary.

        Consumes: finished groups. Produces: weights, checkpoints, metrics. Waits for: `consumer_batch_size` groups
        within the staleness bound (a named wait of the rollout head). Unblocked by: servers finishing answers, or by
        an error of the rollout head.
        """
        config = self.config
        with Run(config) as run:
            workflow = self._workflow(run)  # refuses what is wrong before any model loads
            tasks = load_tasks(config.train_dataset, run.tokenizer, config.seed, self.reward_fn)
            held_out_workflow = self._workflow(run, held_out=True) if config.valid_dataset is not None else workflow
            actor, reference, critic = open_models(run, config, self.loss_fn)
            rollout = open_rollout(run, config, actor)
            turns = Turns(rollout, actor, reference, critic)
            guard = MismatchGuard(config.stats_logger, config.gconfig)
            dataloader = StatefulDataLoader(tasks, config)
            evaluate = open_evaluation(run, config, actor, rollout, held_out_workflow, self.reward_fn)

            run.begin(actor if critic is None else TrainedTogether(actor, critic.critic), dataloader, rollout)
            actor.upload_weights()
            stats = run.stats
            for step in run.steps(evaluate):
                with stats.timer("rollout_wait"), turns.of_servers():
                    batch = rollout.prepare_batch(dataloader, workflow, self.should_accept)
                with stats.timer("probe"):
                    stats.update(guard.check(step, batch, actor, rollout))
                with turns.of_trainer():
                    with stats.timer("train"):
                        if actor.needs_prox_logp:
                            batch.prox_logp = actor.compute_logp(batch)
                        if reference is not None:
                            batch.ref_logp = reference.compute_logp(batch)
                        if critic is not None:
                            batch.values = critic.compute_values(batch)
                        actor.compute_advantages(batch)
                        stats.update(actor.grpo_update(batch))
                        if critic is not None:
                            stats.update(critic.ppo_update(batch))
                    rollout.mark_trained(step, actor.untrained)
                    with stats.timer("sync"):
                        actor.upload_weights()  # pauses generation for the swap

    def _workflow(self, run: Run, held_out: bool = False) -> RolloutWorkflow:
        """What runs the episodes of training tasks, or of `held_out` ones."""
        workflow = self.workflow
        if workflow is None:
            assert self.reward_fn is not None, "the constructor refuses neither of them"
            return rlvr_workflow(run, self.config, self.reward_fn, held_out)
        if callable(workflow):
            workflow = workflow(self.config.eval_gconfig if held_out else self.config.gconfig, run.tokenizer)
            _check_workflow(workflow)
        elif held_out:
            return workflow  # one object for both, closed once
        return run.closing(workflow)


def _check_workflow(workflow: object) -> None:
    """Raises ConfigError."""
    if not isinstance(workflow, RolloutWorkflow):
        raise ConfigError(
            f"workflow is a {type(workflow).__name__}; expected arun_episode and close, as in api/protocols.py"
        )
