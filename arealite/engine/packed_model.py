"""A Hugging Face model as the trainer calls it: packed tokens in, what its head says of the loss tokens out.

Called by engine/sharded_model.py. The head is applied inside the module's forward, where FSDP has gathered its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from arealite.api.errors import ConfigError
from arealite.engine.attention import ATTENTION
from arealite.engine.loading import Checkpoint, build_model
from arealite.engine.logprobs import token_logprobs
from arealite.engine.micro_batch import MicroBatch, assemble, places_of
from arealite.engine.parallel.layers import communicate
from arealite.engine.parallel.ranks import RankMesh
from arealite.kernels import cpu
from arealite.kernels.functions import for_device, recomputing
from arealite.kernels.modules import fuse, fuse_linears
from arealite.models.fidelity import Rows, check_fidelity
from arealite.models.folder import open_config

# Rotary embeddings that are others for all tokens of a forward pass once one of them stands far enough in its sequence
ROPES_BY_LONGEST = {"dynamic", "longrope"}


@dataclass(frozen=True)
class Head:
    """What a model says of tokens, and where transformers has it.

    `says(model, hidden [R, H], row_of [P], targets [P], temperature, chunk)`: float32 tensors [P] for P tokens, each
    with its row, ascending; `chunk`: logit rows that exist at one time. `may_lack`: patterns of tensors that only one
    of checkpoint and model may have.
    """

    auto_class: Any
    says: Callable[..., tuple[torch.Tensor, ...]]
    num_labels: int | None = None
    may_lack: tuple[str, ...] = ()


def _logprobs(
    model: Any, hidden: torch.Tensor, row_of: torch.Tensor, targets: torch.Tensor, temperature: float, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets' logprobs and the entropies of what predicts them."""
    weight = model.get_output_embeddings().weight
    logp, entropy = token_logprobs(hidden, weight, row_of, targets, temperature, chunk)
    return logp, entropy.index_select(0, row_of)


def _values(model: Any, hidden: torch.Tensor, row_of: torch.Tensor, *_: Any) -> tuple[torch.Tensor]:
    """The value at the node that predicts each token, by the one label's linear layer, `score`."""
    bias = None if model.score.bias is None else model.score.bias.float()
    return (functional.linear(hidden.float(), model.score.weight.float(), bias)[:, 0].index_select(0, row_of),)


LANGUAGE = Head(AutoModelForCausalLM, _logprobs)
VALUE = Head(AutoModelForTokenClassification, _values, 1, (r"^score\.", r"^lm_head\."))  # one number per token
REWARD = Head(AutoModelForSequenceClassification, _values, 1, VALUE.may_lack)


