"""The Hugging Face causal language model as the trainer calls it: packed tokens in, logprobs out.

Called by engine/fsdp_engine.py. The head is applied inside the module's forward, where FSDP has gathered its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from arealite.api.errors import ConfigError
from arealite.api.types import Batch
from arealite.engine.attention import ATTENTION
from arealite.engine.loading import build_model
from arealite.engine.logprobs import token_logprobs
from arealite.engine.micro_batch import MicroBatch, Part, cut, part
from arealite.engine.parallel.ranks import RankMesh
from arealite.kernels import cpu
from arealite.kernels.functions import for_device, recomputing
from arealite.kernels.modules import fuse, fuse_linears
from arealite.models.fidelity import Rows, check_fidelity
from arealite.models.opening import open_config

# Rotary embeddings that are others for all tokens of a forward pass once one of them stands far enough in its sequence
ROPES_BY_LONGEST = {"dynamic", "longrope"}


class PackedModel(nn.Module):
    """`model` is any transformers causal language model whose attention goes through its attention interface.

    Where several ranks share the tokens of a micro-batch (`mesh`), this one computes those of its place (micro_batch.
    part). What a subclass makes of its rows comes together in `gather`. On a pipeline's stages before the last one the
    hidden states themselves are the result; they are `received` on the stage that follows.
    """

    def __init__(self, model: Any, mesh: RankMesh | None = None) -> None:
        super().__init__()
        self.model = model
        self.mesh = mesh
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
        """What `head` returns; on stages before the last one what `hidden` does."""
        hidden = self.hidden(micro, received)
        is_last = self.mesh is None or self.mesh.is_last_stage
        return self.head(hidden, micro, temperature) if is_last else hidden

    def head(self, hidden: torch.Tensor, micro: MicroBatch, temperature: float) -> tuple[torch.Tensor, ...]:
        """A tuple of tensors, the same on every place, from last hidden states as `hidden` returns them."""
        raise NotImplementedError

    def hidden(self, micro: MicroBatch, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """[1, N / n, H] last hidden states of this place's tokens, in the compute dtype. N: the S nodes and padding up
        to a multiple of the number of places n. `inputs_embeds` [1, N / n, H] takes the place of the embedding."""
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

    def rows(self, hidden: torch.Tensor, micro: MicroBatch, own: Part) -> torch.Tensor:
        """[R', H]: of `hidden` (as above) this place's predicting nodes, micro.predicting[own.rows]; maybe none."""
        return hidden[0].index_select(0, micro.predicting[own.rows] - own.nodes.start)

    def own(self, micro: MicroBatch) -> Part:
        return part(micro, self.place, self.num_places)

    def gather(self, values: torch.Tensor, own: slice, num_values: int) -> torch.Tensor:
        """[num_values] of all places from this place's, which are the slice `own`. Differentiable: a gradient of the
        whole is the same on all places, and each takes its slice."""
        if self._tokens is None:
            return values
        gathered: torch.Tensor = _Gather.apply(values, own, num_values, self._tokens)
        return gathered


class _Gather(torch.autograd.Function):
    """See PackedModel.gather. A sum with zeros: a few numbers per token, and places have different numbers of them."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, own: slice, num_values: int, group: Any) -> torch.Tensor:
        ctx.own = own
        whole = values.new_zeros(num_values)
        whole[own] = values
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad[ctx.own], None, None, None


class PackedLanguageModel(PackedModel):
    def __init__(self, model: Any, chunk: int, mesh: RankMesh | None = None) -> None:
        """`chunk`: logit rows that exist at one time."""
        super().__init__(model, mesh)
        self.chunk = chunk

    def head(self, hidden: torch.Tensor, micro: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 logp [P] of the targets and entropy [R] of the predicting nodes, on every place all of them."""
        own = self.own(micro)
        logp, entropy = token_logprobs(
            self.rows(hidden, micro, own),
            self.model.get_output_embeddings().weight,
            micro.row_of[own.pairs] - own.rows.start,
            micro.targets[own.pairs],
            temperature,
            self.chunk,
        )
        return (
            self.gather(logp, own.pairs, len(micro.targets)),
            self.gather(entropy, own.rows, len(micro.predicting)),
        )


def _language_model(model: Any) -> PackedModel:
    return PackedLanguageModel(model, chunk=64)


def load_model(
    folder: str,
    auto_class: Any = AutoModelForCausalLM,
    num_labels: int | None = None,
    packed: Callable[[Any], PackedModel] = _language_model,
) -> Any:
    """The model of a Hugging Face folder or hub id in float32, without dropout; its parameters have no memory yet
    (loading.py). `auto_class` and `num_labels` say which head it has, `packed` how it will be called.

    Raises:
        ConfigError: the path holds no such model, or its architecture cannot be trained on packed sequences.
    """
    config = open_config(folder, **({} if num_labels is None else {"num_labels": num_labels}))
    ropes = config.get_text_config(decoder=True).to_dict().get("rope_parameters") or {}
    kinds = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}  # one, or by layers
    if by_longest := sorted(ROPES_BY_LONGEST & kinds):
        raise ConfigError(
            f"{folder} has rotary embeddings of rope_type {by_longest[0]}, which depend on the longest sequence of a"
            " forward pass; packed with a longer one, a sequence would get other logprobs than alone. Choose a model"
            " whose rope_type is default, linear, llama3 or yarn"
        )
    check_fidelity(config, auto_class, ATTENTION, lambda tiny, rows: _packed_scores(packed(tiny), rows), folder)
    model = build_model(folder, config, auto_class, attn_implementation=ATTENTION)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    return model.eval()


def _packed_scores(packed: PackedModel, rows: Rows) -> Rows:
    """models/fidelity.py's Pass: all rows in one micro-batch."""
    starts = np.cumsum([0, *map(len, rows)])
    tokens = torch.cat(rows)
    num = len(rows)
    batch = Batch(
        tokens=tokens.cpu().numpy(),
        loss_mask=~np.isin(np.arange(len(tokens)), starts),
        logprobs=np.zeros(len(tokens), np.float32),
        versions=np.zeros(len(tokens), np.int32),
        cu_seqlens=starts,
        group_ids=np.zeros(num, np.int64),
        rewards=np.zeros(num),
        truncated=np.zeros(num, np.bool_),
        num_groups=1,
        task_ids=[""] * num,
    )
    [micro] = cut(batch, len(tokens), tokens.device)
    scores = packed(micro, 1.0)[0]
    return list(scores[torch.from_numpy(np.argsort(micro.at))].split([len(row) - 1 for row in rows]))
