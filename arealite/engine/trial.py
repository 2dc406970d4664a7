"""Whether a model's architecture can be trained, asked of the code that would: `python -m arealite.engine.trial MODEL
KIND` prints the reason and ends with 2 where not. Started by the launcher, which imports no torch.
"""

from __future__ import annotations

import sys

from transformers import AutoModelForSequenceClassification

from arealite.api.errors import ConfigError
from arealite.engine.model import load_model
from arealite.engine.value_model import load_value_model

if __name__ == "__main__":
    try:
        if sys.argv[2] == "rw":
            load_value_model(sys.argv[1], AutoModelForSequenceClassification)
        else:
            load_model(sys.argv[1])
    except ConfigError as error:
        print(error)
        sys.exit(2)
