"""What sections of the configuration and their fields are made of. Used by cli_args.py and run_args.py."""

from __future__ import annotations

from dataclasses import field
from math import inf
from typing import Any, ClassVar


def setting(default: Any, doc: str, low: float | None = None, high: float | None = None, is_path: bool = False) -> Any:
    """A documented field: `low` and `high` are the smallest and largest number allowed (infinity only if `high` is
    infinite), words are allowed by a type Literal["a", "b"]; in a path ~ and $NAME are filled in (api/paths.py).

    A callable default is a factory (list, dict, or a config class). The notes are pydantic's (api/load_config.py).
    """
    notes = {"description": doc, "ge": low, "le": high, "is_path": is_path}
    notes |= {"allow_inf_nan": True} if high == inf else {}
    return field(metadata=notes, **{"default_factory" if callable(default) else "default": default})


def derived(doc: str) -> Any:
    """A value that follows from other sections (api/config_rules.py). Files cannot give it; code that has but this
    section can."""
    return field(default=None, metadata={"description": doc, "is_derived": True})


class Section:
    """A part of the configuration: pydantic takes no value of another type, and no number that is not finite."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "allow_inf_nan": False}
