"""Reads a YAML file and `key=value` overrides into a flat list of settings, each with the place it came from.

Called by api/load_config.py. Unknown keys and values of the wrong kind are collected, not raised, so that a user
sees all of them at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from arealite.api.errors import ConfigError
from arealite.api.known_names import ours
from arealite.api.paths import expand

NUM_SUGGESTIONS = 3
MIN_LETTERS = 5  # names this short resemble others by chance: type and dtype, model and mode
VARIABLE = re.compile(r"(?<!\\)\${([A-Z_][A-Z0-9_]*)}")  # of the environment: no key is written so
NULLS = ("", "~", "null", "Null", "NULL")
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
DIGITS = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")  # as an integer may be written where one is expected
NUMBER = re.compile(
    r"([-+]?([0-9]+[.][0-9]*|[.][0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?[.](inf|Inf|INF)|[.](nan|NaN|NAN))$"
)


@dataclass(frozen=True)
class Given:
    """One value that the user wrote: `where` is "file:line" or "command line". The value of a section is its class:
    an optional section comes into being where the user names it."""

    key: str
    value: Any
    where: str


def field_types(cls: type) -> dict[str, Any]:
    """Field name -> type of a config class, None removed from optional ones."""
    hints = typing.get_type_hints(cls)
    return {f.name: without_none(hints[f.name]) for f in dataclasses.fields(cls)}


def without_none(hint: Any) -> Any:
    """`X | None` -> X; every other type as it is."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kept = [a for a in typing.get_args(hint) if a is not type(None)]
        return kept[0] if len(kept) == 1 else hint
    return hint


