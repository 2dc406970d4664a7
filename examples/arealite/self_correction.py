"""Two tries: after a wrong answer the model is told so, and answers once more.

arealite run examples/arealite/self_correction.py --config examples/arealite/self_correction.yaml
"""

import sys

from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters, GRPOConfig
from arealite.api.load_config import load_config
from arealite.reward.number import number_reward
from arealite.trainer import PPOTrainer
from arealite.workflow.multi_turn import MultiTurnWorkflow


def workflow(gconfig: GenerationHyperparameters, tokenizer: PreTrainedTokenizerBase) -> MultiTurnWorkflow:
    return MultiTurnWorkflow(number_reward, gconfig, tokenizer, max_turns=2, turn_discount=0.8)


def main(argv: list[str]) -> None:
    PPOTrainer(load_config(argv, GRPOConfig), workflow=workflow).train()


if __name__ == "__main__":
    main(sys.argv[1:])
