"""AgentWorkflow: real clients call a real gateway; what becomes of their sessions, of hostile ones too."""

import asyncio
import json
import sys
import urllib.error
import urllib.request

import pytest
from aiohttp import web
from openai import APIStatusError, AsyncOpenAI
from support.rewards import by_trace
from transformers import AutoTokenizer

from arealite.api.cli_args import GatewayConfig, GenerationHyperparameters, InferenceEngineConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Completion, Task
from arealite.workflow.agents import AgentWorkflow
from arealite.workflow.runners import AgentCommand, AgentCoroutine, AgentService

TASK = Task("e0-r7", messages=[{"role": "user", "content": "add 2 and 3"}], answer="5", extras={"level": 1})


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


class Engine:
    """Samples the words given, one after the other, in each session."""

    context_length = None

    def __init__(self, tokenizer, words):
        self.tokenizer, self.words, self.prompts, self.rids = tokenizer, words, [], []

    async def agenerate(self, request, on_tokens=None):
        self.prompts.append(request.input_ids)
        self.rids.append(request.rid)
        await asyncio.sleep(0)
        turn = sum(1 for prompt in self.prompts if prompt[: len(request.input_ids)] == request.input_ids) - 1
        said = self.tokenizer.decode(request.input_ids).count("<|im_start|>assistant") - 1
        ids = [*self.tokenizer.encode(self.words[min(said, len(self.words) - 1)]), self.tokenizer.eos_token_id]
        assert turn >= 0
        return Completion(ids, [-0.5] * len(ids), [3] * len(ids), "stop", matched=ids[-1], server_id="server-0")


def run(tokenizer, runner, words=("five", "5"), n_samples=1, limits=None, task=TASK, meanwhile=None, **options):
    """The trajectories of one episode, and the engine; `meanwhile(gateway)` runs beside it."""
    gconfig = GenerationHyperparameters(n_samples=n_samples, max_new_tokens=32)
    config = InferenceEngineConfig(reward_timeout_s=20.0)
    gateway = GatewayConfig(**{"session_timeout_s": 20.0, **(limits or {})})
    workflow = AgentWorkflow(runner, gconfig, tokenizer, gateway=gateway, config=config, **options)
    engine = Engine(tokenizer, words)

    async def episode():
        try:
            running = asyncio.create_task(workflow.arun_episode(engine, task))
            if meanwhile is not None:
                await meanwhile(workflow)
            return await running
        finally:
            await asyncio.to_thread(workflow.close)

    return asyncio.run(episode()), engine


async def two_turns(task, base_url, api_key):
    """Asks, asks again, and is worth what it got."""
    messages = list(task.messages)
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        for again in ("Sure?", None):
            reply = await client.chat.completions.create(model="any", messages=messages)
            messages.append(reply.choices[0].message)
            messages += [{"role": "user", "content": again}] if again else []
    return {"reward": float(messages[-1].content == task.answer), "num_messages": len(messages)}


def test_a_session_is_one_trajectory_of_the_tokens_that_were_sampled(tokenizer):
    trajectories, engine = run(tokenizer, AgentCoroutine(two_turns), n_samples=3)
    assert [t.member for t in trajectories] == [0, 1, 2]
    for t in trajectories:
        assert (t.status, t.reward, t.reward_parts, t.task_id) == ("ok", 1.0, {"num_messages": 4.0}, "e0-r7")
        sampled = [token for token, is_own in zip(t.tokens, t.loss_mask, strict=True) if is_own]
        assert tokenizer.decode(sampled) == "five<|im_end|>5<|im_end|>"
        assert t.tokens[: -len(tokenizer.encode("5")) - 1] in engine.prompts and not t.row_lengths
        assert {v for v, is_own in zip(t.versions, t.loss_mask, strict=True) if is_own} == {3}
        assert t.statistics["num_turns"] == 2 and t.generate_s > 0


async def nothing(task, base_url, api_key):
    return 1.0


async def crash(task, base_url, api_key):
    await two_turns(task, base_url, api_key)
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(("agent", "told"), [(nothing, "without an answer"), (crash, "RuntimeError: out of luck")])
def test_an_agent_that_fails_is_no_zero(tokenizer, agent, told):
    (t,), _ = run(tokenizer, AgentCoroutine(agent))
    assert (t.status, t.reward) == ("failed", None) and told in t.error


CURL = """
import json, os, urllib.request
body = json.dumps({"model": "any", "messages": [{"role": "user", "content": "add 2 and 3"}]}).encode()
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
open("answer.json", "wb").write(urllib.request.urlopen(request, timeout=20).read())
"""


@pytest.mark.parametrize("is_locked_up", [False, True])
def test_a_verifier_sees_the_trace_and_the_folder(tokenizer, is_locked_up):
    runner = AgentCommand([sys.executable, "-I", "-c", CURL], is_locked_up=is_locked_up)
    (t,), _ = run(tokenizer, runner, words=["5"], reward_fn=by_trace)
    assert (t.status, t.reward, t.reward_parts) == ("ok", 1.0, {"level": 1.0}), t.error
    (t,), _ = run(tokenizer, AgentCommand([sys.executable, "-I", "-c", CURL.replace("answer", "other")]),
                  reward_fn=by_trace)  # fmt: skip
    assert t.status == "reward_error" and "answer.json" in t.error
    with pytest.raises(ConfigError, match="level"):
        run(tokenizer, runner, reward_fn=by_trace, task=Task("t", prompt="x", extras={"depth": 1}))


