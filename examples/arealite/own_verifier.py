"""GRPO on rows that say themselves how answers are graded: here programs (code.yaml), or what was told (needle.yaml).

    arealite run examples/arealite/own_verifier.py --config examples/arealite/code.yaml

No reward is given: rows with tests of programs are graded by `code_reward`, others by their `verifier` (docs/data.md).
"""

import sys

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config
from arealite.trainer import PPOTrainer


def main(argv: list[str]) -> None:
    PPOTrainer(load_config(argv, GRPOConfig)).train()


if __name__ == "__main__":
    main(sys.argv[1:])
