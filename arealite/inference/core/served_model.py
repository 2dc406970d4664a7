"""The served model: the Hugging Face modelling code that the trainer runs, with attention over the page pool.

Loaded by serve.py, run by the engine thread. What cannot be served faithfully is refused here, before the server
listens (models/fidelity.py).
"""

from __future__ import annotations

import logging
from array import array
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AttentionInterface, AutoModelForCausalLM

from arealite.api.errors import ConfigError
from arealite.devices import is_gpu
from arealite.inference.core.adapters import Adapters
from arealite.inference.core.cache import PAGE_TOKENS, PagePool, pages_for
from arealite.inference.core.decoder import call_kernels
from arealite.inference.core.layout import ATTENTION_NAME, GpuLayout, KVLayout, ShapeProbe, packed_attention, to_device
from arealite.inference.core.requests import GenerateRequest, SamplingParams
from arealite.inference.core.sequence import Sequence, Span
from arealite.kernels.cpu import DIM_STEP, Kernels
from arealite.kernels.functions import AnyKernels, for_device, head_product
from arealite.kernels.linears import Joined, PackedLinears
from arealite.kernels.modules import fuse
from arealite.models.fidelity import Rows, check_fidelity, token_scores
from arealite.models.folder import open_config, open_tokenizer
from arealite.models.naming import hub_parts

logger = logging.getLogger(__name__)

AttentionInterface.register(ATTENTION_NAME, packed_attention)

