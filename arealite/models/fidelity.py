"""Whether a packed pass computes what plain Hugging Face does, tried on a tiny random model of the same architecture.

Called by engine/packed_model.py and core/served_model.py before weights are loaded: what they would compute wrong is
refused there, with the reason. The tiny model has the classes and flags of the real one (kinds of layers, windows,
scalings, norms, ropes), but few and narrow layers, and windows shorter than the sequences that are tried.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedConfig

from arealite.api.errors import ConfigError

Rows = list[torch.Tensor]
# (model, rows of token ids, int64 [L]) -> for each row float32 [L - 1]: the logprob of each token but the first, or
# what a head of one unit says of the token before it
Pass = Callable[[Any, Rows], Rows]

LENGTHS = (23, 9, 2, 17, 23)  # of the rows that are tried; some are longer than a page of the server's cache
SHARED = 11  # first tokens of the last row, which are those of the first
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}  # mean, in standard deviations of scores
VOCABULARY = 64
MAX_LAYERS = 8
MAX_WIDTH = 256
# What a number of a configuration is at most in the tiny one, by name.
CAPS = {
    r"vocab_size": VOCABULARY,
    r"window|attention_chunk_size|index_(topk|block_size)$|floor_scale|n_floor$": 5,
    r"intermediate|^n_inner$|ffn_dim|ffn_hidden|word_embed_proj_dim": 64,
    r"lora_rank$|laurel_rank|per_layer_input$": 32,
    r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num)$": 8,
    r"^(n_group|num_expert_group|num_experts_per_tok(en)?|moe_topk|moe_k|top_k)$": 2,
    r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index|topk_group|num_kv_shared_layers)$": 1,
    r"^index_\w+_blocks$": 1,
}

_right: set[Any] = set()  # what was tried in this process, and computed right


def check_fidelity(
    config: Any, auto_class: Any, attention: str, run: Pass, where: str, *kinds: tuple[torch.dtype, torch.device]
) -> None:
    """Compare `run`, on rows packed together, with plain Hugging Face: scores and, if `run` makes them, gradients, in
    float32 on the CPU and then in each of `kinds`; in a process once for each configuration, head and `attention`.

    Raises:
        ConfigError: they differ by more than rounding, or cannot be computed. It names `where` and the reason.
    """
    if type(config) not in auto_class._model_mapping:
        raise ConfigError(f"{where}: transformers has no {auto_class.__name__} for a {config.model_type}")
    kind: Any = auto_class._model_mapping[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    named = f"{where}, a {kind.__name__}, cannot be computed on packed sequences"
    if not kind._supports_attention_backend or kind._is_stateful:
        raise ConfigError(
            f"{named}: its layers do not use transformers' attention interface, or keep a state along the row. Choose"
            " another architecture"
        )
    settings = config.to_dict() | {"_name_or_path": ""}
    tried = type(config), repr(settings), auto_class, attention, kinds
    if tried in _right:
        return
    try:
        with _failing("cannot be built"):
            model = tiny_model(config, auto_class, attention)
        for dtype, device in ((torch.float32, torch.device("cpu")), *kinds):
            _compare(copy.deepcopy(model).to(device, dtype), run)
    except ConfigError as error:
        raise ConfigError(
            f"{named}: {error}; found on a tiny random model of its configuration. Choose another architecture"
        ) from error
    _right.add(tried)


@contextmanager
def _failing(how: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # the modelling code of any architecture runs here, and may raise anything
        raise ConfigError(f"it {how} ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error


def _compare(model: Any, run: Pass) -> None:
    """Raises ConfigError with the reason alone. `run` may change the model's modules."""
    rows = [row.to(model.device) for row in tried_rows()]
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with _failing("fails in transformers' own pass"):
        wanted = plain_scores(model, rows)
        changed = _logits_changed(model, rows[0])
    model.set_attn_implementation(attention)
    with _failing("fails there"):
        alone, found = run(model, rows[:1]), run(model, rows)
    spread, limit = float(torch.cat(wanted).detach().std()), TOLERANCE[model.dtype]
    kind = str(model.dtype).removeprefix("torch.")
    if not (gap := _distance(alone, wanted[:1]) / spread) <= limit:
        raise ConfigError(
            f"its logits are not its head's matrix times the last hidden states ({changed})"
            if changed
            else f"even alone a sequence gets other scores in {kind}, by {gap:.2g} standard deviations: its attention"
            " is not the causal one of transformers' attention interface"
        )
    if not (gap := _distance(found, wanted) / spread) <= limit:
        raise ConfigError(
            f"beside others a sequence gets other scores than alone in {kind}, by {gap:.2g} standard deviations: it has"
            " masks or positions of its own, or keeps a state along the row"
        )
    if found[0].requires_grad:
        with _failing("fails in the backward pass"):
            one, other = (_gradient(model, scores) for scores in (found, wanted))
        if not (gap := float((one - other).norm() / other.norm())) <= limit:
            raise ConfigError(f"gradients differ by {gap:.2g} of their norm in {kind}")


def _distance(found: Rows, wanted: Rows) -> float:
    return float((torch.cat(found).detach() - torch.cat(wanted).detach()).abs().mean())


