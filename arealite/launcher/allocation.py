"""The allocation mode: who runs where, as one short string, in every spelling in use. Called by plan.py and scripts.

mode      := group ("+" group)*                 groups have their own devices
group     := component ("|" component)*         components of a group share devices
component := [backend ["[" name "]"] (":" | ".")] layout
layout    := dims | "(" "attn:" dims "|" "ffn:" dims ")"
dims      := (letter number)+                   d data, t or m tensor, p pipeline, c context, e expert

Blanks may stand between all of them.
"""

from __future__ import annotations

import difflib
import itertools
import re
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

from arealite.api.cli_args import GRPOConfig, RunConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Dims

INFERENCE_BACKENDS = ("native", "sglang", "vllm")
TRAIN_BACKENDS = ("fsdp", "megatron", "archon")
DEFAULT_TRAIN_BACKEND = "fsdp"
DIMENSIONS = {"d": "data", "t": "tensor", "p": "pipeline", "c": "context", "e": "expert"}
SYNONYMS = {"m": "t"}
MAX_DIGITS = 6
FIRST_DIMENSION = re.compile(f"[{''.join(DIMENSIONS | SYNONYMS)}][0-9]")

Role = Literal["inference", "train"]


@dataclass(frozen=True)
class Component:
    """One set of like processes. `ffn` is the expert layers' own layout (MoE form); `dims` then is the attention's."""

    backend: str
    dims: Dims
    name: str = ""
    ffn: Dims | None = None

    @property
    def role(self) -> Role:
        return "inference" if self.backend in INFERENCE_BACKENDS else "train"

    @property
    def label(self) -> str:
        """Its name; "rollout" or "actor" when none is given."""
        return self.name or ("rollout" if self.role == "inference" else "actor")

    @property
    def world_size(self) -> int:
        """Devices it uses."""
        return self.dims.size

    @property
    def engine_dims(self) -> Dims:
        """How a trainer's ranks share a model: the attention's layout, in the MoE form with the experts' e."""
        return self.dims if self.ffn is None else replace(self.dims, e=self.ffn.e)

    @property
    def num_servers(self) -> int:
        return self.dims.d if self.role == "inference" else 0

    def __str__(self) -> str:
        layout = str(self.dims) if self.ffn is None else f"(attn:{self.dims}|ffn:{self.ffn})"
        return f"{self.backend}{f'[{self.name}]' if self.name else ''}:{layout}"


def trainer_dims(config: RunConfig, role: str = "") -> Dims:
    """How the allocation spreads a role's model, and over which ranks: as the policy's where it does not say."""
    mode = AllocationMode.parse(config.allocation_mode)
    component = mode.role(role)
    assert component is not None, "the launcher's plan refuses a run without a trainer"
    before = itertools.takewhile(lambda of_set: component not in of_set, mode.trainer_sets)
    return replace(component.engine_dims, first=sum(of_set[0].world_size for of_set in before))


def trainer_layouts(config: RunConfig) -> tuple[Dims, ...]:
    """How each set of trainer ranks shares out a batch: as its first component's layout says."""
    sets = AllocationMode.parse(config.allocation_mode).trainer_sets
    return tuple(trainer_dims(config, of_set[0].label) for of_set in sets)


def models_of_ranks(config: RunConfig) -> list[tuple[str, ...]]:
    """Of each trainer rank the models that it has a part of, by their keys in the configuration."""
    roles = {config.trained[0]: trainer_dims(config)}
    if isinstance(config, GRPOConfig):
        others = {"critic": config.critic, "ref": config.ref}
        roles |= {role: trainer_dims(config, role) for role, engine in others.items() if engine is not None}
    num_ranks = sum(dims.size for dims in trainer_layouts(config))
    return [tuple(role for role, dims in roles.items() if rank in dims.ranks) for rank in range(num_ranks)]


@dataclass(frozen=True)
class AllocationMode:
    """A parsed allocation mode. `str(mode)` is its one canonical spelling."""

    groups: tuple[tuple[Component, ...], ...]

    @classmethod
    def parse(cls, text: str) -> AllocationMode:
        """Raises ConfigError, which shows `text` with a caret under the character at fault."""
        return _Parser(text).mode()

    def __str__(self) -> str:
        return "+".join("|".join(map(str, group)) for group in self.groups)

    @property
    def components(self) -> tuple[Component, ...]:
        return tuple(c for group in self.groups for c in group)

    @property
    def inference(self) -> Component | None:
        """The rollout servers; None when only training is allocated."""
        return next((c for c in self.components if c.role == "inference"), None)

    @property
    def train(self) -> Component | None:
        """The policy's trainer: the training component called "actor", or the first one."""
        trainers = [c for c in self.components if c.role == "train"]
        return next((c for c in trainers if c.label == "actor"), next(iter(trainers), None))

    @property
    def trainer_sets(self) -> tuple[tuple[Component, ...], ...]:
        """The training components by the ranks that they share, in the order of ranks: those of the policy, whose
        component comes first, then of its critic, then of its reference."""
        sets = [[c for c in group if c.role == "train"] for group in self.groups]
        in_order = [sorted(of_set, key=lambda c: (c != self.train, c.label)) for of_set in sets if of_set]
        return tuple(map(tuple, sorted(in_order, key=lambda of_set: (of_set[0] != self.train, of_set[0].label))))

    def role(self, name: str) -> Component | None:
        """The training component called `name`; where there is none, the policy's trainer."""
        return next((c for c in self.components if c.role == "train" and c.label == name), self.train)

    @property
    def colocated(self) -> bool:
        """Whether servers and the policy's trainer share devices."""
        return any(self.inference in group and self.train in group for group in self.groups)

    @property
    def num_devices(self) -> int:
        """Devices of all groups together."""
        return sum(group[0].world_size for group in self.groups)