HEAD_CHUNK = 256  # rows of [rows, vocabulary] logits that exist at one time when a whole prompt is scored
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class ServedModel:
    """A causal language model, its tokenizer (None when the folder has none) and its limits in tokens."""

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        path: str,
        context_length: int | None = None,
        deterministic: bool = False,
    ) -> None:
        """Check a module of this package's attention, and serve it from where its parameters lie.

        Raises:
            ConfigError: the architecture is one that the packed pass cannot serve.
        """
        self.path = path
        self.device: torch.device = module.device
        self.dtype: torch.dtype = module.dtype
        self.deterministic = deterministic
        self.config = module.config
        self.tokenizer = tokenizer
        self.module = module.eval()
        self.adapters = Adapters(self.module)
        self.head = self.module.get_output_embeddings()
        self.vocab_size = int(self.module.get_input_embeddings().weight.shape[0])
        self.context_length = context_length or int(self.config.get_text_config().max_position_embeddings)
        self._softcap: float | None = self.config.get_text_config().to_dict().get("final_logit_softcapping")
        if tokenizer is not None and (unknown := [t for t, i in tokenizer.get_vocab().items() if i >= self.vocab_size]):
            logger.warning(
                "%s has %d embedding rows, the tokenizer %d tokens more, such as %r: requests with these are refused",
                path, self.vocab_size, len(unknown), unknown[0],
            )  # fmt: skip
        self.eos_token_ids = _eos_ids(self.module, self.tokenizer)
        with torch.inference_mode():
            self.kv_shape = self._discover_kv_shape()  # layers, key heads, head dim
            self._linears, self._paging = self._accelerate()
        # Parameters and persistent buffers, by transformers' names and by those of the hub, where every expert has
        # tensors of its own: views. A tied tensor has two names, of which the first one counts.
        tensors: dict[str, torch.Tensor] = self.module.state_dict(keep_vars=True)
        first_names = {id(tensor): name for name, tensor in reversed(tensors.items())}
        self.hub_parts = hub_parts(self.module)
        names = [name for name, tensor in tensors.items() if first_names[id(tensor)] == name]
        self.tensor_names = [part.name for name in names for part in self.hub_parts[name]]
        views = {part.name: tensors[name][part.index] for name, parts in self.hub_parts.items() for part in parts}
        self.tensors = views | tensors

    @classmethod
    def load(
        cls,
        path: str,
        dtype: torch.dtype,
        device: torch.device,
        context_length: int | None,
        deterministic: bool,
        tokenizer_path: str | None = None,
    ) -> ServedModel:
        """The model of a folder or hub id; its tokenizer too, if `tokenizer_path` names no other.

        Raises:
            ConfigError: it cannot be read, or not be served.
        """
        config = open_config(path)
        check_architecture(config, path, context_length, deterministic, dtype, device)
        tokenizer = _load_tokenizer(tokenizer_path or path)
        module = _load_module(path, dtype).to(device).requires_grad_(False)
        return cls(module, tokenizer, path, context_length, deterministic)

    def forward(self, pool: PagePool, spans: list[Span], num_rows: int = 0) -> torch.Tensor:
        """One packed pass over the spans' tokens, whose keys and values go to the sequences' pages; each token sees its
        sequence up to itself, so what comes before a span must be in the pages already.

        Any mix of whole prompts, their pieces and single tokens; fastest when sorted by `span_order`. `num_rows` pads
        the pass, so that the shapes of its products do not depend on who else runs.

        Returns:
            Last hidden states [sum of counts, hidden], in the order of the spans.
        """
        tokens = [token for span in spans for token in span.sequence.tokens[span.start : span.end]]
        positions = [position for span in spans for position in range(span.start, span.end)]
        num_tokens = len(tokens)
        padding = [0] * (num_rows - num_tokens)
        ids, places = to_device([np.array(tokens + padding), np.array(positions + padding)], self.device)
        layout = self._layout(pool, spans, num_rows)
        self.adapters.choose(spans, self.device)
        return self.run(ids, places, layout)[:num_tokens]

    def _layout(self, pool: PagePool, spans: list[Span], num_rows: int) -> KVLayout:
        if pool.kernels is None or isinstance(pool.kernels, Kernels):
            return KVLayout(pool, spans, num_rows, self.deterministic)
        return GpuLayout(pool, pool.kernels, spans, num_rows)

    def logits(self, hidden: torch.Tensor, num_rows: int = 0) -> torch.Tensor:
        """LM head; [N, V] in the model's dtype, on a GPU in float32. `num_rows` pads the product as in `forward`."""
        num = len(hidden)
        if num_rows > num:
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, num_rows - num))
        is_plain = is_gpu(hidden) and type(self.head) is torch.nn.Linear and self.head.bias is None
        rows = (head_product(hidden, self.head.weight) if is_plain else self.head(hidden))[:num]
        return rows if self._softcap is None else rows.div_(self._softcap).tanh_().mul_(self._softcap)

    def run(self, tokens: torch.Tensor, positions: torch.Tensor, layout: KVLayout | ShapeProbe) -> torch.Tensor:
        """The modelling code over T tokens and their positions, int64 [T]; last hidden states [T, hidden]."""
        output = self.module.base_model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, kv_layout=layout
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _run_probe(self) -> ShapeProbe:
        """What one token meets."""
        probe, zero = ShapeProbe(), torch.zeros(1, dtype=torch.int64, device=self.device)
        self.run(zero, zero, probe)
        return probe

    def make_pool(self, num_tokens: int) -> PagePool:
        """An empty KV cache for this model."""
        return PagePool(*self.kv_shape, num_tokens, self.dtype, self.device, self._paging)

    @property
    def kv_bytes_per_token(self) -> int:
        num_layers, num_heads, head_dim = self.kv_shape
        return 2 * num_layers * num_heads * head_dim * self.dtype.itemsize

    def _discover_kv_shape(self) -> tuple[int, int, int]:
        """Heads and layers as the modelling code itself hands them to attention."""
        probe = self._run_probe()
        num_layers = self.config.get_text_config().num_hidden_layers
        layers, shapes = sorted(setting.layer for setting in probe.seen), set(probe.seen.values())
        uneven = len(shapes) != 1 or any(key != value for key, value in shapes)
        if uneven or layers != list(range(num_layers)):
            raise ConfigError(
                f"{self.path} ({type(self.module).__name__}): layers {layers} of {num_layers} use standard"
                f" attention, with key and value shapes {sorted(map(str, shapes))}; the native server needs one shape,"
                " in every layer"
            )
        [(key, _)] = shapes
        return num_layers, key[0], key[2]

    def refresh(self) -> None:
        """Parameters have changed: whatever was derived from them is derived again."""
        if self._linears is not None:
            self._linears.refresh()

    def _accelerate(self) -> tuple[PackedLinears | None, AnyKernels | None]:
        """Packed weights, fused modules and, where it fits, attention by the kernels of the device; on a CPU in bf16
        only."""
        kernels = for_device(self.device)
        is_cpu = isinstance(kernels, Kernels) or (kernels is None and self.device.type == "cpu")
        if is_cpu and self.dtype != torch.bfloat16:
            return None, None
        linears = PackedLinears(self.module, self._run_probe, None if is_cpu else Joined())
        if kernels is None:
            return linears, None
        fuse(self.module, kernels)
        softcap = self.config.get_text_config().to_dict().get("attn_logit_softcapping")
        if softcap is not None or (is_cpu and self.kv_shape[2] % DIM_STEP):
            return linears, None
        self._paging = kernels
        call_kernels(self.module, kernels, linears, self.adapters, self._run_probe(), self._probe_states)
        return linears, kernels

    def _probe_states(self) -> torch.Tensor:
        """Hidden states of a short sequence: a prompt, and one token after it."""
        pool, num = self.make_pool(2 * PAGE_TOKENS), PAGE_TOKENS + 5
        row = [(31 * t + 17) % self.vocab_size for t in range(num)]
        sequence = Sequence(GenerateRequest("probe", row, SamplingParams(1)))
        sequence.pages = array("i", pool.take(2))
        return torch.cat([self.forward(pool, [Span(sequence, *span)]) for span in ((0, num - 1), (num - 1, 1))])

    @torch.inference_mode()
    def _score(self, rows: Rows) -> Rows:
        """models/fidelity.py's Pass: the first half of each row in one pass, three more tokens in another, the others
        one by one."""
        pool = self.make_pool(PAGE_TOKENS * sum(pages_for(len(row)) for row in rows))
        spans: list[list[Span]] = []
        for row in rows:
            sequence = Sequence(GenerateRequest("probe", row.tolist(), SamplingParams(1)))
            sequence.pages.extend(pool.take(pages_for(len(row))))
            ends = [0, len(row) // 2, *range(len(row) // 2 + 3, len(row) + 1)]
            spans.append([Span(sequence, start, end - start) for start, end in pairwise(ends)])
        hidden: list[list[torch.Tensor]] = [[] for _ in rows]
        for together in zip_longest(*spans):
            chosen = {i: span for i, span in enumerate(together) if span is not None}
            states = self.forward(pool, list(chosen.values())).split([span.count for span in chosen.values()])
            for i, part in zip(chosen, states, strict=True):
                hidden[i].append(part)
        logits = [self.logits(torch.cat(states)[: len(row) - 1]) for states, row in zip(hidden, rows, strict=True)]
        return [token_scores(scores, row[1:]) for scores, row in zip(logits, rows, strict=True)]


def check_architecture(
    config: Any, path: str, context_length: int | None, deterministic: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises ConfigError for what cannot be served, by its configuration or by a trial of its architecture."""
    text = config.get_text_config(decoder=True).to_dict()
    limit = text.get("max_position_embeddings")
    if limit is None:
        raise ConfigError(f"{path}: the model states no max_position_embeddings; not supported by the native server")
    if context_length is not None and context_length > limit:
        raise ConfigError(f"--context-length {context_length} is more than the model's own limit, {limit}")
    ropes = text.get("rope_parameters") or {}
    for rope in [ropes, *(entry for entry in ropes.values() if isinstance(entry, dict))]:  # one, or one per layer kind
        original = rope.get("original_max_position_embeddings", limit)
        if rope.get("rope_type") == "longrope" and (context_length or limit) > original:
            raise ConfigError(
                f"{path}: beyond {original} tokens its rotary embedding (longrope) turns the keys already computed"
                f" into others; pass --context-length {original} or less"
            )
    if deterministic and any(text.get(name) for name in _EXPERT_COUNTS):
        raise ConfigError(f"{path}: --deterministic is not possible for a mixture of experts; leave the flag out")

    def run(tiny: Any, rows: Rows) -> Rows:
        return ServedModel(tiny, None, path, deterministic=deterministic)._score(rows)

    check_fidelity(config, AutoModelForCausalLM, ATTENTION_NAME, run, path, (dtype, device))


def _load_module(path: str, dtype: torch.dtype) -> Any:
    """The model in memory of its own: transformers may hand out a map of the file, which changes when the file does."""
    options = {"dtype": dtype, "attn_implementation": ATTENTION_NAME, "trust_remote_code": False}
    try:
        module, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be loaded as a causal language model: {reason}") from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"{path} is no whole checkpoint of a {type(module).__name__}: {len(missing)} tensors are missing, such as"
            f" {', '.join(missing[:3])}; download or export it again"
        )
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.set_(tensor.clone())
    return module


def _load_tokenizer(path: str) -> Any:
    """The folder's tokenizer; None for a local folder that has none."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        logger.warning("%s has no tokenizer: only token ids are served", path)
        return None
    return open_tokenizer(path)


def _eos_ids(module: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that the generation config, the model config or the tokenizer names as end of sequence."""
    configs = module.generation_config, module.config.get_text_config(), *([] if tokenizer is None else [tokenizer])
    values = [config.eos_token_id for config in configs]
    ids = (token for value in values for token in (value if isinstance(value, list) else [value]))
    return frozenset(token for token in ids if token is not None)
