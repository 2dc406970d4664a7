"""The dataflow of a step: its parts, where each runs, what each waits for. Pure.

Shown by check.py; a run's timeline is held against it by tests/test_run_roles.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from arealite.api.cli_args import GRPOConfig
from arealite.api.config_rules import needs_prox_logp
from arealite.launcher.allocation import AllocationMode, models_of_ranks


@dataclass(frozen=True)
class Part:
    """One of a step's parts, on the ranks that have `model` (a key of the configuration). It begins when the parts in
    `waits_for` are over, whose results it reads, and when its ranks are free."""

    name: str
    model: str
    waits_for: tuple[str, ...]
    does: str


# In the order in which ranks that have several models do them.
PARTS = (
    Part("actor_gen", "rollout", ("upload",), "answers of the step's prompts"),
    Part("rew_inf", "rewards", ("actor_gen",), "their rewards"),
    Part("actor_inf", "actor", ("rew_inf",), "logprobs before the first update"),
    Part("ref_inf", "ref", ("rew_inf",), "logprobs of the reference"),
    Part("critic_inf", "critic", ("rew_inf",), "values"),
    Part("advantages", "actor", ("rew_inf", "actor_inf", "ref_inf", "critic_inf"), "advantages and returns"),
    Part("actor_train", "actor", ("advantages",), "updates of the policy"),
    Part("critic_train", "critic", ("advantages",), "updates of the critic"),
    Part("upload", "actor", ("actor_train", "critic_train"), "new weights to the servers"),
)


def parts_of(config: GRPOConfig) -> list[Part]:
    """Those that a run has; `waits_for` has them alone."""
    absent = {part.name for part in PARTS if part.model in ("ref", "critic") and vars(config)[part.model] is None}
    absent |= set() if needs_prox_logp(config.actor) else {"actor_inf"}
    return [
        Part(p.name, p.model, tuple(name for name in p.waits_for if name not in absent), p.does)
        for p in PARTS
        if p.name not in absent
    ]


def ancestors(name: str, parts: list[Part]) -> set[str]:
    """All that must be over in a step before the part begins, at whatever remove; not what the servers wait for, an
    earlier step's upload."""
    before = next(p.waits_for for p in parts if p.name == name) if name != "actor_gen" else ()
    return set(before).union(*(ancestors(each, parts) for each in before))


def dataflow(config: GRPOConfig) -> list[tuple[str, ...]]:
    """A table with its head: part, where it runs, what it waits for, what may run at the same time, what it does."""
    parts, eta = parts_of(config), config.rollout.max_head_offpolicyness
    before = {p.name: ancestors(p.name, parts) for p in parts}
    ranks = {p.name: [i for i, models in enumerate(models_of_ranks(config)) if p.model in models] for p in parts}
    mode = AllocationMode.parse(config.allocation_mode)
    where = {"rollout": str(mode.inference), "rewards": "reward workers"}
    rows: list[tuple[str, ...]] = [("part", "on", "waits for", "beside", "what")]
    for p in parts:
        own, waits_for = ranks[p.name], ", ".join(p.waits_for)
        free = [q for q in parts if own and ranks[q.name] and not set(own) & set(ranks[q.name])]
        beside = [q.name for q in free if q.name not in before[p.name] and p.name not in before[q.name]]
        if p.name == "actor_gen":
            waits_for += f" {eta + 1} step{'s' * (eta > 0)} before"
            beside = ["earlier steps"] if eta and not mode.colocated else []
        rows.append((p.name, where.get(p.model) or _span(own), waits_for, ", ".join(beside) or "-", p.does))
    return rows


def _span(ranks: list[int]) -> str:
    return f"trainer-{ranks[0]}" + (f" to {ranks[-1]}" if ranks[1:] else "")
