"""One attempt of an agent: its turns in the order in which they were asked, and the trajectory that they are.

Made by workflows (and by the gateway for clients); each turn goes on from the tokens of an earlier one where it can.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from arealite.api.cli_args import GenerationHyperparameters
from arealite.api.errors import ArealiteError, RequestError
from arealite.api.protocols import InferenceEngine
from arealite.api.types import Completion, GenerationRequest, Status, Task, Trajectory
from arealite.gateway.asks import Answer, Ask
from arealite.gateway.prompting import Prompter

LimitName = Literal["turns", "tokens", "time", "tool_calls", "context"]


@dataclass(frozen=True)
class SessionLimits:
    """Of one session: all of them always hold. `max_tokens` counts sampled tokens; `context_length` those of a prompt
    and its answer together."""

    max_turns: int = 32
    max_tokens: int = 32_768
    max_tool_calls: int = 64
    max_s: float = 1800.0
    context_length: int | None = None


class LimitReached(ArealiteError):
    """A session may ask no more; `reason` names the limit."""

    def __init__(self, reason: LimitName, found: str) -> None:
        super().__init__(f"the session has reached its limit of {reason}: {found}")
        self.reason: LimitName = reason


@dataclass(frozen=True)
class Turn:
    """One answer that was sampled. `id` counts from 0; `tokens` are all of its prompt and answer, `added_ids` what came
    after the tokens of the turn `parent`."""

    id: int
    parent: int | None
    ask: Ask
    answer: Answer
    completion: Completion
    added_ids: list[int]
    tokens: list[int]
    split_reason: str
    begun: float
    ended: float


@dataclass
class Session:
    """Turns that extend each other's tokens.

    Args:
        id: unique among the sessions of an engine; its requests go to one server, whose cache has their prefix.
        gconfig: how it is sampled, whatever a client asks for.
    """

    id: str
    engine: InferenceEngine
    prompter: Prompter
    gconfig: GenerationHyperparameters
    limits: SessionLimits = field(default_factory=SessionLimits)

    def __post_init__(self) -> None:
        self.turns: list[Turn] = []
        self.rewards: dict[int, float] = {}  # by turn
        self.status: Status = "ok"
        self.error = ""
        self._begun = time.monotonic()

    async def ask(self, ask: Ask) -> Turn:
        """Sample the next turn.

        Raises:
            LimitReached: there is no room for it, and nothing was sampled.
            RequestError: the request cannot be made a prompt, or the server refused it.
        """
        self._check_limits()
        prompt = self.prompter.next_prompt(ask, self.turns)
        before = [] if prompt.parent is None else self.turns[prompt.parent].tokens
        input_ids = [*before, *prompt.added_ids]
        room = self._room(input_ids)
        g, begun = self.gconfig, time.monotonic()
        eos = self.prompter.tokenizer.eos_token_id
        completion = await self.engine.agenerate(
            GenerationRequest(
                rid=f"{self.id}.{len(self.turns)}",
                input_ids=input_ids,
                max_new_tokens=min(room, g.max_new_tokens, ask.sampling.get("max_new_tokens", g.max_new_tokens)),
                min_new_tokens=g.min_new_tokens,
                temperature=g.temperature,
                top_p=g.top_p,
                top_k=g.top_k,
                min_p=g.min_p,
                stop=tuple(dict.fromkeys([*g.stop, *ask.sampling.get("stop", [])])),
                stop_token_ids=tuple(dict.fromkeys([*g.stop_token_ids, *([] if eos is None else [eos])])),
                group_id=self.id,
            )
        )
        if not completion.token_ids:
            raise RequestError(f"{completion.server_id} sampled no token")
        answer = self.prompter.read(ask, completion, len(self.turns))
        turn = Turn(
            len(self.turns), prompt.parent, ask, answer, completion, prompt.added_ids,
            [*input_ids, *completion.token_ids], prompt.split_reason, begun, time.monotonic(),
        )  # fmt: skip
        self.turns.append(turn)
        return turn

    def reward(self, value: float, turn: int | None = None) -> None:
        """Add to the reward of a turn, of the last one if none is named."""
        number = len(self.turns) - 1 if turn is None else turn
        self.rewards[number] = self.rewards.get(number, 0.0) + value

    def finish(self, status: Status = "ok", error: str = "") -> None:
        self.status, self.error = status, error

    def trajectory(self, task: Task, member: int, turn_discount: float | None = None) -> Trajectory:
        """The session as one sample: a row for each turn that no other goes on from, and each sampled token in the loss
        of one row.

        Its reward is the sum of its turns' rewards. With a discount d each turn has a return of its own: its reward and
        d times the returns of the turns that go on from it; then the reward is that of the turns without a parent.
        """
        followed = {turn.parent for turn in self.turns}
        returns = self._returns(1.0 if turn_discount is None else turn_discount)
        columns: dict[str, Any] = {name: [] for name in ("tokens", "loss_mask", "logprobs", "versions", "returns")}
        lengths, trained = [], set()
        for leaf in (turn for turn in self.turns if turn.id not in followed):
            path = [leaf]
            while path[0].parent is not None:
                path.insert(0, self.turns[path[0].parent])
            for turn in path:
                added, sampled, is_new = len(turn.added_ids), turn.completion, turn.id not in trained
                n = len(sampled.token_ids)
                columns["tokens"] += turn.added_ids + sampled.token_ids
                columns["loss_mask"] += [False] * added + [is_new] * n
                columns["logprobs"] += [0.0] * added + (sampled.logprobs if is_new else [0.0] * n)
                columns["versions"] += [-1] * added + (sampled.versions if is_new else [-1] * n)
                columns["returns"] += [0.0] * added + [returns[turn.id] if is_new else 0.0] * n
                trained.add(turn.id)
            lengths.append(len(leaf.tokens))
        if turn_discount is None:
            columns["returns"] = []
        reward = sum((returns[turn.id] for turn in self.turns if turn.parent is None), 0.0)
        last = self.turns[-1] if self.turns else None
        return Trajectory(
            task_id=task.id,
            member=member,
            reward=reward if self.status == "ok" else None,
            finish_reason="abort" if last is None else last.completion.finish_reason,
            status=self.status,
            error=self.error,
            generate_s=sum(turn.ended - turn.begun for turn in self.turns),
            row_lengths=lengths,
            **columns,
        )

    def _returns(self, discount: float) -> list[float]:
        returns = [self.rewards.get(turn.id, 0.0) for turn in self.turns]
        for turn in reversed(self.turns):
            if turn.parent is not None:
                returns[turn.parent] += discount * returns[turn.id]
        return returns

    def _check_limits(self) -> None:
        limits, turns = self.limits, self.turns
        num_tokens = sum(len(turn.completion.token_ids) for turn in turns)
        num_calls = sum(len(turn.answer.calls) for turn in turns)
        age_s = time.monotonic() - self._begun
        reached: list[tuple[LimitName, float, float]] = [
            ("turns", len(turns), limits.max_turns),
            ("tokens", num_tokens, limits.max_tokens),
            ("tool_calls", num_calls, limits.max_tool_calls),
            ("time", age_s, limits.max_s),
        ]
        for name, found, most in reached:
            if found >= most:
                raise LimitReached(name, f"{found:g} of {most:g}")

    def _room(self, input_ids: list[int]) -> int:
        """Tokens that an answer may have."""
        used = sum(len(turn.completion.token_ids) for turn in self.turns)
        room = self.limits.max_tokens - used
        if self.limits.context_length is not None:
            room = min(room, self.limits.context_length - len(input_ids))
        if room < 1:
            raise LimitReached("context", f"the prompt has {len(input_ids)} of {self.limits.context_length} tokens")
        return room
