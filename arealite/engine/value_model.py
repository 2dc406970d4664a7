"""A language model that says one number per token instead of the next one: critics and reward models.

Base of engine/ppo/critic.py and engine/rw/reward_engine.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForTokenClassification

from arealite.api.cli_args import TrainEngineConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Batch, Dims
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.micro_batch import MicroBatch
from arealite.engine.model import PackedModel, load_model


class PackedValueModel(PackedModel):
    """`model` is a transformers classification model with one label, whose head is its linear layer `score`."""

    def head(self, hidden: torch.Tensor, micro: MicroBatch, temperature: float) -> tuple[torch.Tensor]:
        """float32 [P]: for each loss token the value at the node that predicts it, on every place all of them."""
        own, score = self.own(micro), self.model.score
        bias = None if score.bias is None else score.bias.float()
        values = functional.linear(self.rows(hidden, micro, own).float(), score.weight.float(), bias)[:, 0]
        return (self.gather(values, own.rows, len(micro.predicting)).index_select(0, micro.row_of),)


def load_value_model(folder: str, auto_class: Any) -> Any:
    """As load_model."""
    return load_model(folder, auto_class, num_labels=1, packed=PackedValueModel)


class FSDPValueEngine(FSDPEngine):
    """An FSDPEngine whose model has a value head; made from a language model, the head starts at zero, so that all
    values are 0. The model is saved and loaded as transformers' class of `auto_class`."""

    auto_class: Any = AutoModelForTokenClassification
    other_heads = (r"^score\.", r"^lm_head\.")

    def __init__(self, config: TrainEngineConfig, trainable: bool = True, dims: Dims | None = None) -> None:
        super().__init__(config, trainable, dims)
        if config.lora is not None:
            raise ConfigError("lora is given for a model with a value head, which needs all of its weights: remove it")

    def _build_model(self) -> Any:
        return load_value_model(self.folder, self.auto_class)

    def _packed_model(self) -> PackedModel:
        return PackedValueModel(self.hf_model, self.mesh)

    def initialize(self) -> None:
        super().initialize()
        with torch.no_grad():
            for name, tensor in self.hf_model.named_parameters():
                if name not in self._checkpoint:
                    tensor.zero_()

    def compute_values(self, batch: Batch) -> np.ndarray:
        """float32 [T]: for each loss token the value of what stands before it; 0 elsewhere. Collective."""
        return self._score(batch, 1.0, "compute_values")
