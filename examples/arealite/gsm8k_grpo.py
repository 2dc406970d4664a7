"""GRPO on GSM8K, with the training loop spelled out: change what you like between two lines.

    arealite run examples/arealite/gsm8k_grpo.py --config examples/arealite/gsm8k_grpo.yaml

Every trainer rank runs this file; `prepare_batch` hands each rank its share of one batch of finished groups.
"""

import sys

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config
from arealite.dataset.loader import StatefulDataLoader, load_tasks, load_tokenizer
from arealite.engine.checkpoint import Saver
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.engine.recover import RecoverHandler
from arealite.engine.roles import Turns
from arealite.evaluation.evaluator import Evaluator
from arealite.observe import waits
from arealite.observe.run_folder import RunFolder
from arealite.observe.stats_logger import StatsLogger
from arealite.observe.summary import report
from arealite.observe.timeline import timeline
from arealite.reward.math import gsm8k_reward
from arealite.trainer import remote_engine, trainer_dims
from arealite.weights.handshake import MismatchGuard
from arealite.weights.link import WeightLink
from arealite.workflow.rlvr import RLVRWorkflow


def main(argv: list[str]) -> None:
    config = load_config(argv, GRPOConfig)
    waits.configure_from_env()
    folder = RunFolder.of(config)
    tokenizer = load_tokenizer(config)

    actor = FSDPPPOActor(config.actor, trainer_dims(config))
    actor.initialize()
    rollout = remote_engine(config)  # RemoteSGLangEngine, RemoteNativeEngine: as allocation_mode says
    rollout.initialize(actor.collective)
    actor.connect_engine(rollout, WeightLink(config.weight_update, folder.root / "weights"))
    turns = Turns(rollout, actor)  # with servers on the same accelerators

    dataloader = StatefulDataLoader(load_tasks(config.train_dataset, tokenizer, config.seed, gsm8k_reward), config)
    workflow = RLVRWorkflow(gsm8k_reward, config.gconfig, tokenizer, config=config.rollout)
    eval_workflow = RLVRWorkflow(gsm8k_reward, config.eval_gconfig, tokenizer, config=config.rollout)
    held_out = config.valid_dataset and load_tasks(config.valid_dataset, tokenizer, config.seed, gsm8k_reward)
    evaluator = Evaluator(config.evaluator, folder, rollout, eval_workflow, held_out or [], actor.collective)
    guard = MismatchGuard(config.stats_logger, config.gconfig)
    saver = Saver(config.saver, folder, tokenizer)
    recover = RecoverHandler(config.recover, folder, config)
    num_steps = dataloader.total_steps
    actor.plan_steps(num_steps)
    timeline.open(folder, config.stats_logger.timeline, actor.collective.rank)
    logger = StatsLogger(folder, config.stats_logger, num_steps)

    try:
        with recover.session(actor, rollout, dataloader) as start:  # a killed or stopped run goes on where it was
            saver.begin(start, recover.epoch, actor, num_steps)
            evaluator.frequency.restart(recover.epoch)
            actor.upload_weights()
            if start == 0:
                evaluator.maybe_evaluate(0, 0)
            for step in range(start, num_steps):
                timeline.begin_step(step)
                with turns.of_servers():
                    batch = rollout.prepare_batch(dataloader, workflow)  # rollout_batch(tasks, workflow) is synchronous
                mismatch = guard.check(step, batch, actor, rollout)
                with turns.of_trainer():
                    if actor.needs_prox_logp:  # a single update per step computes them anyway
                        batch.prox_logp = actor.compute_logp(batch)
                    actor.compute_advantages(batch)
                    stats = actor.grpo_update(batch)
                    rollout.mark_trained(step, actor.untrained)
                    actor.upload_weights()  # generation pauses for the swap alone

                epoch, last = (step + 1) // dataloader.steps_per_epoch, step + 1 == num_steps
                saver.maybe_save(step + 1, epoch, actor, last)
                evaluator.maybe_evaluate(step + 1, epoch, last)
                if actor.collective.rank == 0:
                    logger.commit(step, epoch, stats | mismatch | rollout.stats(), rollout.last_groups, tokenizer)
                recover.maybe_save(step + 1, epoch, actor, rollout, dataloader, last)  # while training goes on
        if actor.collective.rank == 0:
            logger.close()
            report(folder)
    finally:
        rollout.destroy()
        workflow.close()
        eval_workflow.close()
        actor.destroy()


if __name__ == "__main__":
    main(sys.argv[1:])
