"""For the rollout tests: a built-in server in its own process; a clock that jumps, and a small SGLang-protocol server
on a real socket that misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from aiohttp import web

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.types import GenerationRequest, Task, Trajectory, WeightUpdateMeta
from arealite.rollout.client import RemoteNativeEngine
from arealite.rollout.router import Limits
from support import forks


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Sleeping costs no time; a program that waits for nothing fails instead of hanging."""

    def __init__(self) -> None:
        super().__init__()
        self._virtual_now = 0.0
        real_select = self._selector.select

        def select(timeout: float | None) -> Any:
            assert timeout is not None, "the simulation stands still: everybody waits for somebody"
            self._virtual_now += timeout
            return real_select(0)

        self._selector.select = select

    def time(self) -> float:
        return self._virtual_now


def simulate(work: Coroutine[Any, Any, Any]) -> Any:
    loop = VirtualClockLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


def trajectory(task: Task, member: int = 0, versions: list[int] | None = None, **changes: Any) -> Trajectory:
    """An "ok" trajectory of one prompt token and one generated token per version."""
    versions = [0] if versions is None else versions
    num = len(versions)
    tokens, mask, logprobs = [1, *range(2, 2 + num)], [False] + [True] * num, [0.0] + [-0.5] * num
    plain = Trajectory(task.id, member, tokens, mask, logprobs, [-1, *versions], 1.0, "stop")
    return replace(plain, **changes)


def tasks_from(first: int = 0) -> Iterator[Task]:
    """An endless source of tasks."""
    while True:
        yield Task(f"e0-r{first}", prompt="x")
        first += 1


class Source:
    """A DataSource whose position can be read."""

    def __init__(self, position: int = 0, limit: int | None = None) -> None:
        self.position, self.limit = position, limit

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> Task:
        if self.position == self.limit:
            raise StopIteration
        self.position += 1
        return Task(f"e0-r{self.position - 1}", prompt="x")

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def quick_config(**changes: Any) -> InferenceEngineConfig:
    fields = {"consumer_batch_size": 4, "setup_timeout_s": 20.0, "request_timeout_s": 30.0}
    return InferenceEngineConfig(**{**fields, **changes})


class Episodes:
    """A workflow made of a function of the task (and of how often it was tried); no server."""

    def __init__(self, act: Callable[[Task, int], list[Trajectory]] | None = None) -> None:
        self.act = act or (lambda task, tries: [trajectory(task)])
        self.tries: dict[str, int] = {}

    async def arun_episode(self, engine: Any, task: Task) -> list[Trajectory]:
        self.tries[task.id] = self.tries.get(task.id, 0) + 1
        await asyncio.sleep(0)
        return self.act(task, self.tries[task.id])

    def close(self) -> None:
        pass


class MembersWorkflow:
    """`num_members` raw requests per task, no tokenizer, no reward worker. The reward is 1."""

    def __init__(self, num_members: int = 1, max_new_tokens: int = 12) -> None:
        self.num_members, self.max_new_tokens = num_members, max_new_tokens

    async def arun_episode(self, engine: Any, task: Task) -> list[Trajectory]:
        async def member(i: int) -> Trajectory:
            request = GenerationRequest(f"{task.id}.{i}", [5, 6, 7], self.max_new_tokens, group_id=task.id)
            done = await engine.agenerate(request)
            n = len(done.token_ids)
            return Trajectory(
                task.id, i, [5, 6, 7, *done.token_ids], [False] * 3 + [True] * n, [0.0] * 3 + done.logprobs,
                [-1] * 3 + done.versions, 1.0, done.finish_reason,
            )  # fmt: skip

        return list(await asyncio.gather(*map(member, range(self.num_members))))

    def close(self) -> None:
        pass


def expected_token(seed: int, position: int) -> int:
    """What the fake server samples: depends on seed and absolute position only, as the real ones promise."""
    return (seed * 31 + position * 7919) % 1000