class _Parser:
    """Recursive descent: one method per rule of the grammar, `at` is the next character that is no blank."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r"\s", " ", text)
        self.at = 0
        self.read("")  # blanks at the beginning

    def mode(self) -> AllocationMode:
        labels: set[str] = set()
        groups = [self.group(labels)]
        while self.read(r"\+"):
            groups.append(self.group(labels))
        if self.at < len(self.text):
            self.fail(f"unexpected {self.peek!r}; expected a dimension, '+', '|' or the end")
        return AllocationMode(tuple(groups))

    def group(self, labels: set[str]) -> tuple[Component, ...]:
        components: list[Component] = []
        while not components or self.read(r"\|"):
            start, component = self.at, self.component()
            if component.label in labels:
                self.fail(
                    f"a second {component.role} component called {component.label!r}; name them apart,"
                    f" such as {component.backend}[other]:{component.dims}",
                    start,
                )
            labels.add(component.label)
            components.append(component)
            if component.world_size != components[0].world_size:
                self.fail(
                    f"{component} has {component.world_size} devices and {components[0]} has"
                    f" {components[0].world_size}; components joined by '|' share their devices, so the products of"
                    " their dimensions must be equal (use '+' for separate devices)",
                    start,
                )
        return tuple(components)

    def component(self) -> Component:
        start, known = self.at, INFERENCE_BACKENDS + TRAIN_BACKENDS
        backend, name, ffn = DEFAULT_TRAIN_BACKEND, "", None
        if not FIRST_DIMENSION.match(self.text, start):
            found = f"expected a backend or a dimension, found {self.peek!r}" if self.peek else "unfinished"
            backend = self.read("[A-Za-z_-]+", found)
            if backend not in known:
                near = difflib.get_close_matches(backend.lower(), known, n=1)
                guess = f"did you mean {near[0]!r}? " if near else ""
                self.fail(
                    f"unknown backend {backend!r}; {guess}Inference: {', '.join(INFERENCE_BACKENDS)};"
                    f" training: {', '.join(TRAIN_BACKENDS)}",
                    start,
                )
            if self.read(r"\["):
                name = self.read("[A-Za-z0-9_-]+", "expected a name of letters, digits, '_' or '-'")
                self.read(r"\]", "expected ']' after the name")
            self.read("[:.]", f"expected ':' and dimensions after {backend!r}, such as {backend}:d1")
        if self.peek == "(":
            if backend in INFERENCE_BACKENDS:
                self.fail(f"the form (attn:...|ffn:...) is for training; {backend} serves")
            dims, ffn = self.moe()
        else:
            dims = self.dims()
        component = Component(backend, dims, name, ffn)
        if component.world_size // dims.p % dims.e:
            self.fail(
                f"e{dims.e} does not divide d{dims.d} x t{dims.t} x c{dims.c}: experts are spread over these devices",
                start,
            )
        return component

    def moe(self) -> tuple[Dims, Dims]:
        self.expect("(", "attn", ":")
        attn = self.dims("dtpc", "attn; experts have their layout in ffn")
        self.expect("|", "ffn", ":")
        start, ffn = self.at, self.dims("dtpe", "ffn")
        attn_total, ffn_total = attn.size, ffn.size * ffn.e
        if attn_total != ffn_total:
            self.fail(f"ffn has {ffn_total} devices and attn has {attn_total}; they are the same devices", start)
        if attn.p != ffn.p:
            self.fail(f"ffn has p{ffn.p} and attn has p{attn.p}; pipeline stages are common to both", start)
        self.expect(")")
        return attn, ffn

    def dims(self, allowed: str = "dtpce", where: str = "") -> Dims:
        sizes: dict[str, int] = {}
        while not sizes or (self.peek and self.peek not in "+|)"):
            if not self.peek or self.peek in "+|)":
                self.fail("expected dimensions, such as d1")
            start, letter = self.at, SYNONYMS.get(self.peek, self.peek)
            if letter not in DIMENSIONS:
                known = ", ".join(f"{k} {v}" for k, v in DIMENSIONS.items())
                self.fail(f"unknown dimension {self.peek!r}; known are {known} (m is t)")
            if letter not in allowed:
                self.fail(f"dimension {letter!r} is not allowed in {where}")
            if letter in sizes:
                self.fail(f"dimension {letter!r} ({DIMENSIONS[letter]}) is given twice", start)
            self.read(".")
            start, digits = self.at, self.read("[0-9]+", f"expected a number after {letter!r}")
            if len(digits) > MAX_DIGITS:
                self.fail(f"a size has at most {MAX_DIGITS} digits", start)
            sizes[letter] = int(digits)
            if not sizes[letter]:
                self.fail(f"{letter}0: a size is at least 1", start)
        return Dims(**sizes)

    @property
    def peek(self) -> str:
        """The next character; empty at the end."""
        return self.text[self.at : self.at + 1]

    def read(self, pattern: str, expected: str = "") -> str:
        """What matches the pattern here, and the blanks behind it are passed; where nothing does, empty, or it fails
        with what was `expected`."""
        match = re.compile(f"({pattern}) *").match(self.text, self.at)
        if match is not None:
            self.at = match.end()
        elif expected:
            self.fail(expected)
        return match[1] if match is not None else ""

    def expect(self, *literals: str) -> None:
        for literal in literals:
            self.read(re.escape(literal), f"expected {literal!r}; the form is (attn:d4p2t2c2|ffn:d2p2t4e2)")

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        caret = " " * (self.at if at is None else at) + "^"
        raise ConfigError(f"allocation_mode: {what}\n  {self.text}\n  {caret}")
