"""Whether an architecture can be trained and served, asked of the code that would: `python -m arealite.prove.trial
MODEL KIND [DTYPE]` prints the reason and ends with 2 where not. DTYPE is that of built-in servers, if there are any.

Started by the launcher, which imports no torch.
"""

from __future__ import annotations

import sys

import torch

from arealite.api.errors import ConfigError
from arealite.engine.packed_model import LANGUAGE, REWARD, load_model
from arealite.inference.core.served_model import check_architecture
from arealite.models.folder import open_config


def main(path: str, kind: str, dtype: str = "") -> None:
    """Raises ConfigError."""
    load_model(path, REWARD if kind == "rw" else LANGUAGE)
    if dtype:
        check_architecture(open_config(path), path, None, False, getattr(torch, dtype), torch.device("cpu"))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ConfigError as error:
        print(error)
        sys.exit(2)