def control(workflow, path, body):
    """A control call, as somebody elsewhere makes it."""
    gateway = workflow._gateway.result()
    headers = {"Authorization": f"Bearer {gateway.control_keys.admin}", "Content-Type": "application/json"}
    request = urllib.request.Request(gateway.address + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


class Accepts:
    """A service that takes each job, asks in the background, and leaves the reward to somebody else."""

    def __init__(self, then):
        self.then = then

    async def __call__(self, workflow):
        job = asyncio.Future()

        async def take(request):
            job.set_result(await request.json())
            return web.Response(status=202)

        app = web.Application()
        app.router.add_post("/", take)
        self.site = web.AppRunner(app, shutdown_timeout=0.1)
        await self.site.setup()
        await web.TCPSite(self.site, "127.0.0.1", 0).start()
        workflow.runner.url = f"http://127.0.0.1:{self.site.addresses[0][1]}"
        given = await job
        await two_turns(Task(**given["task"]), f"{given['base_url']}/v1", given["api_key"])
        for path, body in self.then:
            await asyncio.to_thread(control, workflow, f"/sessions/{given['session_id']}/{path}", body)
        await self.site.cleanup()


@pytest.mark.parametrize(("then", "told"), [
    ([("reward", {"value": 0.5}), ("reward", {"value": 2, "name": "style"}), ("finish", {})], 0.5),
    ([("reward", {"value": 0.5})], 0.5),  # it ends by being idle
    ([("finish", {"state": "failed", "error": "bad luck"})], "bad luck"), ([("finish", {})], "no reward came"),
    ([], "no reward came"),
])  # fmt: skip
def test_a_reward_that_comes_later(tokenizer, then, told):
    (t,), _ = run(tokenizer, AgentService("later"), meanwhile=Accepts(then), limits={"idle_timeout_s": 0.5})
    if isinstance(told, float):
        parts = {body.get("name", "outcome"): body["value"] for path, body in then if path == "reward"}
        assert (t.status, t.reward, t.reward_parts) == ("ok", told, parts)
    else:
        assert t.status == ("failed" if told == "bad luck" else "reward_error") and told in t.error


def test_a_late_reward_is_not_given_to_the_same_task_of_the_next_start(tokenizer, monkeypatch):
    """Which samples the same, in a session of another id; with the key that somebody elsewhere knows."""
    monkeypatch.setenv("AREALITE_ADMIN_API_KEY", "known-elsewhere")
    seen, headers = [], {"Authorization": "Bearer known-elsewhere"}

    async def agent(task, base_url, api_key):
        seen.append(base_url.split("/")[-2])
        if len(seen) > 1:
            request = urllib.request.Request(
                base_url.partition("/s/")[0] + f"/sessions/{seen[0]}/reward", b'{"value": 9}', headers
            )
            with pytest.raises(urllib.error.HTTPError, match="404"):
                await asyncio.to_thread(urllib.request.urlopen, request, timeout=20)
        return await two_turns(task, base_url, api_key)

    engines = [run(tokenizer, AgentCoroutine(agent))[1] for _ in range(2)]
    assert seen[0] != seen[1] and all(name.startswith("e0-r7.0-") for name in seen)
    assert engines[0].rids == engines[1].rids == ["e0-r7.0.0", "e0-r7.0.1"]


async def hostile(task, base_url, api_key):
    """Asks for ever, sends nonsense and huge things, tries other keys. Returns how it was answered."""
    seen, messages = [], list(task.messages)

    def post(body, key, path="/chat/completions"):
        request = urllib.request.Request(base_url + path, body, {"Authorization": f"Bearer {key}"})
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as error:
            assert json.loads(error.read())["error"]["message"]
            return error.code

    good = json.dumps({"model": "m", "messages": messages}).encode()
    for body, key, path in (
        (good, "sk-forged", "/chat/completions"), (good[:-5], api_key, "/chat/completions"),
        (b"[" * 100_000, api_key, "/chat/completions"), (b"\xff\xfe", api_key, "/chat/completions"),
        (b"{}", api_key, "/chat/completions"), (good, api_key, "/../../sessions"), (good, api_key, "/reward"),
    ):  # fmt: skip
        seen.append(await asyncio.to_thread(post, body, key, path))
    call = {"id": "c", "type": "function", "function": {"name": "read", "arguments": "{}"}}
    large = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "c", "content": "x" * 10_000_000}]  # fmt: skip
    seen.append(await asyncio.to_thread(post, json.dumps({"model": "m", "messages": large}).encode(), api_key))
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        try:
            while True:
                reply = await client.chat.completions.create(model="any", messages=messages)
                messages += [reply.choices[0].message, {"role": "user", "content": "more"}]
        except APIStatusError as error:
            seen.append(error.status_code)
    assert len(messages) > 2
    return {"reward": 0.0, **{f"answer_{i}": code for i, code in enumerate(seen)}}


def test_hostile_agents_meet_limits_and_others_are_not_affected(tokenizer):
    agents = iter([hostile, two_turns, two_turns])

    async def agent(task, base_url, api_key):
        return await next(agents)(task, base_url, api_key)

    (bad, *good), _ = run(
        tokenizer, AgentCoroutine(agent), n_samples=3, limits={"max_turns": 6, "context_length": 4096}
    )
    assert [t.reward for t in good] == [1.0, 1.0]
    codes = list(bad.reward_parts.values())
    assert codes[0] == 401 and codes[1:5] == [400] * 4 and all(400 <= code < 500 for code in codes[:7]), codes
    assert bad.status == "ok" and bad.statistics["num_turns"] <= 6 and codes[-1] == 400
