"""Supervised fine-tuning on GSM8K's worked answers.

arealite run examples/arealite/gsm8k_sft.py --config examples/arealite/gsm8k_sft.yaml
"""

import sys

from arealite.api.cli_args import SFTConfig
from arealite.api.load_config import load_config
from arealite.supervised import SFTTrainer

if __name__ == "__main__":
    SFTTrainer(load_config(sys.argv[1:], SFTConfig)).train()
