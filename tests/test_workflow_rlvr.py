"""RLVRWorkflow: prompts, members, rewards and their failures, with the real chat template and real reward workers."""

import asyncio

import pytest
from support.rewards import by_word, length_reward, without_answer
from transformers import AutoTokenizer

from arealite.api.cli_args import GenerationHyperparameters, InferenceEngineConfig
from arealite.api.errors import ConfigError, RequestError
from arealite.api.types import Completion, Task
from arealite.workflow.rlvr import RLVRWorkflow

CHAT = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


class Engine:
    """Answers each member with the words given."""

    def __init__(self, tokenizer, words, reason="stop"):
        self.tokenizer, self.words, self.reason = tokenizer, words, reason
        self.requests = []

    async def agenerate(self, request, on_tokens=None):
        self.requests.append(request)
        await asyncio.sleep(0)
        word = self.words[int(request.rid.rpartition(".")[2])]
        if isinstance(word, Exception):
            raise word
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if word and self.reason == "stop":
            ids.append(self.tokenizer.eos_token_id)
        n = len(ids)
        return Completion(ids, [-0.25] * n, [7] * n, self.reason, server_id="server-0")


@pytest.fixture
def make(tokenizer):
    """make(words, **options) -> (workflow, engine)"""
    made = []

    def make(words, reward_fn=by_word, reason="stop", limit_s=10.0, **options):
        gconfig = GenerationHyperparameters(n_samples=len(words), max_new_tokens=16, temperature=0.7, stop=["###"])
        config = InferenceEngineConfig(reward_timeout_s=limit_s)
        workflow = RLVRWorkflow(reward_fn, gconfig, tokenizer, config=config, **options)
        made.append(workflow)
        return workflow, Engine(tokenizer, words, reason)

    yield make
    for workflow in made:
        workflow.close()


def run(workflow, engine, **task):
    return asyncio.run(workflow.arun_episode(engine, Task("e0-r5", **task)))


def test_members_share_one_prompt_and_keep_their_own_answers(make, tokenizer):
    workflow, engine = make(["five", "the answer is 5"], length_reward)
    trajectories = run(workflow, engine, messages=CHAT, answer="5", extras={"bonus": 2})
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer.encode(text, add_special_tokens=False)
    assert [t.member for t in trajectories] == [0, 1]
    for t, words in zip(trajectories, ["five", "the answer is 5"], strict=True):
        answer_ids = [*tokenizer.encode(words, add_special_tokens=False), tokenizer.eos_token_id]
        n = len(answer_ids)
        assert t.tokens == prompt_ids + answer_ids  # the matched stop token is trained on
        assert t.loss_mask == [False] * len(prompt_ids) + [True] * n
        assert t.logprobs == [0.0] * len(prompt_ids) + [-0.25] * n
        assert t.versions == [-1] * len(prompt_ids) + [7] * n
        assert (t.completion_text, t.prompt_text, t.status) == (words, text, "ok")
        assert t.reward == len(words)
        assert t.reward_parts == {"num_ids": float(n), "extra": 2.0}
    assert {r.rid for r in engine.requests} == {"e0-r5.0", "e0-r5.1"}
    request = engine.requests[0]
    assert (request.group_id, request.temperature, request.stop) == ("e0-r5", 0.7, ("###",))
    assert engine.requests[0].input_ids is engine.requests[1].input_ids  # tokenised once


@pytest.mark.parametrize(
    ("written", "reason", "stop_at", "seen"),
    [
        ("<answer>5</answer><|im_end|>", "stop", [], "<answer>5</answer>"),
        ("<answer>5</answer>", "stop", ["</answer>"], "<answer>5</answer>"),
        ("<answer>5<|im_end|>", "stop", ["<|im_end|>", "<|endoftext|>"], "<answer>5"),
        ("a . b<|im_start|>", "length", [], "a . b<|im_start|>"),
    ],
)
def test_the_reward_sees_the_special_tokens_that_were_written(smollm2, written, reason, stop_at, seen):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_tokens(["<answer>", "</answer>"], special_tokens=True)
    stop_ids = tokenizer.convert_tokens_to_ids(stop_at)
    gconfig = GenerationHyperparameters(n_samples=1, stop_token_ids=stop_ids)
    workflow, asked = RLVRWorkflow(length_reward, gconfig, tokenizer), []

    class Once:
        async def agenerate(self, request, on_tokens=None):
            asked.append(request)
            ids = tokenizer.encode(written, add_special_tokens=False)
            return Completion(ids, [0.0] * len(ids), [0] * len(ids), reason)

    (t,) = run(workflow, Once(), messages=CHAT)
    workflow.close()
    assert (t.completion_text, t.reward, t.reward_parts["num_ids"]) == (seen, len(seen), sum(t.loss_mask))
    assert asked[0].stop_token_ids == tuple(dict.fromkeys([*stop_ids, tokenizer.eos_token_id]))


def test_a_task_without_an_answer_gives_the_reward_none(make):
    workflow, engine = make(["five"], without_answer)
    (t,) = run(workflow, engine, messages=CHAT, answer=None)
    assert (t.reward, t.status) == (1.0, "ok")
    workflow, engine = make(["five"], by_word)
    with pytest.raises(ConfigError, match="missing a required argument: 'answer'"):
        run(workflow, engine, messages=CHAT, answer=None)


def test_raw_prompts_are_not_put_into_the_template(make, tokenizer):
    workflow, engine = make(["x"])
    (t,) = run(workflow, engine, prompt="1 + 1 =")
    assert t.prompt_text == "1 + 1 ="
    assert engine.requests[0].input_ids == tokenizer.encode("1 + 1 =")


def test_a_failed_reward_is_not_a_reward_of_zero(make):
    workflow, engine = make(["fine", "raise", "hang", "exit", "nan"], limit_s=1.0)
    good, *bad = run(workflow, engine, messages=CHAT)
    assert (good.reward, good.status) == (1.0, "ok")
    assert all(t.reward is None and t.status == "reward_error" for t in bad)
    told = ["KeyError: 'no such answer'", "no answer within 1.0 s", "exit code 3", "finite number"]
    assert all(word in t.error for word, t in zip(told, bad, strict=True))


def test_truncation_is_carried_along(make):
    workflow, engine = make(["cut off"], reason="length")
    (t,) = run(workflow, engine, messages=CHAT)
    assert t.finish_reason == "length"


def test_an_answer_without_tokens_is_a_failure(make):
    workflow, engine = make([""])
    (t,) = run(workflow, engine, messages=CHAT)
    assert (t.status, t.reward) == ("failed", None)
    assert "no token" in t.error


def test_a_prompt_over_the_context_is_refused_before_it_is_sent(make):
    workflow, engine = make(["x"], context_length=40)
    with pytest.raises(RequestError, match=r"prompt of task e0-r5 has \d+ tokens; with 16 new ones .* context of 40"):
        run(workflow, engine, messages=[{"role": "user", "content": "word " * 60}])
    assert not engine.requests


def test_one_failing_member_fails_the_episode_and_stops_the_others(make):
    workflow, engine = make(["fine", RequestError("refused"), "fine"])
    with pytest.raises(RequestError, match="refused"):
        run(workflow, engine, messages=CHAT)
