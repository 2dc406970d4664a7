"""From YAML and command line to a checked configuration; every problem is reported at once, each with its fix.

Called by training scripts (`load_config`), by the launcher and by `arealite check`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from arealite.api.cli_args import GRPOConfig, RunConfig, RWConfig, SFTConfig
from arealite.api.config_rules import choose_defaults, contradictions, fill_derived, follow_training
from arealite.api.config_source import NUMBER, Given, Reader, is_config_class, type_at, type_name
from arealite.api.errors import SENTENCE, ConfigError, DatasetError
from arealite.api.paths import expand

T = TypeVar("T")
KINDS: dict[str, type[RunConfig]] = {"grpo": GRPOConfig, "sft": SFTConfig, "rw": RWConfig}


def load_config(argv: list[str], cls: type[T]) -> T:
    """The configuration of `--config FILE key=value ...`. Raises ConfigError; nothing has been started then.

    What is first called by every script: from here on, mistakes in its configuration or its data end the script with a
    sentence in place of a traceback.
    """
    sys.excepthook = tell
    if {"-h", "--help"} & set(argv):
        print(f"usage: {sys.argv[0]} --config FILE [key=value ...]\n\n`arealite check FILE --explain` shows all keys.")
        sys.exit(0)
    path: str | None = None
    overrides: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--config":
            path = next(rest, None)
        elif word.startswith("--config="):
            path = word.partition("=")[2]
        else:
            overrides.append(word)
    if not path:
        raise ConfigError(f"no configuration file in {' '.join(argv)!r}: give --config FILE key=value ...")
    return load_config_file(Path(path), overrides, cls)


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.__excepthook__; of errors that are the user's the message alone."""
    if issubclass(kind, ConfigError | DatasetError):
        print(f"{SENTENCE}{kind.__name__}: {error}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


def load_run_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """As `load_config_file`, of the class that the file's or an override's `kind` names. For the launcher."""
    reader = Reader(RunConfig)
    reader.read_file(Path(path))
    for override in overrides:
        reader.read_override(override)
    kinds = [given.value for given in reader.givens if given.key == "kind" and given.value in KINDS]
    return load_config_file(path, overrides, KINDS[kinds[-1]] if kinds else GRPOConfig)


def load_config_file(path: str | Path, overrides: list[str], cls: type[T]) -> T:
    """The configuration of a YAML file with `dotted.key=value` overrides. Raises ConfigError naming every problem."""
    reader = Reader(cls)
    reader.read_file(Path(path))
    for override in overrides:
        reader.read_override(override)
    problems = list(reader.problems)
    config = apply_givens(reader.givens, cls, problems)
    where = {given.key: given.where for given in reader.givens}
    out_of_range = [f"{where.get(key, 'default')}: {key} {said}" for key, said in check_ranges(config)]
    problems += [*out_of_range, *expand_paths(config, where)]
    if isinstance(config, RunConfig) and not out_of_range:
        kind = next(name for c in type(config).__mro__ for name, known in KINDS.items() if c is known)
        if config.kind != kind:
            found = f"{where.get('kind', 'default')}: kind is {config.kind}"
            problems.append(f"{found}, but the script loads {cls.__name__}: write kind: {kind}, or use another script")
        follow_training(config, set(where))
        if isinstance(config, GRPOConfig):
            choose_defaults(config, set(where))
        problems += contradictions(config)
    if problems:
        num = len(problems)
        raise ConfigError(f"{num} problem{'s' * (num != 1)} in the configuration:\n  " + "\n  ".join(problems))
    if isinstance(config, RunConfig):
        fill_derived(config, set(where))
    return config


def apply_givens(givens: list[Given], cls: type[T], problems: list[str]) -> T:
    """An instance of `cls` with the values set in order. What cannot be set is added to `problems` and left out."""
    tree = OmegaConf.structured(cls)
    kept = []
    for given in givens:
        try:
            if not is_config_class(given.value):
                OmegaConf.update(tree, given.key, given.value, merge=False)
            elif OmegaConf.select(tree, given.key) is None:
                OmegaConf.update(tree, given.key, OmegaConf.structured(given.value))
            kept.append(given)
        except (OmegaConfBaseException, GrammarParseError) as error:
            problems.append(wrong_type(given, cls, error))
    complaints = {given.key: said for given in kept if (said := unresolvable(tree, given))}
    if complaints:
        problems += complaints.values()
        return apply_givens([given for given in kept if given.key not in complaints], cls, problems)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, cls)
    return config


