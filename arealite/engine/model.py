"""The Hugging Face causal language model as the trainer calls it: packed tokens in, logprobs out.

Called by engine/fsdp_engine.py. The head is applied inside this module's forward, where FSDP has gathered its weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from arealite.api.errors import ConfigError
from arealite.engine.attention import ATTENTION
from arealite.engine.logprobs import token_logprobs
from arealite.engine.micro_batch import MicroBatch

HEAD_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


class PackedLanguageModel(nn.Module):
    """`model` is any transformers causal language model whose attention goes through its attention interface."""

    def __init__(self, model: Any, chunk: int) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk

    def forward(self, micro: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 logp [P] of the targets and entropy [R] of the predicting nodes."""
        hidden = self.model.base_model(
            input_ids=micro.tokens[None],
            position_ids=micro.positions[None],
            use_cache=False,
            tree_layout=micro.layout,
        ).last_hidden_state[0]
        head = self.model.get_output_embeddings()
        rows = hidden.index_select(0, micro.predicting)
        return token_logprobs(rows, head.weight, micro.row_of, micro.targets, temperature, self.chunk)


def load_model(folder: str) -> Any:
    """The model of a Hugging Face folder or hub id on CPU in float32, without dropout.

    Raises:
        ConfigError: the path holds no such model, or its architecture cannot be trained on packed sequences.
    """
    where = folder if Path(folder).is_dir() else f"{folder} (not a local folder, so a hub id)"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=ATTENTION, low_cpu_mem_usage=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"no causal language model can be loaded from {where}: {error}") from error
    settings = model.config.to_dict()
    others = sorted(set(settings.get("layer_types") or ()) - ATTENTION_LAYERS)
    if not model._supports_attention_backend or model._is_stateful or others:
        why = f"its layers are {', '.join(others)}" if others else "it does not use transformers' attention interface"
        raise ConfigError(
            f"tokens of {type(model).__name__} see each other outside of full attention ({why}), so its sequences"
            " cannot be packed; choose another architecture"
        )
    special = [key for key in HEAD_SETTINGS if settings.get(key) not in (None, 1.0)]
    special += ["lm_head.bias"] if model.get_output_embeddings().bias is not None else []
    if special:
        raise ConfigError(f"the head of {where} uses {', '.join(special)}, which packed training does not compute yet")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    return model.eval()
