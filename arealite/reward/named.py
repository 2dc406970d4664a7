"""Reward functions by name, package.module:FUNCTION or FILE.py:FUNCTION: which they are, and what code they call.

Used by cli.py and `arealite eval` for names on a command line, and by trainer.py for names in rows.
"""

from __future__ import annotations

import ast
import importlib
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arealite.api.errors import ConfigError

if TYPE_CHECKING:
    from arealite.reward.pool import RewardFunction

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
INSTALLED = {"site-packages", "dist-packages"}


def named_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, verifier: str, **row: Any
) -> Any:
    """What the function named `verifier` says. Data sets of the catalog name theirs, rows of others may have a column
    of that name; so one run can mix mathematics, programs and puzzles.

    Raises ConfigError: there is no such function.
    """
    return find_reward(verifier)(prompt, completion, prompt_ids, completion_ids, **row)


def find_reward(name: str) -> RewardFunction:
    """The function of that name; `reward_fn`, or the only one whose name ends in "reward" or "reward_fn", where only a
    file or module is named. Raises ConfigError."""
    place, _, function = name.partition(":")
    module_name = _module_of(name)
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise ConfigError(f"there is no file {place}; expected FILE.py:FUNCTION or package.module:FUNCTION")
        loaded = sys.modules.get(module_name)
        other = str(path) if loaded is None else str(vars(loaded).get("__file__", "built in"))
        if Path(other).resolve() != path:
            if _is_installed(other):
                raise ConfigError(f"{place} has the name of a library, {module_name}: give the file another one")
            del sys.modules[module_name]  # of another file of that name
        # Worker processes take it over, and find the function by its module.
        sys.path[:] = [str(path.parent), *(entry for entry in sys.path if entry != str(path.parent))]
    try:
        members = vars(importlib.import_module(module_name))
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    if not function:
        own = [n for n in members if n.endswith(("reward", "reward_fn")) and n[0] != "_" and callable(members[n])]
        function = "reward_fn" if "reward_fn" in members else own[0] if len(own) == 1 else ""
        if not function:
            told = ", ".join(own) or "no function named ...reward"
            raise ConfigError(f"{name} has {told}; say which: {name}:FUNCTION")
    if not callable(members.get(function)):
        raise ConfigError(f"{name}: {place} has no function {function!r}")
    reward_fn: RewardFunction = members[function]
    return reward_fn


def code_of(name: str) -> dict[str, str]:
    """The text of the function's module and of all that it imports at any depth, by module: what can change a reward,
    apart from installed libraries. Raises ConfigError."""
    find_reward(name)
    pending = [_module_of(name)]
    packages = {"arealite", pending[0].partition(".")[0]}
    texts: dict[str, str] = {}
    while pending:
        module = pending.pop()
        if module in texts or (path := _source(module, packages)) is None:
            continue
        texts[module] = path.read_text(encoding="utf-8", errors="replace")
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        pending += _imported(texts[module], package)
    return texts


def _module_of(name: str) -> str:
    place = name.partition(":")[0]
    return Path(place).stem if place.endswith(".py") else place


def _source(module: str, packages: set[str]) -> Path | None:
    """The file of a module that is in one of the `packages`, or is not installed; else None."""
    top = module.partition(".")[0]
    try:
        spec = find_spec(top)
        if top not in packages and (spec is None or _is_installed(spec.origin)):
            return None  # before `find_spec` of what is within it, which would import it
        spec = find_spec(module)
    except (ImportError, ValueError):  # the name of something in a module; a module that is not there
        return None
    origin = "" if spec is None else spec.origin or ""
    return Path(origin) if origin.endswith(".py") else None


def _is_installed(origin: str | None) -> bool:
    if origin is None:  # a folder of modules without a file of its own
        return False
    path = Path(origin).resolve()
    return not path.is_file() or path.is_relative_to(STANDARD_LIBRARY) or not INSTALLED.isdisjoint(path.parts)


def _imported(text: str, package: str) -> Iterator[str]:
    """Names of modules that a module may import, wherever in it; and of what it imports from them."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # so that it cannot be imported either
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
