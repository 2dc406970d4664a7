"""One session of an agent: its turns, limits and rewards, and the one trajectory that it becomes.

Made by server.py for agents that call over HTTP, and by workflows that ask themselves; runs in the rollout client's
loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from arealite.api.cli_args import GenerationHyperparameters
from arealite.api.errors import RequestError
from arealite.api.protocols import InferenceEngine
from arealite.api.types import FinishReason, GenerationRequest, Status, Task, Trajectory
from arealite.dataset.prompts import encode
from arealite.gateway import forest
from arealite.gateway.asks import Answer, Ask
from arealite.gateway.forest import Turn, ids_through, joined, labels_of, path_of, returns_of, rows_of
from arealite.gateway.prompting import NextPrompt, Prompter
from arealite.gateway.reading import AnswerReader

OUTCOME = "outcome"
MANY_CHARACTERS = 8  # for a token
FEW_TOKENS, SMALL_TOKENS = 4, 16384  # for a message, where they make more than the latter in all
MAX_ATTEMPTS, ATTEMPT_LIFE_S = 64, 600.0  # of answers that are kept for clients that ask again

LimitName = Literal["turns", "tokens", "time", "tool_calls", "context"]
SessionState = Literal["open", "finished", "failed", "aborted"]
OnAnswer = Callable[[Answer], None]
Script = Callable[[Ask, int], list[int] | None]  # what the answer of the turn of this number is to be; None: sampled


@dataclass(frozen=True)
class SessionLimits:
    """What a session may use. `context_length`: tokens of a prompt and its answer, what the servers take if not given;
    `max_tokens`: sampled ones in all; `timeout_s`: from its start to its end."""

    context_length: int | None = None
    max_turns: int = 64
    max_tokens: int = 65536
    max_tool_calls: int = 256
    timeout_s: float = 1800.0


class LimitReached(RequestError):
    """A limit of the session was reached before an answer was begun; `reason` names it. "context": this prompt leaves
    no room for an answer; agents shorten their history then, and may go on."""

    def __init__(self, reason: LimitName, message: str) -> None:
        super().__init__(message)
        self.reason: LimitName = reason


class SessionEnded(RequestError):
    """It is finished, failed or aborted already."""


@dataclass
class _Asking:
    began: float
    asking: asyncio.Task[Turn]
    listeners: list[OnAnswer] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        return self.asking.done() and (self.asking.cancelled() or self.asking.exception() is not None)


class Session:
    """Consumes: asks of an agent. Produces: turns, then one trajectory. Waits for: the engine's answers, which have
    limits of their own. Unblocked by: answers, `finish`.

    `script` puts answers into the model's mouth (servers that allow forced decoding): for tests and recordings.
    """

    def __init__(
        self,
        id: str,
        engine: InferenceEngine,
        prompter: Prompter,
        gconfig: GenerationHyperparameters,
        limits: SessionLimits | None = None,
        script: Script | None = None,
    ) -> None:
        self.id, self.engine, self.prompter, self.gconfig = id, engine, prompter, gconfig
        self.seed = id  # of what is sampled
        self.limits = limits or SessionLimits()
        self.state: SessionState = "open"
        self.error = ""
        self.stop_reason = ""  # the name of the limit that was reached
        self.turns: dict[int, Turn] = {}
        self.rewards: dict[str, float] = {}  # of the whole session, by name
        self.num_refused = 0
        self.last_active = self.started = time.monotonic()
        self.started_at = time.time()
        self.script = script
        self._memory = prompter.memory()
        self._num_tokens = self._num_calls = 0
        self._attempts: OrderedDict[str, _Asking] = OrderedDict()
        self._running: set[asyncio.Task[Turn]] = set()
        self._changed = asyncio.Event()

    # -- turns ---------------------------------------------------------------------------------------------------

    async def ask(self, ask: Ask, on_answer: OnAnswer | None = None, attempt_key: str | None = None) -> Turn:
        """One answer. `on_answer` is told of it as it grows. With the same `attempt_key` it is the same turn: a client
        that lost its connection gets the answer that is on its way, or was given; one that got an error, a new one.

        A caller that goes away stops nothing: what was begun is sampled to its end and stays a turn, so that every
        sampled token is accounted for.

        Raises:
            LimitReached, SessionEnded: no answer any more, or not to this.
            RequestError: the request cannot be read, or the server refused it.
            ServerUnreachable: see rollout/generate.py.
        """
        self.last_active = time.monotonic()
        attempt = self._attempts.get(attempt_key) if attempt_key is not None else None
        if attempt is None or attempt.has_failed:
            attempt = self._begin(ask, on_answer)
            if attempt_key is not None:
                self._remember(attempt_key, attempt)
        elif on_answer is not None:
            attempt.listeners.append(on_answer)
        try:
            turn = await asyncio.shield(attempt.asking)
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if attempt.asking.cancelled() and this is not None and not this.cancelling():
                raise SessionEnded(f"session {self.id} was {self.state} while this was answered") from None
            raise
        if on_answer is not None:
            on_answer(turn.answer)
        return turn

    def reward(self, value: float, turn: int | None = None, name: str = OUTCOME, is_of_lineage: bool = False) -> None:
        """Give the session, one of its turns, or the lineage of that turn, such as a sub-agent, a reward; given again
        under the same name, the later one counts.

        Raises RequestError: there is no such turn."""
        if turn is not None and turn not in self.turns:
            raise RequestError(f"turn {turn}: session {self.id} has turns {sorted(self.turns)}")
        rewards = self.rewards if turn is None else self.turns[turn].rewards
        if turn is not None and is_of_lineage:
            rewards = path_of(self.turns, turn)[0].lineage_rewards
        rewards[name] = float(value)
        self._touch()

    def finish(self, state: SessionState = "finished", error: str = "") -> None:
        """No further turns. What is being sampled is given up."""
        if self.state != "open":
            return
        self.state, self.error = state, error
        for asking in self._running:
            asking.cancel()
        self._touch()

    async def wait_finished(self, limit_s: float, idle_s: float) -> None:
        """Until it is finished; aborts it when it was idle for `idle_s`, or after `limit_s`.

        Waits for: `finish`. Unblocked by: `finish`, idleness, the limit."""
        end = time.monotonic() + limit_s
        while self.state == "open":
            idle_end = time.monotonic() + 1.0 if self._running else self.last_active + idle_s
            left_s = min(end, idle_end) - time.monotonic()
            if left_s <= 0:
                late = time.monotonic() >= end
                self.finish("aborted", f"not finished within {limit_s:g} s" if late else f"idle for {idle_s:g} s")
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except TimeoutError:
                continue

    # -- what comes of it ----------------------------------------------------------------------------------------

    def trajectory(
        self,
        task: Task,
        member: int,
        outcome: float | None,
        turn_discount: float | None = None,
        status: Status = "failed",
    ) -> Trajectory:
        """The session as one attempt at `task`, all its rows end to end; of `status` where `outcome` is None.

        Its reward is `outcome` and the rewards of all turns and lineages, for each of its tokens. With a discount each
        turn has a return of its own (forest.returns_of), and the reward is that of the first turn.
        """
        turns = joined(self.turns.values())
        labels = labels_of(turns)
        rows = rows_of(turns, labels)
        if outcome is not None and rows:  # also of one that ended by being idle
            status = "ok"
        elif self.state == "aborted":
            status = "aborted"
        of_turns = {turn.id: sum(turn.rewards.values()) for turn in turns.values() if labels[turn.id] == "agent"}
        of_lineages = forest.lineage_rewards_of(turns, labels)
        returns, reward = [], None
        if status == "ok" and outcome is not None:
            reward = outcome + sum(of_turns.values()) + sum(of_lineages.values())
            if turn_discount is not None:
                returns = returns_of(rows, of_turns, outcome, turn_discount, of_lineages)
                reward = returns[rows[0].loss_mask.index(True)]
        last = max(turns.values(), key=lambda turn: turn.id, default=None)
        reason: FinishReason = "abort"
        if last is not None and last.completion is not None:
            reason = last.completion.finish_reason
        return Trajectory(
            task_id=task.id,
            member=member,
            tokens=[token for row in rows for token in row.tokens],
            loss_mask=[is_trained for row in rows for is_trained in row.loss_mask],
            logprobs=[logprob for row in rows for logprob in row.logprobs],
            versions=[version for row in rows for version in row.versions],
            row_lengths=[len(row.tokens) for row in rows] if len(rows) > 1 else [],
            returns=returns,
            reward=reward,
            reward_parts=dict(self.rewards) if status == "ok" else {},
            statistics=self._statistics(turns, labels, len(rows)),
            finish_reason=reason,
            status=status,
            error=self.error or ("" if rows else "no token was sampled") if status != "ok" else "",
            prompt_text=self._decoded(rows[0].tokens[: rows[0].loss_mask.index(True)]) if rows else "",
            completion_text=self.text(),
            generate_s=time.monotonic() - self.started,
        )

    def text(self) -> str:
        """All that was said, for people: the last turn's lineage."""
        turns = [turn for turn in self.turns.values() if turn.sampled]
        if not turns:
            return ""
        ids = ids_through(self.turns, turns[-1].id)
        return self._decoded(ids[len(path_of(self.turns, turns[-1].id)[0].added_ids) :])

    def trace(self) -> dict[str, Any]:
        """Everything that is known, ready for JSON."""
        turns = joined(self.turns.values())
        labels = labels_of(turns)
        account = forest.account_of(turns, labels, rows_of(turns, labels))
        reasons = forest.reasons_of(self.turns.values())
        return {
            "id": self.id,
            "state": self.state,
            "error": self.error,
            "stop_reason": self.stop_reason,
            "started_at": self.started_at,
            "rewards": self.rewards,
            "num_refused": self.num_refused,
            "tokens": account,
            "splits": {reason: num for reason, num in forest.splits_of(self.turns.values()).items() if num},
            "turns": [
                {
                    **turn.record(self.turns),
                    "reason": reasons.get(turn.id, ""),
                    "label": labels.get(turn.id, "failed"),
                    "joins": turns[turn.id].parent if turn.id in turns else None,
                }
                for turn in self.turns.values()
            ],
        }

    # -- inside --------------------------------------------------------------------------------------------------

    def _begin(self, ask: Ask, on_answer: OnAnswer | None) -> _Asking:
        self._check_limits()
        try:
            most = self._context_for(ask)
            prompt = self._memory.next_prompt(ask)
            input_ids = [*ids_through(self.turns, prompt.parent), *prompt.added_ids]
            room = self.gconfig.max_new_tokens if most is None else most - len(input_ids)
            if room < 1:
                raise LimitReached("context", _too_long(len(input_ids), most))
        except RequestError:
            self.num_refused += 1
            raise
        kept = ask
        if prompt.parent is not None:
            tools = self.turns[prompt.parent].ask.tools if ask.tools else []  # the same ones, once in memory
            kept = replace(ask, messages=ask.messages[prompt.num_known :], tools=tools)
        turn = Turn(len(self.turns), prompt.parent, prompt.added_ids, kept, prompt.reason, started_at=time.time())
        self.turns[turn.id] = turn
        listeners = [] if on_answer is None else [on_answer]
        request = self._request(turn, ask, input_ids, room)
        asking = asyncio.ensure_future(self._sample(turn, ask, prompt, request, listeners))
        self._running.add(asking)
        asking.add_done_callback(self._running.discard)
        asking.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may be nobody's any more
        return _Asking(time.monotonic(), asking, listeners)

    def _context_for(self, ask: Ask) -> int | None:
        """Tokens of the context. Raises LimitReached: it is far too long, as the number of its messages or its
        beginning says; to encode all of it would hold up every other session."""
        most = self.limits.context_length or self.engine.context_length
        if most is None:
            return None
        num = len(ask.prompt) if isinstance(ask.prompt, list) else FEW_TOKENS * len(ask.messages)
        if num > max(most, SMALL_TOKENS):
            raise LimitReached("context", _too_long(num, most))
        beginning = (said := ask.said())[: MANY_CHARACTERS * most]
        if len(beginning) < len(said) and (num := len(encode(self.prompter.tokenizer, beginning))) > most:
            raise LimitReached("context", f"{_too_long(num, most)}, of which this is the beginning alone")
        return most

    def _check_limits(self) -> None:
        limits = self.limits
        reached: tuple[tuple[LimitName, float, float], ...] = (
            ("turns", len(self.turns), limits.max_turns),
            ("tokens", self._num_tokens, limits.max_tokens),
            ("tool_calls", self._num_calls, limits.max_tool_calls),
            ("time", time.monotonic() - self.started, limits.timeout_s),
        )
        if self.state != "open":
            raise SessionEnded(f"session {self.id} is {self.state}" + (f": {self.error}" if self.error else ""))
        for name, used, most in reached:
            if used >= most:
                self.stop_reason = self.stop_reason or name
                self.num_refused += 1
                raise LimitReached(name, f"session {self.id} has used its limit of {name}: {used:g} of {most:g}")

    def _request(self, turn: Turn, ask: Ask, input_ids: list[int], room: int) -> GenerationRequest:
        """As the run samples, whatever the client asked for, but for the length and stop strings."""
        g, asked, eos = self.gconfig, ask.sampling, self.prompter.tokenizer.eos_token_id
        left = self.limits.max_tokens - self._num_tokens
        length = max(1, min(asked.get("max_new_tokens") or g.max_new_tokens, g.max_new_tokens, room, left))
        script = None if self.script is None else self.script(ask, turn.id)
        return GenerationRequest(
            rid=f"{self.seed}.{turn.id}",
            input_ids=input_ids,
            max_new_tokens=length if script is None else len(script),
            min_new_tokens=min(g.min_new_tokens, length) if script is None else 0,
            temperature=g.temperature,
            top_p=g.top_p,
            top_k=g.top_k,
            min_p=g.min_p,
            stop=tuple(dict.fromkeys([*g.stop, *asked.get("stop", ())])),
            stop_token_ids=tuple(dict.fromkeys([*g.stop_token_ids, *([] if eos is None else [eos])])),
            group_id=self.id,
            forced_ids=tuple(script or ()),
        )

    async def _sample(
        self, turn: Turn, ask: Ask, prompt: NextPrompt, request: GenerationRequest, listeners: list[OnAnswer]
    ) -> Turn:
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop")
        turn.executed = {name: getattr(request, name) for name in names}
        reader = AnswerReader(self.prompter.tokenizer, prompt.use, prompt.thinks, request)

        def tell(ids: list[int]) -> None:
            answer = reader.growing(ids)
            for listener in listeners:
                listener(answer)

        completion = await self.engine.agenerate(request, tell if listeners else None)  # nobody reads: no stream
        turn.completion, turn.ended_at = completion, time.time()
        turn.answer = reader.whole(completion, ask.wants_logprobs)
        self._num_tokens += len(completion.token_ids)
        self._num_calls += len(turn.answer.calls)
        if completion.token_ids:
            self._memory.note(turn, ask, prompt, reader.said)
        self._touch()
        return turn

    def _remember(self, key: str, attempt: _Asking) -> None:
        self._attempts[key] = attempt
        now = time.monotonic()
        while len(self._attempts) > MAX_ATTEMPTS or now - next(iter(self._attempts.values())).began > ATTEMPT_LIFE_S:
            self._attempts.popitem(last=False)

    def _touch(self) -> None:
        self.last_active = time.monotonic()
        self._changed.set()

    def _statistics(self, turns: dict[int, Turn], labels: dict[int, Any], num_rows: int) -> dict[str, float]:
        found = {
            "num_turns": len(turns),
            "num_rows": num_rows,
            "num_tool_calls": self._num_calls,
            "num_refused": self.num_refused,
            **{f"split_{why.replace(' ', '_')}": num for why, num in forest.splits_of(self.turns.values()).items()},
            **{f"num_{label}": sum(x == label for x in labels.values()) for label in ("auxiliary", "discarded")},
        }
        if self.stop_reason:
            found[f"stop_{self.stop_reason}"] = 1
        return {name: float(value) for name, value in found.items()}

    def _decoded(self, ids: list[int]) -> str:
        return str(self.prompter.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _too_long(num_tokens: int, most: int | None) -> str:
    """In the words by which harnesses, Claude Code for one, know that they have to shorten their history."""
    return f"prompt is too long: {num_tokens} tokens > {most}; the maximum context length is {most} tokens"