def _gradient(model: Any, scores: Rows) -> torch.Tensor:
    """[number of parameters], of a sum of the scores with different weights."""
    values = torch.cat(scores)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = (values * torch.linspace(-1, 1, len(values), device=values.device)).sum()
    found = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found]).float()


@torch.no_grad()
def _logits_changed(model: Any, row: torch.Tensor) -> str:
    """What the configuration says of logits, if they are others than its head's weight makes of the last hidden
    states."""
    if (head := model.get_output_embeddings()) is None:
        return ""
    output = model.base_model(input_ids=row[None], use_cache=False)
    if "last_hidden_state" not in output:
        raise ConfigError("its base model returns no last hidden states")
    logits = functional.linear(output.last_hidden_state[0], head.weight)
    if torch.allclose(logits, _plain_logits(model, row[None]), atol=1e-3):
        return ""
    settings = {name: getattr(model.config, name) for name in dir(model.config) if "logit" in name}
    told = [f"{name} {value}" for name, value in settings.items() if isinstance(value, float) and value != 1]
    return ", ".join(told + ["lm_head.bias"] * (head.bias is not None)) or "they are changed after it"


def plain_scores(model: Any, rows: Rows) -> Rows:
    """What a Pass returns, by the model's own code, one row at a time."""
    return [token_scores(_plain_logits(model, row[None])[:-1], row[1:]) for row in rows]


def _plain_logits(model: Any, row: torch.Tensor) -> torch.Tensor:
    """[L, V] for a row [1, L]; a head that judges the whole sequence is asked about each of its beginnings."""
    logits = model(input_ids=row, use_cache=False).logits
    if logits.dim() == 3:
        return logits[0]
    return torch.cat([model(input_ids=row[:, :end], use_cache=False).logits for end in range(1, row.shape[1] + 1)])


def token_scores(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [N] from logits [N, V] and the token that follows each; of a head of one unit the logits themselves."""
    logits = logits.float()
    return logits[:, 0] if logits.shape[-1] == 1 else logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def tried_rows() -> Rows:
    tokens = torch.randint(1, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    rows = list(tokens.split(list(LENGTHS)))
    rows[-1][:SHARED] = rows[0][:SHARED]
    return rows


def tiny_model(config: Any, auto_class: Any, attention: str) -> Any:
    """A random float32 model of the tiny configuration, always the same."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = auto_class.from_config(tiny_config(config), dtype=torch.float32, attn_implementation=attention).eval()
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() < 2:
                parameter.add_(noise, alpha=0.1)  # a norm's weight is around 1 or 0
            else:
                parameter.copy_(noise.mul_(parameter.shape[-1] ** -0.5))
    return model


def tiny_config(config: Any) -> Any:
    """A copy with few and narrow layers. What kinds of layers there are, and how wide a head is, stays."""
    tiny = copy.deepcopy(config)
    canonical = {own: name for name, own in tiny.attribute_map.items() if name not in vars(tiny)}
    fields = {canonical.get(own, own): value for own, value in vars(tiny).items()}
    if "hidden_size" in fields and "num_attention_heads" in fields:
        _narrow(tiny, fields)
    _keep_few_layers(tiny, fields)
    for name, value in fields.items():
        caps = [cap for pattern, cap in CAPS.items() if re.search(pattern, name)]
        if isinstance(value, PreTrainedConfig):
            setattr(tiny, name, tiny_config(value))
        elif caps and type(value) is int:
            setattr(tiny, name, min(value, caps[0]))
        elif caps and isinstance(value, list) and all(type(entry) is int for entry in value):
            setattr(tiny, name, [min(entry, caps[0]) for entry in getattr(tiny, name)])
        elif name == "pad_token_id" and value is not None:
            setattr(tiny, name, 0)
    return tiny


def _narrow(tiny: Any, fields: dict[str, Any]) -> None:
    """Two or four heads, of as many keys each as there are, and a hidden size in proportion."""
    heads, key_heads = fields["num_attention_heads"], fields.get("num_key_value_heads")
    fewer = min(heads, 2 if key_heads in (None, 1, heads) else 4)
    tiny.num_attention_heads = fewer
    if key_heads is not None:
        tiny.num_key_value_heads = {1: 1, heads: fewer}.get(key_heads, 2)
    per_head = fields["hidden_size"] / heads
    rounded = min(-(-int(fewer * per_head) // 32) * 32, MAX_WIDTH)  # where it does not follow from the heads
    tiny.hidden_size = rounded if fields.get("head_dim") else fewer * int(per_head)


def _keep_few_layers(tiny: Any, fields: dict[str, Any]) -> None:
    """The first layers, so many that every kind is among them."""
    count = next((name for name in ("num_hidden_layers", "num_layers") if name in fields), None)
    if count is None:
        return
    lists = {name: value for name, value in fields.items() if isinstance(value, list | tuple)}
    by_layer = {name: list(map(repr, value)) for name, value in lists.items() if len(value) == fields[count]}
    kinds = [1 + kinds.index(kind) for kinds in by_layer.values() for kind in kinds]
    kept = min(fields[count], max(2, *kinds, 0), MAX_LAYERS)
    setattr(tiny, count, kept)
    for name, value in lists.items():
        if name in by_layer:
            setattr(tiny, name, value[:kept])
        elif re.search(r"layers$|layer_ids$|idxs$", name):
            setattr(tiny, name, [layer for layer in value if layer < kept])
