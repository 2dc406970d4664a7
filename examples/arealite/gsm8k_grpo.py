"""GRPO on GSM8K, with the training loop spelled out: change what you like between two lines.

    arealite run examples/arealite/gsm8k_grpo.py --config examples/arealite/gsm8k_grpo.yaml

Every trainer rank runs this file; `prepare_batch` hands each rank its share of one batch of finished groups.
"""

import sys

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config
from arealite.dataset.loader import StatefulDataLoader, load_tasks
from arealite.engine.roles import TrainedTogether, Turns
from arealite.reward.math import gsm8k_reward
from arealite.run import Run
from arealite.trainer import open_evaluation, open_models, open_rollout, rlvr_workflow
from arealite.weights.handshake import MismatchGuard


def main(argv: list[str]) -> None:
    config = load_config(argv, GRPOConfig)
    with Run(config) as run:  # metrics, checkpoints, evaluation, recovery; closes all, however the block ends
        workflow = rlvr_workflow(run, config, gsm8k_reward)
        held_out_workflow = rlvr_workflow(run, config, gsm8k_reward, held_out=True)
        actor, ref, critic = open_models(run, config)  # a model that the configuration does not have is None
        rollout = open_rollout(run, config, actor)  # RemoteSGLangEngine, RemoteNativeEngine: as allocation_mode says
        turns = Turns(rollout, actor, ref, critic)  # with servers on the same accelerators
        guard = MismatchGuard(config.stats_logger, config.gconfig)
        tasks = load_tasks(config.train_dataset, run.tokenizer, config.seed, gsm8k_reward)
        dataloader = StatefulDataLoader(tasks, config)
        evaluate = open_evaluation(run, config, actor, rollout, held_out_workflow, gsm8k_reward)

        trained = actor if critic is None else TrainedTogether(actor, critic.critic)
        run.begin(trained, dataloader, rollout)  # a killed or stopped run goes on where it was
        actor.upload_weights()
        for step in run.steps(evaluate):
            with turns.of_servers():
                batch = rollout.prepare_batch(dataloader, workflow)  # rollout_batch(tasks, workflow) is synchronous
            run.stats.update(guard.check(step, batch, actor, rollout))
            with turns.of_trainer():
                if actor.needs_prox_logp:  # a single update per step computes them anyway
                    batch.prox_logp = actor.compute_logp(batch)
                if ref is not None:
                    batch.ref_logp = ref.compute_logp(batch)
                if critic is not None:
                    batch.values = critic.compute_values(batch)
                actor.compute_advantages(batch)
                run.stats.update(actor.grpo_update(batch))
                if critic is not None:
                    run.stats.update(critic.ppo_update(batch))
                rollout.mark_trained(step, actor.untrained)
                actor.upload_weights()  # generation pauses for the swap alone


if __name__ == "__main__":
    main(sys.argv[1:])