def is_config_class(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def type_at(cls: type, key: str) -> Any:
    """The type of the field at dotted `key` (None removed), or of entries of the dict around it. Raises KeyError."""
    hint: Any = cls
    for name in re.split(r"[.\[]", key):
        if typing.get_origin(hint) is dict:
            return typing.get_args(hint)[1]
        if not is_config_class(hint):
            raise KeyError(key)
        hint = field_types(hint)[name]
    return hint


def type_name(hint: Any) -> str:
    """How a type is called in an error message."""
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"a list, each entry {type_name(args[0])}"
    if origin is dict or is_config_class(hint):
        return "a mapping"
    return str(hint)


def all_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key that leads to a value or a section."""
    keys = []
    for name, hint in field_types(cls).items():
        keys.append(prefix + name)
        if is_config_class(hint):
            keys += all_keys(hint, f"{prefix}{name}.")
    return keys


def nearest_keys(key: str, cls: type) -> list[str]:
    """Valid dotted keys that the user may have meant: similar siblings, the same or a similar name elsewhere."""
    parent, _, name = key.rpartition(".")
    keys = all_keys(cls)
    names = [k.rpartition(".")[2] for k in keys]
    siblings = [n for k, n in zip(keys, names, strict=True) if k.rpartition(".")[0] == parent]
    close = difflib.get_close_matches(name, siblings, NUM_SUGGESTIONS, 0.6)
    found = [f"{parent}.{n}" if parent else n for n in close]
    similar = difflib.get_close_matches(name, sorted(set(names)), NUM_SUGGESTIONS, 0.85)
    for n in [name, *(similar if len(name) > MIN_LETTERS else [])]:
        found += [k for k, last in zip(keys, names, strict=True) if last == n]
    return list(dict.fromkeys(found))[:NUM_SUGGESTIONS]


def known_part(key: str, cls: type) -> tuple[str, Any]:
    """The longest beginning of dotted `key` that exists, and its type; "" is the top level."""
    while key := key.rpartition(".")[0]:
        try:
            return key, type_at(cls, key)
        except KeyError:
            continue
    return "", cls


class Reader:
    """Turns nested values into `givens`, collecting `problems`. One per configuration being loaded."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.givens: list[Given] = []
        self.problems: list[str] = []

    def read_file(self, path: Path) -> None:
        """Raises ConfigError where the file is missing or is not YAML: nothing else can be checked then."""
        try:
            text = Path(expand(str(path))).read_text()
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            tree = value_of(node, self.cls) if node else {}
        except FileNotFoundError:
            raise ConfigError(f"configuration file {path} does not exist: check --config") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        except RecursionError:
            raise ConfigError(
                f"{path}: nested without end: does an alias (*name) stand inside its own anchor?"
            ) from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}:1: expected `key: value` lines, found {type(tree).__name__}")
        lines: dict[str, int] = {}
        mark_lines(node, "", lines)
        self.walk(tree, self.cls, "", lambda key: f"{path}:{line_of(key, lines)}")

    def read_override(self, override: str) -> None:
        """One `dotted.key=value`; the value is YAML, but text fields take it as it stands."""
        where = "command line"
        key, equals, text = override.partition("=")
        key = key.strip().removeprefix("--").removeprefix("+")
        if not equals or not key or not all(key.split(".")):
            self.problems.append(f"{where}: {override!r} is not an override: write key=value")
            return
        try:
            hint = type_at(self.cls, key)
        except KeyError:
            self.unknown(key, where)
            return
        try:
            value = text if hint is str and not text.startswith(("'", '"')) else parse_value(text, hint)
        except yaml.YAMLError as error:
            self.problems.append(f"{where}: the value of {key}={text} is not YAML: {str(error).splitlines()[0]}")
            return
        if text == "null":
            value = None
        sections = [key[:at] for at, letter in enumerate(key) if letter == "."]
        self.givens += [
            Given(k, type_at(self.cls, k), where) for k in sections if is_config_class(type_at(self.cls, k))
        ]
        self.add(key, value, hint, lambda _: where)

    def walk(self, tree: dict[Any, Any], cls: type, prefix: str, where: Any) -> None:
        hints = field_types(cls)
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if name not in hints:
                self.unknown_tree(key, value, where)
            else:
                self.add(key, value, hints[name], where)

    def add(self, key: str, value: Any, hint: Any, where: Any) -> None:
        """Sections are entered; a mapping for a dict field is added entry by entry, so that overrides add to it."""
        if is_config_class(hint) and isinstance(value, dict):
            self.givens.append(Given(key, hint, where(key)))
            self.walk(value, hint, f"{key}.", where)
        elif typing.get_origin(hint) is dict and isinstance(value, dict) and value:
            for name, entry in value.items():  # a name with a dot is one name all the same
                path = f"{key}[{name}]" if "." in str(name) else f"{key}.{name}"
                self.givens.append(Given(path, entry, where(f"{key}.{name}")))
        elif complaint := wrong_kind(value, hint):
            self.problems.append(f"{where(key)}: {key} is {value!r}: {complaint}")
        else:
            value = VARIABLE.sub(r"${oc.env:\1}", value) if isinstance(value, str) else value
            self.givens.append(Given(key, value, where(key)))

    def unknown_tree(self, key: str, value: Any, where: Any) -> None:
        """A section that only others have is told by its entries, where those have a name here."""
        keys = all_keys(self.cls)
        if isinstance(value, dict) and not ours(key, keys):
            inside = {f"{key}.{name}": entry for name, entry in value.items()}
            known = {k: entry for k, entry in inside.items() if ours(k, keys) or isinstance(entry, dict)}
            for inner, entry in known.items():
                self.unknown_tree(inner, entry, where)
            if known:
                return
        self.unknown(key, where(key))

    def unknown(self, key: str, where: str) -> None:
        keys = all_keys(self.cls)
        if known_as := ours(key, keys):
            hint = f"here it is {known_as}"
        elif key in keys:
            hint = "in a file each part stands on a line of its own, below the one before"
        elif nearest := nearest_keys(key, self.cls):
            hint = f"did you mean {' or '.join(nearest)}?"
        else:
            parent, section = known_part(key, self.cls)
            known = f"has {', '.join(field_types(section))}" if is_config_class(section) else f"is {type_name(section)}"
            hint = f"{parent or 'the top level'} {known}"
        self.problems.append(f"{where}: unknown key {key!r}: {hint}")


