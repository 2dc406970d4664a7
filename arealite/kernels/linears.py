"""Linear layers on packed weights: each product reads memory once, in order, and layers that are given the same input
are one product.

Made by served_model.py after load. For bf16 on a CPU the packed weights are copies, and whoever changes the plain
parameters calls `refresh`; elsewhere the plain parameters become parts of them (`Joined`). Either way they stay the
truth: names, checksums, updates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from arealite.kernels import build, cpu
from arealite.kernels.cpu import Kernels


class Joined:
    """Plain products of weights [n, K] below each other, of which the layers' own parameters become parts."""

    def pack(self, weights: list[torch.Tensor], packed: torch.Tensor | None) -> torch.Tensor:
        """The weights as `product` reads them, maybe in the memory of what was packed before."""
        if packed is not None or len(weights) == 1:
            return weights[0] if packed is None else packed
        return torch.cat(weights)

    def product(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int) -> torch.Tensor:
        """x [..., K] times the transpose of n packed rows, plus bias [n]; [..., n]."""
        return functional.linear(x, packed, bias)


class _OneDnn:
    """PyTorch's own packed products, where there is no compiler and bf16 has instructions."""

    def pack(self, weights: list[torch.Tensor], packed: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), 64)

    def product(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class _Float32:
    """Products of float32 copies, rounded, where PyTorch would multiply bf16 element by element."""

    def pack(self, weights: list[torch.Tensor], packed: torch.Tensor | None) -> torch.Tensor:
        return torch.cat(weights).float()

    def product(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int) -> torch.Tensor:
        out = (x.float() @ packed.t()).to(x.dtype)
        return out if bias is None else out + bias


class PackedLinears:
    """The linear layers of a module, each calling its group's product from now on."""

    def __init__(self, module: nn.Module, run: Callable[[], object], products: Joined | None = None) -> None:
        """`run` calls the module once, on anything: layers that are called one after the other with the same input, and
        have the same parent, are a group. `products`: other ones than those of bf16 on this CPU."""
        chosen = products or cpu.load() or (_OneDnn() if build.has_bf16_products() else _Float32())
        groups = _groups(module, run, None if products else torch.bfloat16)
        self._groups = [_Group(linears, chosen) for linears in groups]

    def refresh(self) -> None:
        """Pack again: the parameters have changed."""
        for group in self._groups:
            group.refresh()

    def group(self, linears: list[nn.Linear]) -> Callable[[torch.Tensor], torch.Tensor]:
        """x [..., K] -> results of `linears` side by side, always of current weights. Raises KeyError: they are no
        group."""
        for group in self._groups:
            if group.linears == linears:
                return group.product
        raise KeyError(f"{len(linears)} linear layers")


class _Group:
    """Linear layers with one input. The first call computes all; the others, which follow with the very same tensor,
    take their part, and the last one lets go of it."""

    def __init__(self, linears: list[nn.Linear], products: Joined | Kernels | _OneDnn | _Float32) -> None:
        self.linears = linears
        self._products = products
        self._sizes = [linear.out_features for linear in linears]
        self._packed: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._pack()
        if isinstance(products, Joined):
            self._take_parts()
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}
        for place, linear in enumerate(linears):
            linear.forward = functools.partial(self._part, place)  # type: ignore[method-assign]

    def _pack(self) -> None:
        self._packed = self._products.pack([linear.weight.detach() for linear in self.linears], self._packed)
        biases = [linear.bias for linear in self.linears]
        if any(bias is not None for bias in biases):
            zeros = self.linears[0].weight.new_zeros(sum(self._sizes)).split(self._sizes)
            parts = zip(biases, zeros, strict=True)
            self._bias = torch.cat([zero if bias is None else bias.detach() for bias, zero in parts])

    @torch.no_grad()
    def _take_parts(self) -> None:
        """Let the parameters be parts of what is joined."""
        assert self._packed is not None
        biases = [None] * len(self.linears) if self._bias is None else self._bias.split(self._sizes)
        for linear, weight, bias in zip(self.linears, self._packed.split(self._sizes), biases, strict=True):
            linear.weight.set_(weight)
            if linear.bias is not None and bias is not None:
                linear.bias.set_(bias)

    def refresh(self) -> None:
        if not isinstance(self._products, Joined):
            self._pack()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self._products.product(x, self._packed, self._bias, sum(self._sizes))  # type: ignore[arg-type]

    def _part(self, place: int, x: torch.Tensor) -> torch.Tensor:
        if len(self.linears) == 1:
            return self.product(x)
        if self._input is not x or place not in self._parts:
            self._input = x
            self._parts = dict(enumerate(self.product(x).split(self._sizes, -1)))
        part = self._parts.pop(place)
        if not self._parts:
            self._input = None
        return part


def _groups(module: nn.Module, run: Callable[[], object], dtype: torch.dtype | None) -> list[list[nn.Linear]]:
    """Of any dtype if it is None."""
    parents = {
        child: parent
        for parent in module.modules()
        for child in parent.children()
        if type(child) is nn.Linear and child.in_features % 2 == 0 and dtype in (None, child.weight.dtype)
    }
    calls: list[tuple[nn.Linear, torch.Tensor]] = []
    hooks = [
        linear.register_forward_pre_hook(lambda linear, inputs: calls.append((linear, inputs[0]))) for linear in parents
    ]
    run()
    for hook in hooks:
        hook.remove()
    groups: list[list[nn.Linear]] = []
    last: tuple[nn.Module, torch.Tensor] | None = None
    seen: set[nn.Linear] = set()
    for linear, x in calls:
        if linear in seen:
            last = None
        elif last is not None and parents[linear] is last[0] and x is last[1]:
            groups[-1].append(linear)
        else:
            groups.append([linear])
            last = parents[linear], x
        seen.add(linear)
    return groups + [[linear] for linear in parents if linear not in seen]
