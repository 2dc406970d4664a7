"""What a session's turns make: a forest of token sequences, and its rows, each sampled token trained once or labelled.

Pure functions over `Turn`. Called by session.py when a session becomes a trajectory or is shown, and by its proofs.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from arealite.api.types import Completion
from arealite.gateway.asks import Answer, Ask

Label = Literal["agent", "auxiliary", "discarded"]
FIRST = "first"  # of a session's turns, which is no split; the others are
ANEW = "another sample"  # of the same prompt
REWRITTEN = "rewritten history"  # the template writes what was sampled otherwise
REWRITTEN_ANSWER = "rewritten answer"  # it was sent back otherwise than it was sampled
OTHER_MESSAGES = "other messages"
SPLITS = (ANEW, REWRITTEN, REWRITTEN_ANSWER, OTHER_MESSAGES, *(f"other {what}" for what in (
    "text", "tokens", "system message", "tools", "template options", "model"
)))  # fmt: skip


@dataclass
class Turn:
    """One answer and what it was sampled from. `id` counts the session's turns in the order in which they were asked;
    the prompt is the parent's tokens, its sampled ones included, and then `added_ids`. `reason`, one of SPLITS, says
    what differs from the turns before, should it begin a row or a branch (reasons_of). `ask` has those messages only
    that the parent's ask and answer had not, so that a long session does not hold its history over and over. `rewards`
    are those of this turn alone, by name."""

    id: int
    parent: int | None
    added_ids: list[int]
    ask: Ask
    reason: str
    completion: Completion | None = None  # None while it is sampled, or when that failed
    answer: Answer = field(default_factory=Answer)
    rewards: dict[str, float] = field(default_factory=dict)
    lineage_rewards: dict[str, float] = field(default_factory=dict)  # of the first turn of a lineage, for all of it
    is_auxiliary: bool = False  # named so by a hook
    executed: dict[str, object] = field(default_factory=dict)  # sampling as it was done
    started_at: float = 0.0
    ended_at: float = 0.0

    @property
    def sampled(self) -> list[int]:
        return [] if self.completion is None else self.completion.token_ids

    def record(self, turns: Mapping[int, Turn]) -> dict[str, object]:
        """All of it, by name; `ask` is without tools that its parent had, which may be longer than all that is said."""
        is_known = self.parent is not None and self.ask.tools == turns[self.parent].ask.tools
        c = self.completion
        return {
            **{name: value for name, value in vars(self).items() if name not in ("ask", "answer", "completion")},
            "ask": {name: value for name, value in vars(self.ask).items() if name != "tools" or not is_known},
            "answer": self.answer.message(),
            "finish_reason": self.answer.reason,
            "sampled_ids": self.sampled,
            "logprobs": [] if c is None else c.logprobs,
            "versions": [] if c is None else c.versions,
            "server": "" if c is None else c.server_id,
        }


def reasons_of(turns: Iterable[Turn]) -> dict[int, str]:
    """Why turns with tokens begin a row, or a branch of one: FIRST, or one of SPLITS. Those that go on, as the first to
    do so, with what their parent ended with are not there."""
    reasons: dict[int, str] = {}
    prompts: dict[int | None, list[list[int]]] = {}  # by their parent, what its turns added
    for turn in sorted(turns, key=lambda turn: turn.id):
        if turn.sampled:
            others = prompts.setdefault(turn.parent, [])
            if others or turn.parent is None:
                reasons[turn.id] = (ANEW if turn.added_ids in others else turn.reason) if others else FIRST
            others.append(turn.added_ids)
    return reasons


def splits_of(turns: Iterable[Turn]) -> dict[str, int]:
    """Turns that begin a row or a branch although others were there, by each of SPLITS."""
    found = Counter(reasons_of(turns).values())
    return {reason: found[reason] for reason in SPLITS}


@dataclass(frozen=True)
class SessionRow:
    """One path from a root to a leaf: per-token columns of one length, and the turn that each loss token is of."""

    tokens: list[int]
    loss_mask: list[bool]
    logprobs: list[float]
    versions: list[int]
    turn_of: list[int]  # -1 outside the loss
    path: tuple[int, ...]  # ids of its turns


def path_of(turns: dict[int, Turn], last: int | None) -> list[Turn]:
    """The turns from the root to `last`."""
    path = []
    while last is not None:
        path.append(turns[last])
        last = turns[last].parent
    return path[::-1]


def ids_through(turns: dict[int, Turn], last: int | None) -> list[int]:
    """All tokens up to the end of turn `last`'s answer."""
    return [token for turn in path_of(turns, last) for token in (*turn.added_ids, *turn.sampled)]