def parse_value(text: str, hint: Any) -> Any:
    """The value of a command-line override, read as YAML."""
    node = yaml.compose(f"value: {text}", Loader=yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode)
    return value_of(node.value[0][1], hint)


def value_of(node: yaml.Node, hint: Any) -> Any:
    """The value of a YAML node where a field of type `hint` is expected. Raises yaml.MarkedYAMLError."""
    if not node.tag.startswith("tag:yaml.org,2002:"):
        raise yaml.MarkedYAMLError(problem=f"found the tag {node.tag}, expected none", problem_mark=node.start_mark)
    if isinstance(node, yaml.MappingNode):
        fields = field_types(hint) if is_config_class(hint) else {}
        of_entry = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else Any
        return {key: value_of(entry, fields.get(key, of_entry)) for key, entry in entries(node)}
    if isinstance(node, yaml.SequenceNode):
        of_entry = typing.get_args(hint)[0] if typing.get_origin(hint) is list else Any
        return [value_of(entry, of_entry) for entry in node.value]
    assert isinstance(node, yaml.ScalarNode)
    return node.value if node.style else scalar(node.value, hint)


def entries(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
    """Keys, as they are written, and values of a mapping; its own ones win over those that `<<` brings in."""
    merged: dict[str, yaml.Node] = {}
    own: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for source in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.MarkedYAMLError(problem="expected a mapping after <<", problem_mark=key.start_mark)
                merged |= dict(entries(source))
        elif not isinstance(key, yaml.ScalarNode) or key.value in own:
            what = f"duplicate key {key.value}" if isinstance(key, yaml.ScalarNode) else "a key that is no word"
            raise yaml.MarkedYAMLError(problem=f"found {what}", problem_mark=key.start_mark)
        else:
            own[key.value] = value
    yield from (merged | own).items()


def scalar(text: str, hint: Any) -> Any:
    """What a word without quotes means. Where text is expected it is what is written, be it 1.10, 0123 or off;
    elsewhere YAML 1.2's words and decimal numbers, and yes, no, on, off where true or false is expected."""
    if text in NULLS:
        return None
    if hint in (str, Path):
        return text
    if text.lower() in (WORDS if hint is bool else ("true", "false")):
        return WORDS[text.lower()]
    if INTEGER.fullmatch(text) or (hint in (int, float) and DIGITS.fullmatch(text)):
        return int(text)
    return float(re.sub("[.](?=[a-zA-Z])", "", text)) if NUMBER.fullmatch(text) else text


def wrong_kind(value: Any, hint: Any) -> str | None:
    """What OmegaConf would convert silently although it is a mistake; None if the kind is right."""
    if isinstance(value, str) and "${" in value:
        return None  # an interpolation: its target is checked when it is resolved
    if isinstance(value, bool) and hint in (int, float):
        return f"expected {type_name(hint)}, found true or false"
    if hint is bool and not isinstance(value, bool | str | None):
        return f"expected true or false, found {type(value).__name__}"
    if is_config_class(hint) and value is not None:
        return f"expected a mapping of {', '.join(field_types(hint))}, found {type(value).__name__}"
    return None


def mark_lines(node: yaml.Node | None, prefix: str, lines: dict[str, int]) -> None:
    """Fill `lines` with dotted key -> line number (from 1)."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            lines[key] = key_node.start_mark.line + 1
            mark_lines(value_node, f"{key}.", lines)


def line_of(key: str, lines: dict[str, int]) -> int:
    """The line of `key`, or of the nearest section around it (keys that come from a YAML merge have none)."""
    while key not in lines and "." in key:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)
