"""Sessions with a scripted engine and a real tokenizer: prompts extend what was sampled; a session is one sample."""

import asyncio
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from arealite.api.cli_args import GenerationHyperparameters
from arealite.api.types import Completion, Task
from arealite.gateway import forest
from arealite.gateway.asks import Ask
from arealite.gateway.prompting import Prompter
from arealite.gateway.session import LimitReached, Session, SessionEnded, SessionLimits

ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
TOOLS = [{"type": "function", "function": ADD}]
CALL = 'Let me see\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


class Speaker:
    """Answers with what it is given, in order."""

    context_length = None

    def __init__(self, tokenizer, *texts, finish="stop"):
        self.tokenizer, self.texts, self.finish, self.requests = tokenizer, list(texts), finish, []
        self.version = 0

    async def agenerate(self, request, on_tokens=None):
        self.requests.append(request)
        ids = self.tokenizer(self.texts.pop(0), add_special_tokens=False)["input_ids"]
        ids += [self.tokenizer.eos_token_id] if self.finish == "stop" else []
        versions = []
        for i in range(1, len(ids) + 1):
            versions.append(self.version)
            await asyncio.sleep(0)
            if on_tokens is not None:
                on_tokens(ids[:i])
        return Completion(ids, [-1.0] * len(ids), versions, self.finish, matched=ids[-1])


def session_of(tokenizer, *texts, finish="stop", limits=None, history="keep"):
    gconfig = GenerationHyperparameters(max_new_tokens=64)
    return Session("s", Speaker(tokenizer, *texts, finish=finish), Prompter(tokenizer, history), gconfig, limits)


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("history", ["keep", "template"])
def test_a_conversation_is_one_row_of_what_was_sampled(tokenizer, history):
    async def talk():
        session = session_of(tokenizer, "4", "5 it is", "bye", history=history)
        messages = []
        for text in ("2 + 2?", "and one more?", "thanks"):
            messages.append(user(text))
            turn = await session.ask(Ask([*messages]))
            messages.append(turn.answer.message())
        return session, session.trajectory(Task("t", []), 0, 1.0)

    session, trajectory = asyncio.run(talk())
    last = session.engine.requests[-1].input_ids
    assert trajectory.tokens[: len(last)] == last and not trajectory.row_lengths and trajectory.reward == 1.0
    spoken = [token for token, is_trained in zip(trajectory.tokens, trajectory.loss_mask, strict=True) if is_trained]
    assert spoken == [token for turn in session.turns.values() for token in turn.sampled]
    assert tokenizer.decode(last).count("<|im_start|>user") == 3


