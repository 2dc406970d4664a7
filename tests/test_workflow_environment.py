"""EnvironmentWorkflow: turns, rewards over turns, limits, and environments that fail, hang or say nonsense."""

import asyncio
import time
from typing import ClassVar

import pytest
from support.episodes import ScriptedEngine, episode, sampling
from support.rollout import quick_config
from transformers import AutoTokenizer

from arealite.api.errors import ConfigError, RequestError, ServerUnreachable
from arealite.api.types import Task
from arealite.gateway.session import SessionLimits
from arealite.rollout.client import RemoteNativeEngine
from arealite.workflow.environment import Environment, EnvironmentWorkflow, Observation


class Echo(Environment):
    """Does what the answer says, and counts."""

    closed: ClassVar[list[int]] = []

    def reset(self, task):
        self.num_steps = 0
        return f"Begin {task.answer}."

    def step(self, answer):
        self.num_steps += 1
        word, _, number = answer.text.partition(" ")
        if word == "raise":
            raise KeyError("no such move")
        if word == "refuse":
            raise ConfigError("the environment cannot be used")
        if word == "hang":
            time.sleep(float(number))
        if word == "nonsense":
            return 3
        end = {"win": "done", "late": "truncated"}.get(word)
        return Observation(f"Step {self.num_steps}.", float(number or 0), end, statistics={"num_seen": 1.0})

    def close(self):
        self.closed.append(self.num_steps)


class AsyncEcho(Echo):
    async def reset(self, task):
        Echo.reset(self, task)
        return [{"role": "system", "content": "Be short."}, {"role": "user", "content": task.answer}]

    async def step(self, answer):
        await asyncio.sleep(0)
        return Echo.step(self, answer)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def play(tokenizer, *members, environment=Echo, max_new_tokens=64, **options):
    workflow = EnvironmentWorkflow(
        environment, sampling(len(members), max_new_tokens=max_new_tokens), tokenizer, **options
    )
    engine = ScriptedEngine(tokenizer, *members)
    return episode(workflow, engine, answer="now"), engine


def test_a_session_is_one_trajectory_whose_sampled_tokens_are_those_that_were_sampled(tokenizer):
    Echo.closed.clear()
    found, engine = play(tokenizer, ["a 1", "b", "win 2"], ["late"])
    assert [(t.member, t.status, t.reward) for t in found] == [(0, "ok", 3.0), (1, "ok", 0.0)]
    for t in found:
        sampled = [token for token, is_own in zip(t.tokens, t.loss_mask, strict=True) if is_own]
        assert sampled == engine.sampled[t.member]
        assert {v for v, is_own in zip(t.versions, t.loss_mask, strict=True) if is_own} == {7}
    assert found[0].statistics["num_turns"] == 3 and found[0].statistics["num_seen"] == 3
    assert found[0].statistics["stop_done"] == 1 and found[0].statistics["stop_truncated"] == 0
    assert found[1].statistics["stop_truncated"] == 1
    assert sorted(Echo.closed) == [1, 3]
    # The model saw the conversation as the chat template has it.
    told = ["user", "Begin now."], ["assistant", "a 1"], ["user", "Step 1."], ["assistant", "b"], ["user", "Step 2."]
    messages = [{"role": role, "content": text} for role, text in told]
    assert engine.prompts[0][-1] == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_async_environments_and_messages_of_any_role(tokenizer):
    (t,), engine = play(tokenizer, ["a", "win 1"], environment=AsyncEcho)
    assert t.reward == 1 and "Be short." in engine.prompts[0][0]


def test_an_environment_that_fails_makes_its_own_attempt_failed_and_no_other(tokenizer):
    Echo.closed.clear()
    found, _ = play(tokenizer, ["raise"], ["win 1"], ["nonsense"], ["hang 5"], step_limit_s=0.3)
    assert [(t.status, t.reward) for t in found] == [("failed", None), ("ok", 1.0), ("failed", None), ("failed", None)]
    assert "no such move" in found[0].error and "test_workflow_environment" in found[0].error
    assert "int" in found[2].error and "Observation" in found[2].error
    assert "step" in found[3].error and "0.3" in found[3].error
    assert len(Echo.closed) == 4


def test_a_server_that_refuses_a_later_turn_fails_that_attempt_alone(tokenizer):
    found, _ = play(tokenizer, ["a 1", RequestError("longer than the context")], ["win 1"])
    assert [(t.status, t.reward) for t in found] == [("failed", None), ("ok", 1.0)]
    assert "longer than the context" in found[0].error


