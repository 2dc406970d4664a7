"""The first run: a small pretrained chat model learns single-digit addition on a laptop's CPU.

    arealite run examples/arealite/quickstart.py --config examples/arealite/quickstart.yaml

The whole of GRPO is in arealite/trainer.py; the same loop, spelled out, is gsm8k_grpo.py beside this file.
"""

import sys

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config
from arealite.reward.number import number_reward
from arealite.trainer import PPOTrainer


def main(argv: list[str]) -> None:
    config = load_config(argv, GRPOConfig)
    PPOTrainer(config, reward_fn=number_reward).train()


if __name__ == "__main__":
    main(sys.argv[1:])