def wrong_type(given: Given, cls: type, error: Exception) -> str:
    found = "nothing (null)" if given.value is None else f"{given.value!r} ({type(given.value).__name__})"
    if "interpolation" in type(error).__name__.lower():
        return f"{given.where}: {given.key} is {given.value!r}: {str(error).splitlines()[0]}"
    expected = type_name(type_at(cls, given.key))
    quoted = ", in quotes if the word itself is meant" if given.value is None and expected == "text" else ""
    return f"{given.where}: {given.key} is {found}, expected {expected}{quoted}"


def unresolvable(tree: DictConfig, given: Given) -> str | None:
    """What is wrong with the interpolation in `given`; None when there is none or it resolves."""
    if not (isinstance(given.value, str) and "${" in given.value):
        return None
    try:
        OmegaConf.select(tree, given.key, throw_on_missing=True)
    except (OmegaConfBaseException, GrammarParseError) as error:
        said = str(error).splitlines()[0]
        return f"{given.where}: {given.key} is {given.value!r}: {said}; write \\${{ for the text ${{"
    return None


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted key, value, field) of every value; sections are entered, an absent section is one value None."""
    for f in dataclasses.fields(config):
        value = vars(config)[f.name]
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, f


def expand_paths(config: Any, where: dict[str, str], prefix: str = "") -> list[str]:
    """Fill in what stands for something else in all paths; returns what is wrong with them."""
    problems = []
    for f in dataclasses.fields(config):
        key, value = f"{prefix}{f.name}", vars(config)[f.name]
        if dataclasses.is_dataclass(value):
            problems += expand_paths(value, where, f"{key}.")
        elif value and f.metadata.get("is_path"):
            try:
                setattr(config, f.name, expand(value))
            except ConfigError as error:
                problems.append(f"{where.get(key, 'default')}: {key}: {error}")
    return problems


def check_ranges(config: Any) -> Iterator[tuple[str, str]]:
    """(key, complaint) of values outside a field's `choices` or beyond its `low` and `high`."""
    for key, value, f in walk(config):
        choices, low, high = (f.metadata.get(name) for name in ("choices", "low", "high"))
        if value is None:
            continue
        if choices and value not in choices:
            yield key, f"is {value!r}, expected one of {', '.join(choices)}"
        elif isinstance(value, float) and math.isnan(value):
            yield key, "is not a number (nan)"
        elif isinstance(value, float) and math.isinf(value) and high != math.inf:
            yield key, f"is {value}, expected a finite number"
        elif low is not None and value < low:
            yield key, f"is {value}, expected at least {low:g}"
        elif high is not None and value > high:
            yield key, f"is {value}, expected at most {high:g}"


def explain(config: Any) -> list[tuple[str, Any, str]]:
    """(dotted key, value, documentation with what is allowed) of every value, in declaration order."""
    return [(key, value, f.metadata.get("doc", "") + allowed(f)) for key, value, f in walk(config)]


def allowed(f: dataclasses.Field) -> str:
    """The choices of a field, or its smallest and largest number, in words."""
    choices, low, high = (f.metadata.get(name) for name in ("choices", "low", "high"))
    if choices:
        return f"; one of {', '.join(choices)}"
    bounds = [f"at {word} {bound:g}" for word, bound in (("least", low), ("most", high)) if bound is not None]
    return f"; {', '.join(bounds)}" if bounds else ""


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that the reader would take for a number; PyYAML itself does not know 1e-6 for one."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def to_yaml(config: Any, width: int = 120) -> str:
    """The configuration as YAML that `load_config_file` reads back to an equal one, in about `width` columns."""
    values = escaped(dataclasses.asdict(config))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


def escaped(value: Any) -> Any:
    """`value` with every "${" marked as text, so that reading does not take it for an interpolation."""
    if isinstance(value, dict):
        return {key: escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [escaped(entry) for entry in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value
