"""Norms, gated units, attention layers and linear layers of Hugging Face modules, each replaced by calls of kernels.

Called by core/served_model.py and engine/packed_model.py. A module is changed only if a probe on random numbers
shows that it computes the same, to a bf16's rounding; any other is left alone, and so is whatever is no bf16 on their
device.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from arealite.kernels.cpu import DIM_STEP, Kernels
from arealite.kernels.functions import AnyKernels, fits, linear, rms_norm, rotate, silu_times

GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
_PROBE_ROWS, _PROBE_HEADS = 3, {"q_proj": 4, "k_proj": 2, "v_proj": 2}
_PROBE_ATTENTION = "arealite_probe"
_INTERFACES = AttentionInterface()

logger = logging.getLogger(__name__)


@torch.no_grad()
def fuse(module: Any, kernels: AnyKernels) -> None:
    """Replace norms, gated units and attention layers that can be replaced in `module`, in place. Parameters are looked
    up when a module is called."""
    left: Counter[str] = Counter()
    for part in module.modules():
        names = vars(part)["_modules"].keys()
        replaced: Any = None
        if type(part).__name__.endswith("RMSNorm"):
            with suppress(KeyError):
                replaced = _norm(part, kernels, *norm_kind(part, kernels))
        elif names == GATED:
            replaced = _gated(part, kernels) if _is_silu_times(part, kernels) else None
        elif names >= PROJECTIONS:
            replaced = _attention(part, kernels)
        else:
            continue
        if replaced is None:
            left[type(part).__name__] += 1
        else:
            part.forward = replaced
    if left:
        words = ", ".join(f"{count} {name}" for name, count in left.items())
        logger.info("left to PyTorch, because the kernels compute something else: %s", words)


def fuse_linears(module: Any, kernels: Kernels | None) -> None:
    """Compute the linear layers in `module` by kernels.functions.linear, in bf16 on a CPU, with their gradients."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.forward = _linear(part, kernels)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, kernels: Kernels | None) -> Any:
    plain = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = layer.weight, layer.bias
        return linear(kernels, x, weight, bias) if fits(x, weight) else plain(x)

    return forward


def _random(kernels: AnyKernels, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).bfloat16().to(kernels.device)


def _random_linear(kernels: AnyKernels, num_inputs: int, num_outputs: int) -> nn.Linear:
    layer = nn.Linear(num_inputs, num_outputs, bias=False, dtype=torch.bfloat16, device=kernels.device)
    layer.weight.copy_(_random(kernels, num_outputs, num_inputs) * num_inputs**-0.5)
    return layer


