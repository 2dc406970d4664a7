"""How a configuration field is declared, with its documentation. Called by cli_args.py and by scripts' own classes."""

from __future__ import annotations

from dataclasses import field
from typing import Any

Limit = float | None


def setting(
    default: Any, doc: str, choices: tuple[str, ...] = (), low: Limit = None, high: Limit = None, is_path: bool = False
) -> Any:
    """A documented field. `choices` are the allowed words, `low` and `high` the smallest and largest allowed number
    (infinity only if `high` is infinite); in a path ~ and $NAME are filled in (api/paths.py), and it is relative to the
    folder in which the command runs.

    A callable default is a factory (list, dict, or a config class).
    """
    notes = {"doc": doc, "choices": choices, "low": low, "high": high, "is_path": is_path}
    if callable(default):
        return field(default_factory=default, metadata=notes)
    return field(default=default, metadata=notes)