class PackedModel(nn.Module):
    """`model` is any transformers model with this `head` whose attention goes through its attention interface.

    Where several ranks share the tokens of a micro-batch (`mesh`), this one computes those of its place
    (micro_batch.places_of), and what the head says comes together on all. On a pipeline's stages before the last one
    the hidden states themselves are the result; they are `received` on the stage that follows.
    """

    def __init__(self, model: Any, head: Head = LANGUAGE, chunk: int = 64, mesh: RankMesh | None = None) -> None:
        super().__init__()
        self.model, self.head, self.chunk, self.mesh = model, head, chunk, mesh
        self.place, self.num_places = (0, 1) if mesh is None else (mesh.token_place, mesh.num_token_places)
        # Taken here, on all ranks: making a group is a collective call, and not all stages of a pipeline gather.
        self._tokens = None if mesh is None or self.num_places == 1 else mesh.tokens.get_group()
        device = torch.device("cpu") if mesh is None else mesh.device
        kernels = for_device(device)
        if device.type == "cpu":
            fuse_linears(model, cpu.load())
        if kernels is not None:
            fuse(model, kernels)
        self._computing = nullcontext if kernels is None else recomputing

    def forward(self, micro: MicroBatch, temperature: float, received: torch.Tensor | None = None) -> Any:
        """A tuple of float32 [P], what the head says of the micro-batch's P loss tokens, on every place all of them; on
        stages before the last one [1, N / n, H], the hidden states of this place's tokens in the compute dtype.

        N: the S nodes and padding up to a multiple of the number of places n. `received` [1, N / n, H] takes the place
        of the embedding.
        """
        hidden = self._hidden(micro, received)
        if self.mesh is not None and not self.mesh.is_last_stage:
            return hidden
        here = places_of(micro, self.place, self.num_places)
        rows = hidden[0].index_select(0, micro.predicting[here.rows] - here.nodes.start)
        row_of, targets = micro.row_of[here.pairs] - here.rows.start, micro.targets[here.pairs]
        scores = self.head.says(self.model, rows, row_of, targets, temperature, self.chunk)
        return tuple(self._gather(values, here.pairs, len(micro.targets)) for values in scores)

    def _hidden(self, micro: MicroBatch, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        context, contexts = (0, 1) if self.mesh is None else (self.mesh.context_rank, self.mesh.dims.c)
        extra = -len(micro.tokens) % self.num_places
        tokens, positions = (functional.pad(x, (0, extra)) for x in (micro.tokens, micro.positions))
        with self._computing():
            out = self.model.base_model(
                input_ids=tokens.view(self.num_places, -1)[self.place, None] if inputs_embeds is None else None,
                inputs_embeds=inputs_embeds,
                position_ids=positions.view(contexts, -1)[context, None],  # attention gathers over tensor ranks
                use_cache=False,
                tree_layout=micro.layout,
            )
        return out.last_hidden_state

    def _gather(self, values: torch.Tensor, own: slice, num_values: int) -> torch.Tensor:
        """[num_values] of all places from this place's, which are the slice `own`. A gradient of the whole is the same
        on all places, and each takes its slice."""
        if self._tokens is None:
            return values
        return communicate(values, partial(_whole, self._tokens, own, num_values), lambda grad: grad[own])


def _whole(group: Any, own: slice, num_values: int, values: torch.Tensor) -> torch.Tensor:
    """A sum with zeros: a few numbers per token, and places have different numbers of them."""
    whole = values.new_zeros(num_values)
    whole[own] = values
    dist.all_reduce(whole, group=group)
    return whole


def load_model(folder: str, head: Head = LANGUAGE) -> Any:
    """The model of a Hugging Face folder or hub id in float32, without dropout; its parameters have no memory yet
    (loading.py).

    Raises:
        ConfigError: the path holds no such model, or its architecture cannot be trained on packed sequences.
    """
    config = open_config(folder, **({} if head.num_labels is None else {"num_labels": head.num_labels}))
    ropes = config.get_text_config(decoder=True).to_dict().get("rope_parameters") or {}
    kinds = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}  # one, or by layers
    if by_longest := sorted(ROPES_BY_LONGEST & kinds):
        raise ConfigError(
            f"{folder} has rotary embeddings of rope_type {by_longest[0]}, which depend on the longest sequence of a"
            " forward pass; packed with a longer one, a sequence would get other logprobs than alone. Choose a model"
            " whose rope_type is default, linear, llama3 or yarn"
        )
    check_fidelity(config, head.auto_class, ATTENTION, partial(_packed_scores, head), folder)
    model = build_model(folder, config, head.auto_class, attn_implementation=ATTENTION)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    return model.eval()


@torch.no_grad()
def zero_new_head(model: Any, checkpoint: Checkpoint) -> None:
    """What the checkpoint of a language model lacks of a value head: all values are 0 then."""
    for name, tensor in model.named_parameters():
        if name not in checkpoint:
            tensor.zero_()


def _packed_scores(head: Head, tiny: Any, rows: Rows) -> Rows:
    """models/fidelity.py's Pass: all rows in one micro-batch."""
    tokens, lengths = torch.cat(rows), [len(row) for row in rows]
    begins = np.cumsum([0, *lengths[:-1]])
    wanted = [np.arange(1, length) for length in lengths]
    micro = assemble(tokens.cpu().numpy(), begins, wanted, np.arange(len(rows)), tokens.device)
    scores = PackedModel(tiny, head)(micro, 1.0)[0]
    return list(scores[torch.from_numpy(np.argsort(micro.at))].split([length - 1 for length in lengths]))