class Prefixes:
    """Sequences by their length and digest, with the turn that ends there: finds the longest one that another sequence
    begins with. `begin` and `state` speak of what was read of that one before."""

    def __init__(self) -> None:
        self._ids: dict[tuple[int, bytes], int] = {}
        self._ends: list[int] = []

    def add(self, content: bytes, id: int, begin: int = 0, state: hashlib.blake2b | None = None) -> hashlib.blake2b:
        """Returns the state at its end. Of equal sequences the latest counts."""
        state = _hash() if state is None else state.copy()
        state.update(content)
        end = begin + len(content)
        if (end, state.digest()) not in self._ids:
            insort(self._ends, end)
        self._ids[end, state.digest()] = id
        return state

    def longest(self, content: bytes, begin: int = 0, state: hashlib.blake2b | None = None) -> tuple[int, int | None]:
        """Bytes of `content` that belong to the longest sequence ending in it, and its turn; (0, None) without one."""
        state = _hash() if state is None else state.copy()
        best: tuple[int, int | None] = (0, None)
        num_read = 0
        for end in self._ends[bisect_right(self._ends, begin) : bisect_right(self._ends, begin + len(content))]:
            state.update(content[num_read : end - begin])
            num_read = end - begin
            if (end, state.digest()) in self._ids:
                best = num_read, self._ids[end, state.digest()]
        return best


def as_bytes(ids: list[int]) -> bytes:
    """Eight for each token."""
    return np.asarray(ids, np.int64).tobytes()


