"""A reward model from pairs of a preferred and a rejected answer.

arealite run examples/arealite/hhrlhf_rw.py --config examples/arealite/hhrlhf_rw.yaml
"""

import sys

from arealite.api.cli_args import RWConfig
from arealite.api.load_config import load_config
from arealite.supervised import RWTrainer

if __name__ == "__main__":
    RWTrainer(load_config(sys.argv[1:], RWConfig)).train()
