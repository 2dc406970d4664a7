"""From YAML and command line to a checked configuration; every problem is reported at once, each with its fix.

Called by training scripts (`load_config`), by the launcher and by `arealite check`. What is written is read as words,
with the place of each; the fields say what the words mean; pydantic checks types and ranges, config_rules.py the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import typing
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from arealite.api.cli_args import GRPOConfig, RunConfig, RWConfig, SFTConfig
from arealite.api.config_keys import (
    all_keys,
    field_types,
    is_section,
    meant_by,
    ours,
    section_of,
    type_at,
    type_name,
    walk,
)
from arealite.api.config_rules import contradictions, resolve
from arealite.api.errors import SENTENCE, ConfigError, DatasetError
from arealite.api.paths import expand

T = TypeVar("T")
KINDS: dict[str, type[RunConfig]] = {"grpo": GRPOConfig, "sft": SFTConfig, "rw": RWConfig}

NULLS = ("", "~", "null", "Null", "NULL")
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
DIGITS = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")  # as an integer may be written where one is expected
NUMBER = re.compile(
    r"([-+]?([0-9]+[.][0-9]*|[.][0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?[.](inf|Inf|INF)|[.](nan|NaN|NAN))$"
)
REFERENCE = re.compile(r"(?<!\\)\$\{([^{}]*)\}")  # to another key, or to a variable of the environment:
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")  # no key is written so
ABSENT = dataclasses.MISSING


def load_config(argv: list[str], cls: type[T]) -> T:
    """The configuration of `--config FILE key=value ...`. Raises ConfigError; nothing has been started then.

    What is first called by every script: from here on, mistakes in its configuration or its data end the script with a
    sentence in place of a traceback.
    """
    sys.excepthook = tell
    keys = "`arealite check FILE --explain` shows all keys."
    options = argparse.ArgumentParser(
        usage=f"{sys.argv[0]} --config FILE [key=value ...]", epilog=keys, allow_abbrev=False
    )
    options.add_argument("--config", nargs="?", metavar="FILE", help="the configuration, in YAML")
    given, overrides = options.parse_known_args(argv)
    if not given.config:
        raise ConfigError(f"no configuration file in {' '.join(argv)!r}: give --config FILE key=value ...")
    return load_config_file(given.config, overrides, cls)


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.__excepthook__; of errors that are the user's the message alone."""
    if issubclass(kind, ConfigError | DatasetError):
        print(f"{SENTENCE}{kind.__name__}: {error}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


def load_run_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """As `load_config_file`, of the class that the file's or an override's `kind` names. For the launcher."""
    reader = Reader(RunConfig, Path(path), overrides)
    return load_config_file(path, overrides, KINDS.get(str(reader.tree.get("kind")), GRPOConfig))


def load_config_file(path: str | Path, overrides: list[str], cls: type[T]) -> T:
    """The configuration of a YAML file with `dotted.key=value` overrides. Raises ConfigError naming every problem."""
    reader = Reader(cls, Path(path), overrides)
    config = reader.config()
    problems = [text for _, text in sorted(dict.fromkeys(reader.problems), key=lambda problem: problem[0])]
    if isinstance(config, RunConfig):
        kind = next(name for c in type(config).__mro__ for name, known in KINDS.items() if c is known)
        if config.kind != kind:
            said = f"{reader.place('kind')[1]}: kind is {config.kind}"
            problems.append(f"{said}, but the script loads {cls.__name__}: write kind: {kind}, or use another script")
        resolve(config, reader.places.keys())
        problems += contradictions(config)
    if problems:
        num = len(problems)
        raise ConfigError(f"{num} problem{'s' * (num != 1)} in the configuration:\n  " + "\n  ".join(problems))
    return config


class Word(str):
    """Text without quotes: what it means depends on what is expected where it stands."""


class Reader:
    """What a user wrote for a configuration of class `cls`: a tree of words, the place of each key, and what is wrong.

    Raises ConfigError where the file is missing or is not YAML: nothing else can be checked then.
    """

    def __init__(self, cls: type, path: Path, overrides: list[str]) -> None:
        self.cls = cls
        self.tree: dict[str, Any] = {}
        self.places: dict[str, tuple[int, str]] = {}  # dotted key -> how many were read before, "file:line"
        self.problems: list[tuple[int, str]] = []  # in the order of reading
        self._read_file(path)
        for override in overrides:
            self._read_override(override)

    def place(self, key: str) -> tuple[int, str]:
        """Where `key` is written, or the nearest section around it."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, (sys.maxsize, "default"))

    def config(self) -> Any:
        """An instance of the class, of all that is right; what is wrong goes to `problems`, and is left out."""
        tree = self._meant(self.tree, self.cls, "")
        adapter: TypeAdapter = TypeAdapter(self.cls)
        while True:
            try:  # of JSON pydantic takes mappings for sections although it is strict
                config = adapter.validate_json(json.dumps(tree))
                break
            except ValidationError as errors:
                faults = errors.errors(include_url=False)
            for fault in faults:
                self._wrong(fault["loc"], fault["type"], fault["input"], fault.get("ctx", {}))
            if not sum(taken_out(tree, fault["loc"]) for fault in faults):
                raise ConfigError("\n  ".join(text for _, text in self.problems))
        for key, value, f in walk(config):
            if value and f.metadata.get("is_path"):
                section, name = section_of(config, key)
                if section is None:  # a name with a dot, which is refused later
                    continue
                try:
                    setattr(section, name, expand(value))
                except ConfigError as error:
                    self._problem(key, f"{key}: {error}")
        return config

    def _problem(self, key: str, text: str) -> None:
        order, where = self.place(key)
        self.problems.append((order, f"{where}: {text}"))

    def _wrong(self, path: tuple[str | int, ...], kind: str, value: Any, limits: dict[str, Any]) -> None:
        """What pydantic complains of, in our words: what was found, and what is expected."""
        try:
            hint = type_at(self.cls, path)
        except KeyError:  # of a union pydantic names the member too
            path = path[:-1]
            hint = type_at(self.cls, path)
        key = ".".join(map(str, path))
        found = "nothing (null)" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
        expected = type_name(hint)
        if isinstance(value, float) and math.isnan(value):
            found = "not a number (nan)"
        elif kind == "missing":
            found = "missing"
        elif kind == "finite_number":
            expected = "a finite number"
        elif kind in ("greater_than_equal", "less_than_equal"):
            expected = f"at least {limits['ge']:g}" if "ge" in limits else f"at most {limits['le']:g}"
        elif value is None and hint is str:
            expected += ", in quotes if the word itself is meant"
        self._problem(key, f"{key} is {found}, expected {expected}")

    # -- reading ----------------------------------------------------------------------------------------------------

    def _read_file(self, path: Path) -> None:
        try:
            node = yaml.compose(Path(expand(str(path))).read_text(), Loader=yaml.SafeLoader)
            tree = self._words(node, "", str(path)) if node else {}
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
            kind = "list" if isinstance(tree, list) else "text"
            raise ConfigError(f"{path}:1: expected `key: value` lines, found {kind}")
        self.tree = tree

    def _read_override(self, override: str) -> None:
        """One `dotted.key=value`; the value is YAML, but text fields take it as it stands. A mapping adds to what is
        there."""
        where = "command line"
        key, equals, text = override.partition("=")
        key = key.strip().removeprefix("--").removeprefix("+")
        path = key.split(".")
        self.places[key] = (len(self.places), where)
        if not equals or not all(path):
            self._problem(key, f"{override!r} is not an override: write key=value")
            return
        try:
            hint = type_at(self.cls, path)
        except KeyError:
            self._problem(key, f"unknown key {key!r}: {meant_by(key, self.cls)}")
            return
        value: Any = None if text == "null" else text
        if value is not None and (hint is not str or text.startswith(("'", '"'))):
            try:
                node = yaml.compose(f"value: {text}", Loader=yaml.SafeLoader)
                value = self._words(node.value[0][1], key, where) if isinstance(node, yaml.MappingNode) else None
            except yaml.YAMLError as error:
                self._problem(key, f"the value of {key}={text} is not YAML: {str(error).splitlines()[0]}")
                return
        section = self.tree
        for at, name in enumerate(path[:-1], start=1):
            self.places.setdefault(".".join(path[:at]), (len(self.places), where))
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[path[-1]] = merged(section.get(path[-1]), value)

    def _words(self, node: yaml.Node, key: str, where: str) -> Any:
        """Mappings, lists and words of a YAML node, null where nothing stands; notes the place of every key below
        `key`. Raises yaml.MarkedYAMLError."""
        if not node.tag.startswith("tag:yaml.org,2002:"):
            raise yaml.MarkedYAMLError(problem=f"found the tag {node.tag}, expected none", problem_mark=node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return [self._words(entry, key, where) for entry in node.value]
        if isinstance(node, yaml.ScalarNode):
            return node.value if node.style else None if node.value in NULLS else Word(node.value)
        tree = {}
        for name, (line, value) in entries(node).items():
            inner = f"{key}.{name}" if key else name
            self.places[inner] = (len(self.places), where if where == "command line" else f"{where}:{line}")
            tree[name] = self._words(value, inner, where)
        return tree

    # -- what the words mean ----------------------------------------------------------------------------------------

    def _meant(self, value: Any, hint: Any, key: str) -> Any:
        """The value of a word, or of the words in a tree, where one of type `hint` is expected. Unknown keys are told
        and left out. Raises ConfigError where a reference leads nowhere."""
        args = typing.get_args(hint)
        if isinstance(value, dict) and is_section(hint):
            fields, known = field_types(hint), {}
            for name, entry in value.items():
                inner = f"{key}.{name}" if key else name
                if name not in fields:
                    self._unknown(inner, entry)
                    continue
                try:
                    known[name] = self._meant(entry, fields[name], inner)
                except ConfigError as error:
                    self._problem(inner, f"{inner} is {entry!r}: {error}; write \\${{ for the text ${{")
            return known
        if isinstance(value, dict):
            of_entry = args[1] if typing.get_origin(hint) is dict else Any
            return {name: self._meant(entry, of_entry, f"{key}.{name}") for name, entry in value.items()}
        if isinstance(value, list):
            return [self._meant(entry, args[0] if typing.get_origin(hint) is list else Any, key) for entry in value]
        if isinstance(value, str) and "${" in value:
            value = self._followed(value)
            if not isinstance(value, str):
                return str(value) if hint is str and value is not None else self._meant(value, hint, key)
        if isinstance(value, Word) or (isinstance(value, str) and hint in (int, float, bool)):
            return scalar(value, hint)
        return value

    def _unknown(self, key: str, value: Any) -> None:
        """A section that only others have is told by its entries, where those have a name here."""
        keys = all_keys(self.cls)
        if isinstance(value, dict) and not ours(key, keys):
            inside = {f"{key}.{name}": entry for name, entry in value.items()}
            known = {k: entry for k, entry in inside.items() if ours(k, keys) or isinstance(entry, dict)}
            for inner, entry in known.items():
                self._unknown(inner, entry)
            if known:
                return
        self._problem(key, f"unknown key {key!r}: {meant_by(key, self.cls)}")

    def _followed(self, text: str, trail: tuple[str, ...] = ()) -> Any:
        """`text` with ${key} and ${VARIABLE} filled in; what a key holds, where that is all of the text."""
        if whole := REFERENCE.fullmatch(text):
            return self._named(whole[1], trail)
        text = Word(REFERENCE.sub(lambda reference: str(self._named(reference[1], trail)), text))
        return Word(text.replace(r"\${", "${"))

    def _named(self, name: str, trail: tuple[str, ...]) -> Any:
        """What the key or the variable `name` holds; `trail` has the keys that led to it."""
        if VARIABLE.fullmatch(name):
            if name not in os.environ:
                raise ConfigError(f"the environment variable {name} is not set")
            return Word(os.environ[name])
        if name in trail:
            raise ConfigError(f"{name} leads back to itself")
        value: Any = self.tree
        default: Any = {
            f.name: made() if callable(made := f.default_factory) else f.default for f in dataclasses.fields(self.cls)
        }
        path = name.split(".")
        for at, part in enumerate(path, start=1):
            default = default.get(part, ABSENT) if isinstance(default, dict) else ABSENT
            value = value[part] if isinstance(value, dict) and part in value else default
            if value is ABSENT:
                raise ConfigError(f"there is no key {name!r}")
            section = type_at(self.cls, path[:at])
            if is_section(section) and value is not None:
                default = vars(section() if default is None else default)
        return self._followed(value, (*trail, name)) if isinstance(value, str) and "${" in value else value


def taken_out(tree: dict[str, Any], path: tuple[str | int, ...]) -> bool:
    """Remove what stands at `path`, or the list around it, from a tree of mappings; False where nothing does."""
    name, *rest = path
    if rest and isinstance(tree.get(str(name)), dict):
        return taken_out(tree[str(name)], tuple(rest))
    return tree.pop(str(name), ABSENT) is not ABSENT


def merged(earlier: Any, later: Any) -> Any:
    """`later`, with the entries of `earlier` that it does not have where both are mappings and it is not empty."""
    if not (isinstance(earlier, dict) and isinstance(later, dict) and later):
        return later
    return earlier | {name: merged(earlier.get(name), entry) for name, entry in later.items()}


def entries(node: yaml.Node) -> dict[str, tuple[int, yaml.Node]]:
    """Name -> line (from 1) and value of a mapping, as written; its own ones win over those that `<<` brings in."""
    inherited: dict[str, tuple[int, yaml.Node]] = {}
    written: dict[str, tuple[int, yaml.Node]] = {}
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for source in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.MarkedYAMLError(problem="expected a mapping after <<", problem_mark=key.start_mark)
                inherited |= entries(source)
        elif not isinstance(key, yaml.ScalarNode) or key.value in written:
            what = f"duplicate key {key.value}" if isinstance(key, yaml.ScalarNode) else "a key that is no word"
            raise yaml.MarkedYAMLError(problem=f"found {what}", problem_mark=key.start_mark)
        else:
            written[key.value] = (key.start_mark.line + 1, value)
    return inherited | written


def scalar(text: str, hint: Any) -> Any:
    """What a word means. Where text is expected it is what is written, be it 1.10, 0123 or off; elsewhere YAML 1.2's
    words and decimal numbers, and yes, no, on, off where true or false is expected."""
    if hint in (str, Path) or typing.get_origin(hint) is Literal:
        return text
    if text.lower() in (WORDS if hint is bool else ("true", "false")):
        return WORDS[text.lower()]
    if INTEGER.fullmatch(text) or (hint in (int, float) and DIGITS.fullmatch(text)):
        return int(text)
    if hint is float or NUMBER.fullmatch(text):
        with suppress(ValueError):
            return float(re.sub("[.](?=[a-zA-Z])", "", text))
    return text


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that the reader would take for a number; PyYAML itself does not know 1e-6 for one."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def to_yaml(config: Any, width: int = 120) -> str:
    """The configuration as YAML that `load_config_file` reads back to an equal one, in about `width` columns."""
    return yaml.dump(as_written(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


def as_written(value: Any) -> Any:
    """`value` as a file gives it: sections as mappings without what is derived, "${" marked as text."""
    if dataclasses.is_dataclass(value):
        return {name: as_written(vars(value)[name]) for name in field_types(type(value))}
    if isinstance(value, dict):
        return {key: as_written(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [as_written(entry) for entry in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value
