"""Rewards with named parts, and several rewards as one. Made by training scripts, run by pool.py.

reward_fn = WeightedSum(correct=(1.0, math_reward), format=(0.1, format_reward))
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from arealite.api.errors import ConfigError


class PartedReward(float):
    """A reward that is a plain number to its caller and has named parts in the records: PartedReward(0, cut=1.0)."""

    parts: dict[str, float]

    def __new__(cls, reward: float, **parts: float) -> PartedReward:
        made = super().__new__(cls, reward)
        made.parts = parts
        return made


def as_parts(result: Any) -> Mapping[str, Any]:
    """What a reward function returned, as a dict, "reward" among its keys if there is one."""
    if isinstance(result, PartedReward):
        return {"reward": float(result), **result.parts}
    return result if isinstance(result, Mapping) else {"reward": result}


Part = tuple[float, Callable[..., Any]]


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call of it has to be awaited: `async def`, a partial of one, an object whose `__call__` is one."""
    if isinstance(function, WeightedSum):
        return any(is_async(member) for _, member in function.parts.values())
    while isinstance(function, partial):
        function = function.func
    call = function if inspect.isroutine(function) else type(function).__call__
    return inspect.iscoroutinefunction(call)


class WeightedSum:
    """A reward function: the sum of weight x reward over its parts, given as name=(weight, reward function).

    Its result has each part's own reward under the part's name, unweighted, and what a part itself names as
    PART_NAME. Each part gets of the row's columns those that it takes. If one part fails, the whole has failed.

    Raises ConfigError: a part is not (weight, function).
    """

    def __init__(self, **parts: Part) -> None:
        for name, part in parts.items():
            if not (
                isinstance(part, tuple) and len(part) == 2 and callable(part[1]) and isinstance(part[0], int | float)
            ):
                raise ConfigError(f"the part {name} of a WeightedSum is {part!r}; expected (weight, reward function)")
        if "reward" in parts:
            raise ConfigError("a part of a WeightedSum is named reward, as the sum itself is: give it another name")
        if not parts:
            raise ConfigError("a WeightedSum without parts; expected name=(weight, reward function), one or more")
        self.parts = parts
        self.__signature__ = _common_signature(parts)

    def split(self) -> list[WeightedSum]:
        """The same in one or two sums: what runs in processes, what is awaited."""
        kinds: dict[bool, dict[str, Part]] = {}
        for name, part in self.parts.items():
            kinds.setdefault(is_async(part[1]), {})[name] = part
        return [WeightedSum(**parts) for parts in kinds.values()]

    def __call__(self, *args: Any, **named: Any) -> dict[str, Any] | Awaitable[dict[str, Any]]:
        """The result of the parts, all of one kind (`split`); to be awaited if they are."""
        calls = [member(*args, **_taken(member, named)) for _, member in self.parts.values()]
        return self._awaited(calls) if is_async(self) else self._total(calls)

    async def _awaited(self, calls: list[Awaitable[Any]]) -> dict[str, Any]:
        return self._total(await asyncio.gather(*calls))

    def _total(self, results: list[Any]) -> dict[str, Any]:
        total: dict[str, Any] = {"reward": 0.0}
        for (name, (weight, _)), result in zip(self.parts.items(), results, strict=True):
            named = as_parts(result)
            if named.get("reward") is None:
                raise ValueError(f"the part {name} returned {result!r:.200}; expected a number, or a dict with one")
            total["reward"] += weight * float(named["reward"])
            told = {name if key == "reward" else f"{name}_{key}": value for key, value in named.items()}
            if twice := told.keys() & total.keys():
                raise ValueError(f"two parts are named {', '.join(sorted(twice))}: give the part {name} another name")
            total |= told
        return total


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Those that columns of a row may be given to: all but the first four."""
    parameters = inspect.signature(function).parameters
    places = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:4]
    return {name: parameter for name, parameter in parameters.items() if name not in places}


def _taken(function: Callable[..., Any], named: dict[str, Any]) -> dict[str, Any]:
    parameters = _parameters(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return named if takes_all else {name: value for name, value in named.items() if name in parameters}


def _common_signature(parts: dict[str, Part]) -> inspect.Signature:
    """What a row must have for every part; anything else is taken, and given to those that know it."""
    needed = {
        name: parameter.replace(kind=parameter.KEYWORD_ONLY)
        for _, function in parts.values()
        for name, parameter in _parameters(function).items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    }
    first = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
        for name in ("prompt", "completion", "prompt_ids", "completion_ids")
    ]
    return inspect.Signature([*first, *needed.values(), inspect.Parameter("extras", inspect.Parameter.VAR_KEYWORD)])
