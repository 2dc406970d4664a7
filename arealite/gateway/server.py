"""The gateway: agents that speak OpenAI's or Anthropic's format sample here, each with the key of its session.

Opened by workflow/agent.py in the loop that runs episodes, and by gateway_command.py for `arealite gateway`.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GatewayConfig, GenerationHyperparameters
from arealite.api.errors import ConfigError
from arealite.api.keys import ADMIN_KEY_VARIABLE, Keys
from arealite.api.protocols import InferenceEngine
from arealite.gateway.exchange import ENDED, Feed, exchange, refusal_of
from arealite.gateway.forest import Turn
from arealite.gateway.open_session import OpenSession, RecordedSession, digest_of
from arealite.gateway.prompting import Prompter
from arealite.gateway.session import OUTCOME, SessionLimits
from arealite.gateway.wires.anthropic_messages import MessagesReply, anthropic_error
from arealite.gateway.wires.forms import Refusal, Reply, clean_messages
from arealite.gateway.wires.openai_chat import ChatReply, CompletionReply, openai_error
from arealite.gateway.wires.openai_responses import ResponsesReply
from arealite.inference.http.bodies import read_json, shown

MAX_BODY_BYTES, LARGE_BYTES = 64 << 20, 1 << 20
MAX_ENDED_KEYS = 65536  # late calls with these are told that their session has ended
MAX_ENDED_SESSIONS = 256  # that can still be asked for and rewarded
STOP_LIMIT_S = 5.0

AnySession = OpenSession | RecordedSession


class Gateway:
    """Sessions over one inference engine, and the server by which agents reach them.

    Args:
        engine: its `agenerate` is awaited in the loop that `start` is called in.
        tokenizer: the policy's, with its chat template.
        config: address and limits.
        gconfig: sampling; what agents ask for is recorded beside it.
        model: the name that agents see.
        tool_call_parser: how the model writes calls.
        admin_key: opens the control calls; one is drawn if it is empty.
        life: ends the id of each session, so that a late word on one of a gateway that was killed is not taken for one
            on its successor of the same name.
        on_change: called with each session when it is opened and when it has ended.
        on_late_reward: called with a session that had ended, and its reward: value, turn, name.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        tokenizer: PreTrainedTokenizerBase,
        config: GatewayConfig,
        gconfig: GenerationHyperparameters,
        *,
        model: str = "policy",
        tool_call_parser: str = "auto",
        admin_key: str = "",
        life: str = "",
        on_change: Callable[[OpenSession], None] = lambda session: None,
        on_late_reward: Callable[[AnySession, dict[str, Any]], None] = lambda session, reward: None,
    ) -> None:
        self.config, self.gconfig, self.model = config, gconfig, model
        self.control_keys = Keys(admin=admin_key or secrets.token_hex())
        self.address = ""  # http://host:port, once it listens
        self._engine, self._life, self._started_at = engine, life, int(time.time())
        self._on_change, self._on_late_reward = on_change, on_late_reward
        self._prompter = Prompter(tokenizer, config.history, tool_call_parser)
        self._open: dict[bytes, OpenSession] = {}  # by the digest of their key, which says nothing of the key
        self._ended_keys: OrderedDict[bytes, None] = OrderedDict()
        self._by_id: dict[str, AnySession] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()  # ids of those that can still be asked for
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._runner: web.AppRunner | None = None

    # -- sessions ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen. Raises ConfigError: the address cannot be used."""
        config = self.config
        host = config.advertised_host or config.host
        if host in ("0.0.0.0", "::"):
            raise ConfigError(f"gateway.host is {host}, which agents cannot call: set gateway.advertised_host")
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._answer_errors])  # type: ignore[list-item]
        app.add_routes(self._routes())
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=STOP_LIMIT_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, config.host, config.port, backlog=1024).start()
        except OSError as error:
            await runner.cleanup()
            raise ConfigError(f"gateway: cannot listen on {config.host}:{config.port}: {error}") from error
        self._runner = runner
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}"

    async def close(self) -> None:
        """End the sessions that are open, as aborted, and stop listening."""
        for session in list(self._open.values()):
            session.finish("aborted", "the gateway was closed")
        if self._runner is not None:
            await self._runner.cleanup()

    def new_session(self, name: str = "", gconfig: GenerationHyperparameters | None = None) -> OpenSession:
        """Its id is the name, as far as an address can hold it and no other open session has it, and the gateway's
        `life`; the name seeds what is sampled. Raises Refusal: too many are open."""
        config = self.config
        if len(self._open) >= config.max_sessions:
            raise Refusal(429, f"{len(self._open)} sessions are open, the most allowed (gateway.max_sessions)")
        plain = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII) or secrets.token_hex(8)
        numbered = (plain if i == 1 else f"{plain}~{i}" for i in itertools.count(1))
        place = next(place for place in numbered if place + self._life not in self._by_id)
        limits = SessionLimits(
            config.context_length,
            config.max_turns,
            config.max_session_tokens,
            config.max_tool_calls,
            config.session_timeout_s,
        )
        sampling = gconfig or self.gconfig
        id = place + self._life
        session = OpenSession(id, self._engine, self._prompter, sampling, limits, self.address, self._end)
        session.seed = place
        self._by_id[id] = self._open[session.key_digest] = session
        self._on_change(session)
        return session

    def remember(self, sessions: Iterable[RecordedSession], key_digests: Iterable[bytes]) -> None:
        """What ended before a kill, and the keys of what did or was lost by it."""
        for session in sessions:
            self._by_id[session.id], self._ended[session.id] = session, None
        self._ended_keys.update(dict.fromkeys(key_digests))

    def _end(self, session: OpenSession) -> None:
        """It can still be asked for and rewarded until many others have ended."""
        del self._open[session.key_digest]
        self._ended_keys[session.key_digest] = None
        if len(self._ended_keys) > MAX_ENDED_KEYS:
            self._ended_keys.popitem(last=False)
        self._ended[session.id] = None
        if len(self._ended) > MAX_ENDED_SESSIONS:
            del self._by_id[self._ended.popitem(last=False)[0]]
        if watch := self._watches.pop(session.id, None):
            watch.cancel()
        self._on_change(session)

    # -- calls of agents -----------------------------------------------------------------------------------------

    def _routes(self) -> list[web.RouteDef]:
        post, get = web.post, web.get
        calls = [
            (post, "/v1/chat/completions", self._sample),
            (post, "/v1/completions", self._sample),
            (post, "/v1/responses", self._sample),
            (post, "/v1/messages", self._sample),
            (post, "/v1/messages/count_tokens", self._count_tokens),
            (get, "/v1/models", self._models),
            (get, "/v1/models/{name:.+}", self._model_card),
        ]
        return [
            get("/health", self._health),
            *(kind(prefix + path, route) for prefix in ("", "/s/{session}") for kind, path, route in calls),
            post("/sessions", self._create),
            post("/sessions/{id}/reward", self._reward),
            post("/sessions/{id}/finish", self._finish),
            get("/sessions/{id}/trace", self._trace),
            web.delete("/sessions/{id}", self._delete),
        ]

    async def _sample(self, request: web.Request) -> web.StreamResponse:
        """A call, in any format, that asks for an answer."""
        session = self._session(request)
        fields, raw = await read_json(request), await request.read()
        path = f"/v1{request.path.partition('/v1')[2]}"
        reply = await self._read(path, fields, len(raw), session)
        feed = Feed(session, reply, session.attempt_key(request.headers, path, raw))

        def note(turns: list[Turn]) -> None:
            session.turn_ids[reply.id] = turns[0].id
            if isinstance(reply, ResponsesReply) and reply.is_stored:
                session.conversations[reply.id] = [*reply.conversation, *clean_messages([turns[0].answer.message()])]

        return await exchange(request, feed, reply, note)

    async def _read(self, path: str, fields: dict[str, Any], num_bytes: int, session: OpenSession) -> Reply:
        """What is asked; of a large body in a thread, so that it holds nobody up. Raises RequestError."""
        build: Callable[[], Reply]
        if path == "/v1/responses":
            build = partial(ResponsesReply, fields, self.model, session.conversations)
        elif path == "/v1/messages":
            build = partial(MessagesReply, fields, self.model)
        else:
            build = partial(ChatReply if path == "/v1/chat/completions" else CompletionReply, fields, self.model)
        return build() if num_bytes < LARGE_BYTES else await asyncio.to_thread(build)

    async def _count_tokens(self, request: web.Request) -> web.Response:
        """No turn comes of it."""
        session = self._session(request)
        reply = await self._read("/v1/messages", await read_json(request), len(await request.read()), session)
        return web.json_response({"input_tokens": session.num_prompt_tokens(reply.ask)})

    async def _models(self, request: web.Request) -> web.Response:
        self._session(request)
        card = self._card(self.model)
        ends = {"first_id": card["id"], "last_id": card["id"], "has_more": False}
        return web.json_response({"object": "list", "data": [card], **ends})

    async def _model_card(self, request: web.Request) -> web.Response:
        """Of any name: harnesses ask for the one that they were told to use, and all are the same model."""
        self._session(request)
        return web.json_response(self._card(request.match_info["name"]))

    def _card(self, name: str) -> dict[str, Any]:
        """In both formats."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started_at))
        openai = {"id": name, "object": "model", "created": self._started_at, "owned_by": "arealite"}
        return {**openai, "type": "model", "display_name": name, "created_at": at}

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"num_open_sessions": len(self._open)})

    def _session(self, request: web.Request) -> OpenSession:
        """The session whose key a call shows. Raises Refusal."""
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        keys = [request.headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        digests = [digest_of(key) for key in keys if key]
        for digest in digests:
            if session := self._open.get(digest):
                if request.match_info.get("session", session.id) != session.id:
                    raise Refusal(403, "this key is of another session than the address")
                return session
        if any(digest in self._ended_keys for digest in digests):
            raise Refusal(410, ENDED, "session_ended")
        raise Refusal(
            401, "no open session has this key: send the session's, as Authorization: Bearer KEY or x-api-key: KEY"
        )

    # -- control -------------------------------------------------------------------------------------------------

    async def _create(self, request: web.Request) -> web.Response:
        """{name?} -> {id, key, base_url}. It ends by itself when it has asked nothing for gateway.idle_timeout_s."""
        self._check_admin(request)
        session = self.new_session(_text_of("name", await read_json(request)))
        self._watches[session.id] = asyncio.create_task(self._watch(session))
        return web.json_response({"id": session.id, "key": session.key, "base_url": session.base_url})

    async def _watch(self, session: OpenSession) -> None:
        """Waits for: the session's end, at most its limits. Unblocked by: that."""
        await session.wait_finished(self.config.session_timeout_s, self.config.idle_timeout_s)

    async def _reward(self, request: web.Request) -> web.Response:
        """{value, turn? | lineage?, name?}: of the session, of a turn, or of the lineage that a turn belongs to, by the
        turn's number or by the id of its reply."""
        session, fields = self._of_control(request), await read_json(request)
        value, name = fields.get("value"), _text_of("name", fields, OUTCOME)
        places = [key for key in ("turn", "lineage") if fields.get(key) is not None]
        if len(places) > 1:
            raise Refusal(400, "turn and lineage: give one of them, a reward is of one thing")
        turn = fields[places[0]] if places else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            raise Refusal(400, f"value: expected a finite number, found {shown(value)}")
        number = session.turn_ids.get(turn) if isinstance(turn, str) else turn
        if turn is not None and type(number) is not int:
            raise Refusal(400, f"{places[0]}: this session has no turn {shown(turn)}")
        reward: dict[str, Any] = {
            "value": float(value),
            "turn": number,
            "name": name,
            "is_of_lineage": places == ["lineage"],
        }
        session.reward(**reward)
        if session.state != "open":
            self._on_late_reward(session, reward)
        return web.json_response({})

    async def _finish(self, request: web.Request) -> web.Response:
        """{state?: finished | failed | aborted, error?}"""
        session, fields = self._of_control(request), await read_json(request)
        state = fields.get("state", "finished")
        if state not in ("finished", "failed", "aborted"):
            raise Refusal(400, f"state: expected finished, failed or aborted, found {shown(state)}")
        session.finish(state, _text_of("error", fields))
        return web.json_response({})

    async def _trace(self, request: web.Request) -> web.Response:
        return web.json_response(self._of_control(request).trace())

    async def _delete(self, request: web.Request) -> web.Response:
        session = self._of_control(request)
        session.finish("aborted", "it was deleted")
        del self._by_id[session.id], self._ended[session.id]
        return web.json_response({})

    def _check_admin(self, request: web.Request) -> None:
        if not self.control_keys.allow(request.headers.get("Authorization", ""), is_control=True):
            raise Refusal(401, f"control calls need Authorization: Bearer KEY, with the key of {ADMIN_KEY_VARIABLE}")

    def _of_control(self, request: web.Request) -> AnySession:
        self._check_admin(request)
        place = request.match_info["id"]
        if place not in self._by_id:
            raise Refusal(404, f"there is no session {shown(place)}, or it ended long ago")
        return self._by_id[place]

    @web.middleware
    async def _answer_errors(self, request: web.Request, **called: Handler) -> web.StreamResponse:
        """Whatever a route raises becomes an answer in the form of its format; the gateway keeps serving."""
        headers = {}
        try:
            return await called["handler"](request)  # the keyword by which aiohttp hands it over
        except ConnectionResetError:  # the client is gone
            return web.Response(status=499)
        except web.HTTPRequestEntityTooLarge:
            refusal = Refusal(413, f"the body has more than {MAX_BODY_BYTES >> 20} MiB")
        except web.RequestPayloadError as error:
            refusal = Refusal(400, f"the body cannot be read: {error}")
        except web.HTTPException as error:
            refusal = Refusal(error.status, f"{request.method} {request.path}: {error.reason}")
        except Exception as error:  # HTTP boundary: an error in one call must not end the gateway
            refusal = refusal_of(error)
        if refusal.status == 429:
            headers["Retry-After"] = "1"
        body = anthropic_error(refusal) if "/v1/messages" in request.path else openai_error(refusal)
        return web.json_response(body, status=refusal.status, headers=headers)


def _text_of(name: str, fields: dict[str, Any], default: str = "") -> str:
    """Raises Refusal: it is another value."""
    if not isinstance(text := fields.get(name), str | None):
        raise Refusal(400, f"{name}: expected text, found {shown(text)}")
    return default if text is None else text