def test_a_call_and_its_result_extend_the_row_and_a_title_does_not(tokenizer):
    async def talk():
        session = session_of(tokenizer, CALL, "It is 3.", "A title")
        grown = []
        first = await session.ask(Ask([user("1 + 2?")], tools=TOOLS), grown.append)
        reply = {**first.answer.message(), "content": "Let me see"}  # white space is often cut
        reply["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}]
        result = {"role": "tool", "content": "3", "tool_call_id": "x"}
        second = await session.ask(Ask([user("1 + 2?"), reply, result], tools=TOOLS))
        title = await session.ask(Ask([user("a title, please")]))
        return session, grown, first, second, title

    session, grown, first, second, title = asyncio.run(talk())
    assert first.answer.reason == "tool_calls" and [c.arguments for c in first.answer.calls] == ['{"a": 1}']
    assert all(b.text.startswith(a.text) for a, b in pairwise(grown))
    assert (
        second.parent == first.id
        and title.parent is None
        and forest.reasons_of([first, title]) == {0: "first", 2: "other messages"}
    )
    assert tokenizer.decode(second.added_ids) == "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    tokens = session.trace()["tokens"]
    assert tokens["trained"] == len(first.sampled) + len(second.sampled) and tokens["auxiliary"] == len(title.sampled)


def test_an_answer_that_was_cut_off_is_closed_outside_the_loss(tokenizer):
    async def talk():
        session = session_of(tokenizer, "it goes on and", "on", finish="length")
        first = await session.ask(Ask([user("go")]))
        return first, await session.ask(Ask([user("go"), first.answer.message(), user("on")]))

    first, second = asyncio.run(talk())
    assert second.parent == first.id and tokenizer.decode(second.added_ids).startswith("<|im_end|>\n<|im_start|>user")


def test_one_attempt_is_one_turn_however_often_it_is_asked(tokenizer):
    async def talk():
        session = session_of(tokenizer, "once")
        asks = [session.ask(Ask([user("go")]), attempt_key="k") for _ in range(100)]
        gone = asyncio.ensure_future(session.ask(Ask([user("go")]), attempt_key="k"))
        await asyncio.sleep(0)
        gone.cancel()
        turns = await asyncio.gather(*asks)
        return session, turns

    session, turns = asyncio.run(talk())
    assert len(session.turns) == 1 and len({id(turn) for turn in turns}) == 1


def test_a_changed_system_message_or_tool_begins_a_new_row_and_is_counted(tokenizer):
    async def talk():
        session = session_of(tokenizer, "a", "b", "c")
        system = {"role": "system", "content": "one"}
        first = await session.ask(Ask([system, user("go")]))
        history = [user("go"), first.answer.message(), user("on")]
        turns = [
            await session.ask(Ask([{**system, "content": "two"}, *history])),
            await session.ask(Ask([system, *history], tools=TOOLS)),
        ]
        return turns, session.trajectory(Task("t", []), 0, 1.0).statistics

    turns, statistics = asyncio.run(talk())
    assert [turn.reason for turn in turns] == ["other system message", "other tools"]
    splits = {name: number for name, number in statistics.items() if name.startswith("split_") and number}
    assert splits == {"split_other_system_message": 1, "split_other_tools": 1}


def test_weights_that_change_within_an_answer_are_told_for_each_token(tokenizer):
    async def talk():
        session = session_of(tokenizer, "one two three four five six", "seven")

        def swap(answer):
            session.engine.version = 4 if answer.text.startswith("one two three") else 3

        session.engine.version = 3
        first = await session.ask(Ask([user("go")]), on_answer=swap)
        await session.ask(Ask([user("go"), first.answer.message(), user("on")]))
        return first, session.trajectory(Task("t", []), 0, 1.0)

    first, trajectory = asyncio.run(talk())
    assert first.completion.versions == sorted(first.completion.versions)
    assert first.completion.versions.count(3) > 1 < first.completion.versions.count(4)
    trained = [v for v, is_trained in zip(trajectory.versions, trajectory.loss_mask, strict=True) if is_trained]
    assert trained == [*first.completion.versions, 4, 4] and not trajectory.row_lengths


def test_a_reward_of_a_lineage_is_for_its_turns_alone(tokenizer):
    async def talk():
        session = session_of(tokenizer, "a", "b", "c", "d")
        parent = await session.ask(Ask([user("go")]))
        aside = await session.ask(Ask([user("a part of it")]))
        await session.ask(Ask([user("a part of it"), aside.answer.message(), user("on")]))
        await session.ask(Ask([user("go"), parent.answer.message(), user("on")]))
        session.reward(4.0, turn=2, is_of_lineage=True)
        session.reward(1.0, turn=3)
        task = Task("t", [])
        return session, session.trajectory(task, 0, 0.5), session.trajectory(task, 0, 0.5, turn_discount=0.5)

    session, whole, discounted = asyncio.run(talk())
    assert session.turns[1].lineage_rewards == {"outcome": 4.0} and not session.turns[2].lineage_rewards
    assert whole.reward == 5.5
    of_turns = [r for r, is_trained in zip(discounted.returns, discounted.loss_mask, strict=True) if is_trained]
    assert of_turns == [0.75] * 2 + [1.5] * 2 + [2.25] * 2 + [4.5] * 2


def test_a_script_is_shown_the_whole_conversation(tokenizer):
    async def talk():
        session, shown = session_of(tokenizer, "a", "b"), []
        session.script = lambda ask, turn: shown.append((turn, len(ask.messages)))
        first = await session.ask(Ask([user("go")]))
        await session.ask(Ask([user("go"), first.answer.message(), user("on")]))
        return shown

    assert asyncio.run(talk()) == [(0, 1), (1, 3)]


def test_limits_end_it_with_their_name(tokenizer):
    async def talk():
        session = session_of(tokenizer, "a", limits=SessionLimits(context_length=64, max_turns=1))
        words = r"prompt is too long: \d+ tokens > 64; the maximum context length is 64 "  # that harnesses look for
        with pytest.raises(LimitReached, match=words):
            await session.ask(Ask([user("long " * 100)]))
        await session.ask(Ask([user("go")]))
        with pytest.raises(LimitReached, match="turns: 1 of 1"):
            await session.ask(Ask([user("go")]))
        session.finish()
        with pytest.raises(SessionEnded):
            await session.ask(Ask([user("go")]))
        return session.trajectory(Task("t", []), 0, 0.0)

    assert asyncio.run(talk()).statistics["stop_turns"] == 1
