"""Sessions of several turns with tools, under both policies of what a prompt shows of earlier turns: their rows are
what the server saw, and each sampled token is trained once or labelled.

Called by rollouts.py, with the server it has started; the logprobs of the rows are compared there.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters
from arealite.api.protocols import InferenceEngine, OnTokens
from arealite.api.types import Completion, GenerationRequest, Task, Trajectory
from arealite.gateway.asks import Ask, Message
from arealite.gateway.forest import account_of, joined, labels_of, rows_of
from arealite.gateway.prompting import History, Prompter
from arealite.gateway.session import Session
from arealite.prove.step import Finding

NUM_MEMBERS, NUM_TURNS = 2, 3
MAX_NEW_TOKENS = 12
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]


class Witness:
    """Passes requests on to an engine, and keeps what they were and became, by their number."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine
        self.seen: dict[int, list[int]] = {}  # all tokens, those of the prompt first
        self.num_sampled = 0

    @property
    def context_length(self) -> int | None:
        return self.engine.context_length

    async def agenerate(self, request: GenerationRequest, on_tokens: OnTokens | None = None) -> Completion:
        completion = await self.engine.agenerate(request, on_tokens)
        self.seen[int(request.rid.rpartition(".")[2])] = [*request.input_ids, *completion.token_ids]
        self.num_sampled += len(completion.token_ids)
        return completion


class WitnessedSessions:
    """A workflow: a conversation with tools, an answer asked for twice, and a conversation beside it. `faults` says
    what is not as it should be."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, gconfig: GenerationHyperparameters, history: History
    ) -> None:
        self.prompter = Prompter(tokenizer, history)
        self.gconfig = replace(gconfig, max_new_tokens=MAX_NEW_TOKENS, min_new_tokens=0)
        self.faults: list[str] = []
        self.num_sessions = 0

    async def arun_episode(self, engine: InferenceEngine, task: Task) -> list[Trajectory]:
        return await asyncio.gather(*(self._member(engine, task, i) for i in range(NUM_MEMBERS)))

    def close(self) -> None:
        """Nothing to end."""

    def finding(self) -> Finding:
        check, compared = f"sessions, history {self.prompter.history}", "rows of turns against what the server saw"
        if not self.num_sessions:
            return Finding(check, compared, "FAIL", reason="no session was made")
        return Finding(check, compared, "FAIL" if self.faults else "pass", reason="; ".join(self.faults[:3]))

    async def _member(self, engine: InferenceEngine, task: Task, member: int) -> Trajectory:
        witness = Witness(engine)
        session = Session(f"{task.id}.{member}", witness, self.prompter, self.gconfig)  # type: ignore[arg-type]
        messages: list[Message] = [{"role": "user", "content": f"What is the weather in place {member}?"}]
        for i in range(NUM_TURNS):
            turn = await session.ask(Ask([*messages], tools=TOOLS))
            results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in turn.answer.calls]
            messages += [turn.answer.message(), *(results or [{"role": "user", "content": f"And on day {i}?"}])]
        await asyncio.gather(*(session.ask(Ask([*messages], tools=TOOLS)) for _ in range(2)))
        await session.ask(Ask([{"role": "user", "content": "Another question."}], tools=TOOLS))
        self.faults += faults_of(session, witness)
        self.num_sessions += 1
        return session.trajectory(task, member, float(witness.num_sampled % 7))


def faults_of(session: Session, witness: Witness) -> list[str]:
    """Rows that are not what the server saw at the end of each of their turns; tokens that are trained twice, or
    neither trained nor labelled."""
    turns = joined(session.turns.values())
    labels = labels_of(turns)
    rows = rows_of(turns, labels)
    out = [
        f"session {session.id}: the row of turns {row.path} is not what the server saw at turn {turn}"
        for row in rows
        for turn in row.path
        if row.tokens[: len(witness.seen[turn])] != witness.seen[turn]
    ]
    tokens = account_of(turns, labels, rows)
    labelled = sum(tokens.values()) - tokens["sampled"]
    if not tokens["sampled"] == witness.num_sampled == labelled:
        out.append(
            f"session {session.id}: of {witness.num_sampled} sampled tokens {labelled} are accounted for: {tokens}"
        )
    return out