class FakeServer:
    """Speaks the SGLang protocol on a loopback port, in a thread of its own. Public fields may be set at any time."""

    def __init__(self, token_s: float = 0.001) -> None:
        self.token_s = token_s
        self.version = 0
        self.pause_mode: str | None = None
        self.truth: dict[str, dict[int, int]] = {}  # request -> absolute position -> version that sampled it
        self.requests: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.shown: dict[str, str] = {}  # path -> the Authorization header of its last call
        self.num_drops = 0  # so many connections to close without an answer
        self.answer_with: Callable[[], web.Response] | None = None
        self.is_silent = False  # /generate never answers by itself, but hands over on abort
        self.is_deaf = False  # nothing of /generate answers
        self.is_frozen = False  # nothing of /pause_generation answers
        self.interrupt_share = 0.0  # chance per token that the request is aborted
        self.refuse_update = ""
        self.update_s = 0.0  # how long each call of an update takes
        self.refuse_pause = 0  # the status of it
        self.adapters: dict[str, str] = {}
        self.checksums: dict[str, int] = {"w": 7}
        self.health = 200
        self.is_stopped = False  # as after SIGSTOP: connections are taken, nothing is answered
        self.address = ""
        self._aborted: set[str] = set()
        self._random = random.Random(0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        self.address = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def die(self) -> None:
        """All connections break, and nobody listens at the address any more."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)

    def come_back(self, version: int = 0) -> None:
        """A new process at the old address, with the weights it was started with."""
        self.version, self.pause_mode, self.adapters = version, None, {}
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)

    async def _open(self) -> str:
        @web.middleware
        async def stopped(request: web.Request, handler: Any) -> web.StreamResponse:
            while self.is_stopped:
                await asyncio.sleep(self.token_s)
            self.calls.append(request.path)
            self.shown[request.path] = request.headers.get("Authorization", "")
            response: web.StreamResponse = await handler(request)
            return response

        app = web.Application(middlewares=[stopped])
        app.router.add_get("/health", self._health)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_post("/generate", self._generate)
        for path in ("abort_request", "pause_generation", "continue_generation"):
            app.router.add_post(f"/{path}", self._control)
        for path in ("begin_weight_update", "end_weight_update", "update_weights_from_disk", "update_weights_from_shm"):
            app.router.add_post(f"/{path}", self._update)
        for path in ("load_lora_adapter", "unload_lora_adapter"):
            app.router.add_post(f"/{path}", self._adapter)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", int(self.address.rpartition(":")[2] or 0))
        await site.start()
        return f"127.0.0.1:{self._runner.addresses[0][1]}"

    async def _close(self) -> None:
        await self._runner.cleanup()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(self.version)})

    async def _control(self, request: web.Request) -> web.Response:
        body = await request.json()
        if request.path == "/abort_request":
            self._aborted.add(body["rid"])
            return web.Response()
        while self.is_frozen:
            await asyncio.sleep(self.token_s)
        if self.refuse_pause:
            return web.Response(status=self.refuse_pause)
        self.pause_mode = body["mode"] if request.path == "/pause_generation" else None
        return web.json_response({"status": "ok"})

    async def _update(self, request: web.Request) -> web.Response:
        body = await request.json()
        await asyncio.sleep(self.update_s)
        if self.refuse_update:
            return web.json_response({"success": False, "message": self.refuse_update}, status=400)
        self.version = int(body.get("weight_version", self.version))
        return web.json_response({"success": True, "message": "", "checksums": self.checksums})

    async def _adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, path = body["lora_name"], body.get("lora_path")
        if (name in self.adapters) == (path is not None):
            return web.json_response({"success": False, "error_message": f"not so: {name}"}, status=400)
        self.adapters = {**self.adapters, name: path} if path else {k: v for k, v in self.adapters.items() if k != name}
        return web.json_response({"success": True})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        if self.num_drops > 0:
            self.num_drops -= 1
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if self.answer_with is not None:
            return self.answer_with()
        if "logprob_start_len" in body:
            entries = [[None, body["input_ids"][0], None], *([-t / 10, t, None] for t in body["input_ids"][1:])]
            return web.json_response(self._answer([], [], "length", {"input_token_logprobs": entries}))
        if not body["stream"]:
            return web.json_response(await self._sample(body))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        num_shown = 0

        async def show(answer: dict[str, Any]) -> None:
            nonlocal num_shown
            notes, first = answer["meta_info"], num_shown if body.get("stream_only_new") else 0
            num_shown = len(answer["output_ids"])
            answer["output_ids"] = answer["output_ids"][first:]
            notes["output_token_logprobs"] = notes["output_token_logprobs"][first:]
            notes["finish_reason"] = notes["finish_reason"] if answer["final"] else None
            await response.write(b"data: " + json.dumps(answer).encode() + b"\n\n")

        await show({**await self._sample(body, show), "final": True})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _sample(self, body: dict[str, Any], show: Callable[..., Any] | None = None) -> dict[str, Any]:
        rid, sampling, start = body["rid"], body["sampling_params"], len(body["input_ids"])
        truth = self.truth.setdefault(rid.split("-", 1)[1], {})
        tokens: list[int] = []
        versions: list[int] = []
        while self.pause_mode is not None:
            await asyncio.sleep(self.token_s)
        while len(tokens) < sampling["max_new_tokens"]:
            await asyncio.sleep(self.token_s)
            if self.is_stopped:
                continue
            stop = rid in self._aborted or self.pause_mode == "abort" or self._random.random() < self.interrupt_share
            if self.is_deaf or (self.is_silent and tokens and not stop):
                continue
            if stop:
                return self._answer(tokens, versions, "abort")
            if self.pause_mode is not None:
                continue
            position = start + len(tokens)
            truth[position] = self.version
            tokens.append(expected_token(sampling["sampling_seed"], position))
            versions.append(self.version)
            if show is not None:
                await show({**self._answer(tokens, versions, ""), "final": False})
        return self._answer(tokens, versions, "length")

    def _answer(self, tokens: list[int], versions: list[int], reason: str, more=None) -> dict[str, Any]:
        spans: list[dict[str, Any]] = []
        for i, version in enumerate(versions):
            if spans and spans[-1]["version"] == str(version):
                spans[-1]["end"] = i + 1
            else:
                spans.append({"version": str(version), "start": i, "end": i + 1})
        notes = {
            "finish_reason": {"type": reason},
            "weight_version": str(self.version),
            "weight_versions": spans,
            "output_token_logprobs": [[-t / 1000, t, None] for t in tokens],
        }
        return {"text": "", "output_ids": tokens, "meta_info": {**notes, **(more or {})}}


QUICK = Limits(abort_grace_s=0.3, first_backoff_s=0.01, max_backoff_s=0.05, probe_s=0.05, file_s=0.02)


class Clients(ExitStack):
    """Clients of fake servers, with short waits. At the end the servers go first."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    def __call__(self, num_servers: int, kind: Any = RemoteNativeEngine, token_s: float = 0.001, **changes: Any) -> Any:
        """(*new servers, their client)"""
        servers = [FakeServer(token_s).__enter__() for _ in range(num_servers)]
        try:
            return *servers, self.to(servers, kind, **changes)
        finally:
            for server in servers:
                self.push(server)

    def to(self, servers: list[FakeServer], kind: Any = RemoteNativeEngine, **changes: Any) -> Any:
        engine = kind(quick_config(**{**self.config, **changes}), limits=QUICK)
        self.callback(engine.destroy)
        engine.initialize(addresses=[server.address for server in servers])
        return engine


def one(engine: Any, on_tokens: Callable[[list[int]], None] | None = None, **changes: Any) -> Any:
    """One request, waited for as a workflow would."""
    fields = {"rid": "t.0", "input_ids": [1, 2, 3], "max_new_tokens": 20, "group_id": "t", **changes}
    return engine._live.run(engine.agenerate(GenerationRequest(**fields), on_tokens), "test")


def disk(version: int) -> WeightUpdateMeta:
    return WeightUpdateMeta("disk", version, "/weights", checksums={"w": 7})


def ordinals(engine: RemoteNativeEngine) -> list[int]:
    """Of the batch taken last."""
    return [g.ordinal for g in engine.last_groups]


@contextmanager
def serving(folder: str, *flags: str, context_length: int = 256) -> Iterator[str]:
    """The address of a built-in server in a process of its own, which ends with the block."""
    limits = ["--context-length", str(context_length), "--max-running-requests", "16"]
    with forks.servers(1, folder, *limits, *flags) as [(_, address)]:
        yield address