def _hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def joined(turns: Iterable[Turn]) -> dict[int, Turn]:
    """The finished turns by id, each following the turn whose tokens are the longest that its prompt begins with,
    whichever was asked first or ended first. Only equal tokens join turns. Linear in the added and sampled tokens: what
    lies before a known parent is not read again."""
    found = {turn.id: turn for turn in sorted(turns, key=lambda turn: turn.id) if turn.sampled}
    states: dict[int | None, tuple[int, hashlib.blake2b]] = {None: (0, _hash())}  # at each turn's end
    ends = Prefixes()
    for turn in found.values():
        begin, state = states[turn.parent]
        own = as_bytes([*turn.added_ids, *turn.sampled])
        states[turn.id] = begin + len(own), ends.add(own, turn.id, begin, state)
    out = {}
    for turn in found.values():
        num_shared, parent = ends.longest(as_bytes(turn.added_ids), *states[turn.parent])
        out[turn.id] = turn
        if parent is not None:
            out[turn.id] = replace(turn, parent=parent, added_ids=turn.added_ids[num_shared // 8 :])
    return out


def labels_of(turns: dict[int, Turn]) -> dict[int, Label]:
    """Which turns are trained ("agent"), and why others are not.

    auxiliary: its lineage offers no tools while another does (titles, topic checks), or it was named so. discarded: a
    leaf beside another answer to the same request, of which one was gone on with, or else the last one counts.
    """
    has_child = {turn.parent for turn in turns.values()}
    root_of = {turn.id: path_of(turns, turn.id)[0].id for turn in turns.values()}
    has_tools = {root_of[turn.id] for turn in turns.values() if turn.ask.tools}
    siblings: dict[tuple[int | None, tuple[int, ...]], list[Turn]] = {}
    for turn in turns.values():
        siblings.setdefault((turn.parent, tuple(turn.added_ids)), []).append(turn)
    labels: dict[int, Label] = {}
    for same in siblings.values():
        going_on = [turn.id for turn in same if turn.id in has_child]
        kept = set(going_on or [max(turn.id for turn in same)])
        for turn in same:
            is_aside = turn.is_auxiliary or (bool(has_tools) and root_of[turn.id] not in has_tools)
            labels[turn.id] = "auxiliary" if is_aside else "agent" if turn.id in kept else "discarded"
    return labels


def rows_of(turns: dict[int, Turn], labels: dict[int, Label] | None = None) -> list[SessionRow]:
    """One row per path to a leaf that is trained, in the order of time, that of the first turns in their losses. A turn
    that several pass through is in the loss of the one whose tokens come first in their order, whatever was asked
    first, and context in the others."""
    labels = labels_of(turns) if labels is None else labels
    has_child = {turn.parent for turn in turns.values() if labels[turn.id] == "agent"}
    leaves = [turn for turn in turns.values() if labels[turn.id] == "agent" and turn.id not in has_child]
    paths = sorted((path_of(turns, leaf.id) for leaf in leaves), key=lambda path: _tokens_of(path))
    trained: set[int] = set()
    rows = []
    for path in paths:
        row = SessionRow([], [], [], [], [], tuple(turn.id for turn in path))
        for turn in path:
            is_trained = labels[turn.id] == "agent" and turn.id not in trained
            _add(row, turn, is_trained)
            trained |= {turn.id} if is_trained else set()
        rows.append(row)
    return sorted(rows, key=lambda row: min(set(row.turn_of) - {-1}))


def _tokens_of(path: Sequence[Turn]) -> list[int]:
    return [token for turn in path for token in (*turn.added_ids, *turn.sampled)]


def _add(row: SessionRow, turn: Turn, is_trained: bool) -> None:
    assert turn.completion is not None
    num_added, num_sampled = len(turn.added_ids), len(turn.sampled)
    row.tokens.extend([*turn.added_ids, *turn.sampled])
    row.loss_mask.extend([False] * num_added + [is_trained] * num_sampled)
    row.logprobs.extend([0.0] * num_added + (turn.completion.logprobs if is_trained else [0.0] * num_sampled))
    row.versions.extend([-1] * num_added + (turn.completion.versions if is_trained else [-1] * num_sampled))
    row.turn_of.extend([-1] * num_added + [turn.id if is_trained else -1] * num_sampled)


def lineage_rewards_of(turns: dict[int, Turn], labels: dict[int, Label]) -> dict[int, float]:
    """Sums, by the first turn of lineages that are trained. One that goes on with another's tokens is part of it."""
    root_of = {turn.id: path_of(turns, turn.id)[0].id for turn in turns.values() if turn.lineage_rewards}
    trained = {path_of(turns, id)[0].id for id, label in labels.items() if label == "agent"} if root_of else set()
    sums: dict[int, float] = dict.fromkeys(trained, 0.0)
    for id, root in root_of.items():
        if root in trained:
            sums[root] += sum(turns[id].lineage_rewards.values())
    return sums


def returns_of(
    rows: list[SessionRow],
    rewards: dict[int, float],
    outcome: float,
    turn_discount: float,
    of_lineages: Mapping[int, float] | None = None,
) -> list[float]:
    """The return of every token of the rows, end to end, float [T]; 0 outside the loss.

    G of a turn = its reward + turn_discount * G of the next turn of the row that trains it; `outcome`, and the reward
    of its lineage by the first turn's id, come with the row's last turn. So time goes along the path that was taken,
    not by the order of arrival, and what other lineages do is nobody's merit here.
    """
    out: list[float] = []
    for row in rows:
        following, of_turn, at_end = 0.0, {}, outcome + (of_lineages or {}).get(row.path[0], 0.0)
        for i, turn in enumerate(reversed(row.path)):
            following = rewards.get(turn, 0.0) + (at_end if i == 0 else turn_discount * following)
            of_turn[turn] = following
        out += [of_turn.get(turn, 0.0) for turn in row.turn_of]
    return out


def account_of(turns: dict[int, Turn], labels: dict[int, Label], rows: list[SessionRow]) -> dict[str, int]:
    """Sampled tokens: all of them ("sampled"), those in a loss ("trained"), and the others by label."""
    account: Counter[str] = Counter({"sampled": 0, "trained": 0})
    for turn in turns.values():
        account["sampled"] += len(turn.sampled)
        if labels[turn.id] != "agent":
            account[labels[turn.id]] += len(turn.sampled)
    account["trained"] += sum(sum(row.loss_mask) for row in rows)
    return dict(account)
