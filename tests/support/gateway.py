"""A gateway for tests: over an engine that writes given texts, token by token, in a loop of its own."""

import asyncio
import json
import threading
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from urllib.error import HTTPError

from arealite.api.cli_args import GatewayConfig, GenerationHyperparameters
from arealite.api.protocols import OnTokens
from arealite.api.types import Completion, GenerationRequest
from arealite.gateway.server import Gateway

WAIT_S = 60
ADMIN = "the-admin"


class ScriptedEngine:
    """Answers with `write(request)`, a text; ends with the tokenizer's end token, or is cut at max_new_tokens."""

    context_length = None

    def __init__(self, tokenizer, write: Callable[[GenerationRequest], str] = lambda request: "Hello there") -> None:
        self.tokenizer, self.write = tokenizer, write
        self.requests: list[GenerationRequest] = []
        self.held: dict[str, asyncio.Event] = {}  # by a text: it stops in the middle until the event is set

    async def agenerate(self, request: GenerationRequest, on_tokens: OnTokens | None = None) -> Completion:
        self.requests.append(request)
        text = self.write(request)
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        reason = "stop" if len(ids) <= request.max_new_tokens else "length"
        ids = ids[: request.max_new_tokens]
        for n in range(1, len(ids) + 1):
            if text in self.held and n == len(ids) // 2:
                await asyncio.wait_for(self.held[text].wait(), WAIT_S)
            if on_tokens is not None:
                on_tokens(ids[:n])
            await asyncio.sleep(0)
        matched = self.tokenizer.eos_token_id if reason == "stop" else None
        return Completion(ids, [-1.0] * len(ids), [0] * len(ids), reason, matched, text, "scripted")


class GatewayThread:
    """`gateway` listens in the loop of a thread; `run` awaits there."""

    def __init__(self, engine, tokenizer, config: GatewayConfig, **gconfig) -> None:
        self.engine = engine
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        sampling = GenerationHyperparameters(**gconfig)
        self.changes: list[tuple[str, str]] = []
        self.gateway = Gateway(
            engine,
            tokenizer,
            config,
            sampling,
            admin_key=ADMIN,
            on_change=lambda session: self.changes.append((session.id, session.state)),
        )
        self.run(self.gateway.start())

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def call(self, function, *args):
        async def work():
            return function(*args)

        return self.run(work())

    def new_session(self, name=""):
        return self.call(self.gateway.new_session, name)

    def close(self) -> None:
        self.run(self.gateway.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


@contextmanager
def scripted(tokenizer, write, config=None, **gconfig):
    running = GatewayThread(ScriptedEngine(tokenizer, write), tokenizer, config or GatewayConfig(), **gconfig)
    try:
        yield running
    finally:
        running.close()


def call(url, body=None, key="", method=None, headers=None):
    """Status and body of a plain call."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return answer.status, json.loads(answer.read() or b"{}")
    except HTTPError as error:
        return error.code, json.loads(error.read())