def _with_random_weight(norm: Any, kernels: AnyKernels) -> Any:
    probe = copy.copy(norm)
    vars(probe).pop("forward", None)  # of one that is replaced already
    probe._parameters = {"weight": nn.Parameter(_random(kernels, *norm.weight.shape))}
    return probe


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the rounding of a few bf16."""
    return a.shape == b.shape and bool((a.float() - b.float()).norm() <= 2**-7 * b.float().norm())


@torch.no_grad()
def norm_kind(norm: Any, kernels: AnyKernels) -> tuple[float, bool]:
    """Its eps, and whether it multiplies by one plus the weight. Raises KeyError: the kernel computes neither."""
    own = vars(norm)
    eps = own.get("variance_epsilon", own.get("eps"))
    if set(own["_parameters"]) != {"weight"} or not isinstance(eps, float) or norm.weight.numel() % DIM_STEP:
        raise KeyError(type(norm).__name__)
    probe, x = _with_random_weight(norm, kernels), _random(kernels, _PROBE_ROWS, norm.weight.numel())
    wanted = type(norm).forward(probe, x)
    for plus_one in (False, True):
        if _agree(rms_norm(kernels, x, probe.weight, eps, plus_one), wanted):
            return eps, plus_one
    raise KeyError(type(norm).__name__)


def _norm(norm: Any, kernels: AnyKernels, eps: float, plus_one: bool) -> Any:
    plain = norm.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = norm.weight
        return rms_norm(kernels, x, weight, eps, plus_one) if fits(x, weight, on=kernels.device.type) else plain(x)

    return forward


def _is_silu_times(unit: Any, kernels: AnyKernels) -> bool:
    """Whether it computes down(silu(gate(x)) * up(x)), by its own code on small layers."""
    probe = copy.copy(unit)
    layers = {name: _random_linear(kernels, DIM_STEP, DIM_STEP) for name in sorted(GATED)[1:]}
    probe._modules = {**layers, "act_fn": unit.act_fn}
    x = _random(kernels, _PROBE_ROWS, DIM_STEP)  # gates of about 1, where activations differ most
    return _agree(_gated(probe, kernels)(x), type(unit).forward(probe, x))


def _gated(unit: Any, kernels: AnyKernels) -> Any:
    plain = unit.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        on = kernels.device.type
        if not fits(x, on=on):
            return plain(x)
        gate, up = unit.gate_proj(x), unit.up_proj(x)
        if fits(gate, up, on=on) and not gate.shape[-1] % DIM_STEP:
            return unit.down_proj(silu_times(kernels, gate, up))
        return unit.down_proj(unit.act_fn(gate) * up)

    return forward


def _attention(attn: Any, kernels: AnyKernels) -> Any:
    """Projections, norms of heads, rotary embedding, attention and projection; None where the layer's own code does
    something else, or shows it to its attention function. That gets what the layer's code gives it: scale, window."""
    dim, names = vars(attn).get("head_dim", 0), vars(attn)["_modules"].keys()
    norms = [vars(attn)["_modules"][name] for name in sorted(HEAD_NORMS & names)]
    if not isinstance(dim, int) or not dim or dim % DIM_STEP or not names <= PROJECTIONS | HEAD_NORMS:
        return None
    if any(set(vars(norm)["_parameters"]) != {"weight"} or norm.weight.numel() != dim for norm in norms):
        return None
    probe = copy.copy(attn)
    layers: dict[str, Any] = {name: _random_linear(kernels, dim, num * dim) for name, num in _PROBE_HEADS.items()}
    layers |= {"o_proj": _random_linear(kernels, _PROBE_HEADS["q_proj"] * dim, dim)}
    layers |= {name: _with_random_weight(vars(attn)["_modules"][name], kernels) for name in HEAD_NORMS & names}
    probe._modules, probe.config = layers, copy.copy(attn.config)
    probe.training = False  # dropout is never applied: a trained policy would differ from the one that samples
    probe.config._attn_implementation_internal = _PROBE_ATTENTION
    x, (cos, sin) = _random(kernels, 1, _PROBE_ROWS, dim), _random(kernels, 2, 1, _PROBE_ROWS, dim)
    shown: list[dict[str, Any]] = []
    passed: dict[str, Any] = {"position_embeddings": (cos, sin), "attention_mask": None, "shown": shown}
    try:
        wanted, _ = type(attn).forward(probe, hidden_states=x, **passed)
        [before] = shown
        settings = {name: value for name, value in before.items() if name not in ("q", "k", "v", "dropout")}
        got, _ = _rotated_attention(probe, kernels, settings)(x, **passed)
    except Exception as error:  # modelling code of any kind, which may want other things than a layer of the common one
        logger.debug("%s is of another kind: %s", type(attn).__name__, error)
        return None
    is_same = _agree(got, wanted) and all(_agree(shown[1][name], before[name]) for name in "qkv")
    return _rotated_attention(attn, kernels, settings) if is_same else None


def _probe_attention(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, shown: list[Any], **settings: Any
) -> tuple[torch.Tensor, None]:
    """Notes what it is given; its result depends on all of it."""
    shown.append({"q": q.clone(), "k": k.clone(), "v": v.clone(), **settings})
    return (q + (k + v).repeat_interleave(q.shape[1] // k.shape[1], 1)).transpose(1, 2), None


AttentionInterface.register(_PROBE_ATTENTION, _probe_attention)


def _rotated_attention(attn: Any, kernels: AnyKernels, settings: dict[str, Any]) -> Callable[..., Any]:
    plain, dim = attn.forward, attn.head_dim
    q_norm, k_norm = (vars(attn)["_modules"].get(name, nn.Identity()) for name in ("q_norm", "k_norm"))

    def forward(
        hidden_states: torch.Tensor, position_embeddings: Any = None, attention_mask: Any = None, **passed: Any
    ) -> Any:
        (cos, sin), on = position_embeddings, kernels.device.type
        attend: Any = _INTERFACES.get(attn.config._attn_implementation)
        is_cached = passed.get("cache") is not None or passed.get("past_key_values") is not None
        is_whole = cos.shape[-1] == dim and hidden_states.dim() == 3 and len(hidden_states) == 1
        if attend is None or is_cached or not is_whole or not fits(hidden_states, cos, sin, on=on):
            return plain(hidden_states, position_embeddings, attention_mask, **passed)
        rows = (*hidden_states.shape[:2], -1, dim)
        q = q_norm(attn.q_proj(hidden_states).view(rows)).transpose(1, 2)
        k = k_norm(attn.k_proj(hidden_states).view(rows)).transpose(1, 2)
        v = attn.v_proj(hidden_states).view(rows).transpose(1, 2)
        if not fits(q, k, on=on):  # an adapter's layer may compute in another type
            return plain(hidden_states, position_embeddings, attention_mask, **passed)
        q, k = rotate(kernels, q, cos, sin), rotate(kernels, k, cos, sin)
        seen, weights = attend(attn, q, k, v, attention_mask, **{**passed, **settings})
        return attn.o_proj(seen.reshape(*hidden_states.shape[:2], -1)), weights

    return forward