def test_what_is_wrong_for_all_attempts_is_raised(tokenizer):
    with pytest.raises(RequestError):
        play(tokenizer, [RequestError("no such model")], ["win 1"])
    with pytest.raises(ConfigError, match="cannot be used"):
        play(tokenizer, ["refuse"], ["win 1"])
    with pytest.raises(ServerUnreachable):
        play(tokenizer, ["a", ServerUnreachable("server-0 is gone")], ["win 1"])


def plain_returns(rewards, discount):
    """Of each turn: its reward, and those of later turns times the discount for each turn that they are later."""
    return [
        sum(reward * discount ** (later - k) for later, reward in enumerate(rewards) if later >= k)
        for k in range(len(rewards))
    ]


def test_tokens_of_a_turn_are_trained_on_what_comes_from_it(tokenizer):
    (t,), _ = play(tokenizer, ["a 1", "b", "win 2"], turn_discount=0.5)
    expected = plain_returns([1, 0, 2], 0.5)
    assert expected == [1.5, 1.0, 2.0] and t.reward == 1.5
    told = [r for r, is_own in zip(t.returns, t.loss_mask, strict=True) if is_own]
    sizes = [len(tokenizer.encode(text)) + 1 for text in ("a 1", "b", "win 2")]
    assert told == [r for r, size in zip(expected, sizes, strict=True) for _ in range(size)]


@pytest.mark.parametrize(
    ("limits", "reason", "num_turns"),
    [
        (SessionLimits(max_turns=2), "turns", 2),
        (SessionLimits(max_tokens=5), "tokens", 2),
        (SessionLimits(timeout_s=0.25), "time", 3),
        (SessionLimits(context_length=45), "context", 2),
    ],
)
def test_a_limit_ends_the_session_with_what_it_has_earned(tokenizer, limits, reason, num_turns):
    (t,), _ = play(tokenizer, ["a 1", "b 1", "hang 0.3", "win 9"], limits=limits)
    assert (t.status, t.statistics["num_turns"]) == ("ok", num_turns)
    assert t.reward == {2: 2.0, 3: 2.3}[num_turns]
    assert {name for name, value in t.statistics.items() if name.startswith("stop_") and value} == {f"stop_{reason}"}


def test_a_first_prompt_without_room_is_refused(tokenizer):
    with pytest.raises(RequestError, match="e0-r5"):
        play(tokenizer, ["a"], limits=SessionLimits(context_length=10))


def test_raw_text_goes_on_as_it_is_written(tokenizer):
    class Count(Environment):
        def reset(self, task):
            return task.prompt

        def step(self, answer):
            return Observation(" two,", 1.0, "done" if "three" in answer.text else None)

    workflow = EnvironmentWorkflow(Count, sampling(1), tokenizer)
    engine = ScriptedEngine(tokenizer, [" one,", " three"])
    (t,) = episode(workflow, engine, messages=None, prompt="Count: zero,")
    end = tokenizer.eos_token
    assert engine.prompts[0] == ["Count: zero,", f"Count: zero, one,{end} two,"]
    assert tokenizer.decode(t.tokens) == f"Count: zero, one,{end} two, three{end}" and t.reward == 2.0


def test_on_a_server_the_logprobs_are_those_of_the_whole_row(server, folder):
    """Re-scored by the server's weights, float32: what was sampled turn by turn is one sequence of the model."""

    class Count(Environment):
        def reset(self, task):
            self.num_steps = 0
            return task.prompt

        def step(self, answer):
            self.num_steps += 1
            return Observation(" and", 0.5, "done" if self.num_steps == 3 else None)

    workflow = EnvironmentWorkflow(Count, sampling(2, max_new_tokens=6), AutoTokenizer.from_pretrained(folder))
    engine = RemoteNativeEngine(quick_config(), 1)
    engine.initialize(addresses=[server.url])
    try:
        (group,) = engine.run_groups([Task("e0-r0", prompt="one two")], workflow)
        for t in group.trajectories:
            assert t.status == "ok" and t.reward == 1.5 and t.row_lengths == [], t.error
            (scored,) = engine.score([t.tokens])
            own = [(a, b) for a, b, is_own in zip(scored, t.logprobs, t.loss_mask, strict=True) if is_own]
            assert 3 <= len(own) <= 18 and all(abs(a - b) < 1e-4 for a, b in own)
    finally:
        engine.destroy()
