"""A session that others ask over HTTP: its key and address, its calls that come twice, and the record of its turns.

Made by server.py; what it becomes is read by workflow/agents.py.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from arealite.api.cli_args import GenerationHyperparameters
from arealite.api.protocols import InferenceEngine
from arealite.gateway.asks import Ask, Message
from arealite.gateway.forest import ids_through
from arealite.gateway.prompting import Prompter
from arealite.gateway.session import OUTCOME, Session, SessionLimits, SessionState
from arealite.gateway.wires.forms import Refusal

MAX_BODIES = 64  # of calls that a retry may mean


def digest_of(key: str) -> bytes:
    """By which a key is known; it says nothing of the key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class OpenSession(Session):
    """Anthropic's clients take `base_url`, OpenAI's `base_url`/v1, both `key`, which alone says whose a call is.

    `on_end` is called once, when it ends.
    """

    def __init__(
        self,
        id: str,
        engine: InferenceEngine,
        prompter: Prompter,
        gconfig: GenerationHyperparameters,
        limits: SessionLimits,
        address: str,
        on_end: Callable[[OpenSession], None],
    ) -> None:
        super().__init__(id, engine, prompter, gconfig, limits)
        self.key = f"sk-{secrets.token_urlsafe(32)}"  # begins with no dash: it may stand in command lines
        self.base_url = f"{address}/s/{id}"
        self.conversations: dict[str, list[Message]] = {}  # by the id of a response
        self.turn_ids: dict[str, int] = {}  # by the id of a reply
        self.key_digest = digest_of(self.key)
        self._on_end = on_end
        self._attempt_of: OrderedDict[bytes, str] = OrderedDict()  # by the digest of a body

    def num_prompt_tokens(self, ask: Ask) -> int:
        """Of the prompt that it would have. Raises RequestError: it cannot be made one, or is far too long."""
        self._context_for(ask)
        prompt = self._memory.next_prompt(ask)
        return len(ids_through(self.turns, prompt.parent)) + len(prompt.added_ids)

    def attempt_key(self, headers: Mapping[str, str], path: str, raw: bytes) -> str | None:
        """The name of the attempt that a call belongs to. A retry, told by the clients' counter, is of the last call
        with this body; the first call of a counting client gets a new name, others have none."""
        body = hashlib.sha256(path.encode() + raw).digest()
        if key := headers.get("Idempotency-Key"):
            return f"key {key} {body.hex()}"  # with another body it is another call
        count = headers.get("x-stainless-retry-count")
        if count is None:
            return None
        if count == "0" or body not in self._attempt_of:
            self._attempt_of[body] = secrets.token_hex(8)
            self._attempt_of.move_to_end(body)
            if len(self._attempt_of) > MAX_BODIES:
                self._attempt_of.popitem(last=False)
        return self._attempt_of[body]

    def finish(self, state: SessionState = "finished", error: str = "") -> None:
        """As Session.finish; the key opens nothing any more."""
        was_open = self.state == "open"
        super().finish(state, error)
        if was_open:
            self._on_end(self)

    def trace(self) -> dict[str, Any]:
        return {**super().trace(), "reply_turns": self.turn_ids}


class RecordedSession:
    """One that had ended before the gateway was killed, as sessions.jsonl has it: it is still shown, and rewarded."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record
        self.id, self.started_at = record["id"], record["started_at"]
        self.turn_ids: dict[str, int] = record.get("reply_turns", {})
        self.state: SessionState = record["state"]

    def reward(self, value: float, turn: int | None = None, name: str = OUTCOME, is_of_lineage: bool = False) -> None:
        """As Session.reward. Raises Refusal: there is no such turn, or its turns were lost."""
        if "turns" not in self._record:
            raise Refusal(410, f"session {self.id} is {self.state}: {self._record['error']}", "session_ended")
        turns = self._record["turns"]
        if turn is not None and not 0 <= turn < len(turns):
            raise Refusal(400, f"turn {turn}: session {self.id} has {len(turns)} turns")
        while turn is not None and is_of_lineage and turns[turn]["parent"] is not None:
            turn = turns[turn]["parent"]
        key = "rewards" if turn is None or not is_of_lineage else "lineage_rewards"
        (self._record if turn is None else turns[turn])[key][name] = value

    def finish(self, state: SessionState = "finished", error: str = "") -> None:
        """It has ended already."""

    def trace(self) -> dict[str, Any]:
        return self._record
