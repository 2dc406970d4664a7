"""GRPO on programs: the model writes small Python functions, and a sandbox runs each against the tests of its row.

    arealite run examples/arealite/code_grpo.py --config examples/arealite/code_grpo.yaml

No reward is given here: rows with tests of programs are graded by `code_reward` (docs/data.md).
"""

import sys

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config
from arealite.trainer import PPOTrainer


def main(argv: list[str]) -> None:
    PPOTrainer(load_config(argv, GRPOConfig)).train()


if __name__ == "__main__":
    main(sys.argv[1:])
