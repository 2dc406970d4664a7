"""What chat templates of several families do to a history, one trap at a time; and what a long session costs."""

import asyncio
import json

import pytest
from support.chats import FAMILIES, ScriptedModel, family_tokenizer

from arealite.api.cli_args import GenerationHyperparameters
from arealite.api.errors import ConfigError, RequestError, ServerUnreachable
from arealite.gateway import prompting
from arealite.gateway.asks import Ask
from arealite.gateway.prompting import Prompter
from arealite.gateway.session import Session, SessionEnded, SessionLimits
from arealite.inference.openai.chat import ChatTemplate

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = '<tool_call>\n{"name": "look", "arguments": {"a":1}}\n</tool_call>'


def user(text):
    return {"role": "user", "content": text}


def session_of(family, answers, history="keep"):
    """`answers`: texts, each with the token that ends it."""
    said = list(answers)
    tokenizer = family_tokenizer(FAMILIES[family][0], FAMILIES[family][1][0])
    model = ScriptedModel(tokenizer, lambda request: said.pop(0))
    limits = SessionLimits(max_turns=1000, max_tool_calls=1000)
    return Session("s", model, Prompter(tokenizer, history), GenerationHyperparameters(max_new_tokens=100), limits)


async def ask(session, messages, tools=(), **options):
    """The turn, and the text of its prompt."""
    turn = await session.ask(Ask(messages, tools=list(tools), **options))
    return turn, session.prompter.tokenizer.decode(session.engine.requests[turn.id].input_ids)


def think_and_call(family, history, end):
    """A thought and a call, its result, an answer, another question: the three turns and the last prompt."""

    async def talk():
        thought = "hm\n</think>\n\n" if family == "deepseek" else "<think>\nhm\n</think>\n\n"
        session = session_of(family, [(thought + CALL, end), (thought + "done", end), ("bye", end)], history)
        messages = [user("u1")]
        first, _ = await ask(session, messages, TOOLS)
        assert (first.answer.reasoning, first.answer.reason) == ("hm", "tool_calls")
        messages += [first.answer.message(), {"role": "tool", "tool_call_id": "c", "content": "r1"}]
        second, _ = await ask(session, messages, TOOLS)
        third, text = await ask(session, [*messages, second.answer.message(), user("u2")], TOOLS)
        return first, second, third, text

    return asyncio.run(talk())


@pytest.mark.parametrize("family", ["qwen3", "glm", "kimi", "deepseek"])
def test_thoughts_stay_in_one_row_where_they_are_kept(family):
    first, second, third, text = think_and_call(family, "keep", FAMILIES[family][1][-1])
    assert (first.parent, second.parent, third.parent) == (None, 0, 1)
    assert text.count("hm\n</think>") == 2 and [text.count(mark) for mark in ("u1", "r1", "done", "u2")] == [1] * 4


def test_a_template_that_drops_thoughts_begins_a_new_row_at_the_next_question():
    first, second, third, text = think_and_call("qwen3", "template", "<|im_end|>")
    assert (first.parent, second.parent) == (None, None)  # its call is written with a blank more
    assert third.reason == "rewritten history" and "hm" not in text


def test_a_thought_that_the_template_still_shows_is_extended_under_either_policy():
    async def talk():
        call = '\n<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>'
        session = session_of(
            "qwen3", [("<think>\nhm\n</think>\n\nso" + call, "<|im_end|>"), ("x", "<|im_end|>")], "template"
        )
        first, _ = await ask(session, [user("u1")], TOOLS)
        reply = first.answer.message()
        result = {"role": "tool", "content": "r1", "tool_call_id": "c"}
        return await ask(session, [user("u1"), {**reply, "content": "so"}, result], TOOLS)

    turn, text = asyncio.run(talk())
    assert turn.parent == 0 and "<think>\nhm\n</think>\n\nso\n<tool_call>" in text


def test_the_token_that_ends_an_answer_is_the_opening_of_the_next_turn_once():
    async def talk(end, message):
        session = session_of("glm", [("a1", end), ("a2", end)])
        first, _ = await ask(session, [user("u1")])
        return await ask(session, [user("u1"), first.answer.message(), message])

    assert (
        asyncio.run(talk("<|user|>", user("u2")))[1]
        == "[gMASK]<sop><|user|>\nu1<|assistant|>\na1<|user|>\nu2<|assistant|>\n"
    )
    tool = {"role": "tool", "content": "r", "tool_call_id": "c"}
    text = asyncio.run(talk("<|observation|>", tool))[1]
    assert text.endswith("a1<|observation|>\n<tool_response>r</tool_response><|assistant|>\n")
    cut = asyncio.run(talk(None, user("u2")))  # cut off: the opening is not sampled, and stands there all the same
    assert cut[0].parent == 0 and cut[1].endswith("a1<|user|>\nu2<|assistant|>\n")


def test_results_in_any_order_of_two_calls_extend_the_row():
    async def talk():
        session = session_of("kimi", [("both" + CALL + CALL, "<|im_end|>"), ("a2", "<|im_end|>")])
        first, _ = await ask(session, [user("u1")], TOOLS)
        ids = [call.id for call in first.answer.calls]
        results = [{"role": "tool", "content": f"r{i}", "tool_call_id": ids[i]} for i in (1, 0)]
        return ids, await ask(session, [user("u1"), first.answer.message(), *results], TOOLS)

    ids, (turn, text) = asyncio.run(talk())
    assert len(set(ids)) == 2 and turn.parent == 0
    assert text.index(f"Return of {ids[1]}\nr1") < text.index(f"Return of {ids[0]}\nr0")


def test_a_call_that_cannot_be_read_is_text_and_stays_what_was_sampled():
    async def talk():
        broken = 'x<tool_call>\n{"name": "look", "argu'
        session = session_of("qwen3", [(broken, "<|im_end|>"), ("a2", "<|im_end|>")])
        first, _ = await ask(session, [user("u1")], TOOLS)
        assert first.answer.text == broken and first.answer.reason == "stop" and not first.answer.calls
        return await ask(session, [user("u1"), first.answer.message(), user("u2")], TOOLS)

    turn, text = asyncio.run(talk())
    assert turn.parent == 0 and text.count('"argu') == 1


def test_what_begins_a_new_row_is_named():
    system = {"role": "system", "content": "s"}

    async def talk():
        session = session_of("qwen3", [("a", "<|im_end|>")] * 7)
        first, _ = await ask(session, [system, user("u1")], TOOLS)
        history = [user("u1"), first.answer.message(), user("u2")]
        asks = [
            ([system, *history], {"tools": TOOLS}),
            ([{**system, "content": "line 2"}, *history], {"tools": TOOLS}),
            ([system, *history], {}),
            ([system, *history], {"tools": TOOLS, "model": "another"}),
            ([system, user("a summary"), user("u2")], {"tools": TOOLS}),
        ]
        for messages, options in asks:
            await ask(session, messages, **options)
        return session.trace()

    trace = asyncio.run(talk())
    names = ["other system message", "other tools", "other model", "other messages"]
    assert [turn["reason"] for turn in trace["turns"]] == ["first", "", *names]
    assert trace["splits"] == dict.fromkeys(names, 1)


@pytest.mark.parametrize("history", ["keep", "template"])
def test_what_begins_a_branch_is_named(history):
    """Answers that are sent back otherwise: the first, the last, and one that others go on from."""

    async def talk():
        session = session_of("llama3", [(f"a{i}", "<|eot|>") for i in range(9)], history)
        first, _ = await ask(session, [user("u1")])
        history_1 = [user("u1"), first.answer.message(), user("u2")]
        await ask(session, history_1)
        rewritten = {"role": "assistant", "content": "what I meant"}
        third, _ = await ask(session, [*history_1, rewritten, user("u3")])
        await ask(session, [*history_1, rewritten, user("u3"), third.answer.message(), user("u4")])
        await ask(session, [user("u1"), rewritten, user("u2")])
        await ask(session, [user("u1"), first.answer.message(), user("of another agent")])
        await asyncio.gather(ask(session, history_1), ask(session, [user("u1")]))
        return session.trace()

    trace = asyncio.run(talk())
    assert [(turn["parent"], turn["reason"]) for turn in trace["turns"]] == [
        (None, "first"), (0, ""), (0, "rewritten answer"), (2, ""), (None, "rewritten answer"), (0, "other messages"),
        (0, "another sample"), (None, "another sample"),
    ]  # fmt: skip
    assert trace["splits"] == {"another sample": 2, "rewritten answer": 2, "other messages": 1}


def test_raw_prompts_go_on_by_text_and_by_tokens():
    async def talk():
        session = session_of("qwen3", [("b", None), ("d", "<|im_end|>"), ("f", None), ("h", None)])
        turns = [await session.ask(Ask(prompt=text)) for text in ("a", "ab c", "ab cd", "ab cd<|im_end|>e")]
        ids = [*session.engine.requests[1].input_ids, *turns[1].sampled, 5]
        session.engine.say = lambda request: ("x", None)
        turns += [await session.ask(Ask(prompt=ids)), await session.ask(Ask(prompt=[*ids, *turns[0].sampled]))]
        decode = session.prompter.tokenizer.decode
        reasons = [turn["reason"] for turn in session.trace()["turns"]]
        return [(t.parent, why, decode(t.added_ids)) for t, why in zip(turns, reasons, strict=True)], session

    turns, session = asyncio.run(talk())
    assert turns[:4] == [
        (None, "first", "a"),
        (0, "", " c"),
        (0, "other text", " cd"),  # the end of the answer, which was sampled, is not in it
        (1, "", "e"),
    ]
    assert turns[4][:2] == (None, "other tokens")
    assert session.trace()["turns"][4]["joins"] == 1  # by its tokens


def test_images_and_empty_asks_are_refused_and_parts_of_text_are_joined():
    async def talk():
        session = session_of("qwen3", [("a", "<|im_end|>")] * 2)
        parts = [{"type": "text", "text": "u1"}, {"type": "text", "text": "u2"}]
        first, _ = await ask(session, [{"role": "user", "content": parts}])
        history = [user("u1\nu2"), {**first.answer.message(), "content": [{"type": "text", "text": "a"}]}, user("u3")]
        assert (await ask(session, history))[0].parent == 0
        image = {"role": "tool", "content": [{"type": "image_url", "image_url": {"url": "x"}}], "tool_call_id": "c"}
        with pytest.raises(RequestError, match=r"messages\[3\].content\[0\].type: only text is supported"):
            await ask(session, [*history, image])
        with pytest.raises(RequestError, match="messages: there is none"):
            await ask(session, [])
        assert session.num_refused == 2 and len(session.turns) == 2

    asyncio.run(talk())
    with pytest.raises(ConfigError, match="expected keep or template"):
        Prompter(family_tokenizer(FAMILIES["qwen3"][0], "<|im_end|>"), "forget")


def test_an_attempt_that_failed_is_asked_anew_and_one_cut_short_by_the_end_says_so():
    async def talk():
        session = session_of("qwen3", [("a", "<|im_end|>")])
        sample = session.engine.agenerate

        async def fail(request, on_tokens=None):
            raise ServerUnreachable("gone")

        session.engine.agenerate = fail
        with pytest.raises(ServerUnreachable):
            await session.ask(Ask([user("u1")]), attempt_key="k")
        session.engine.agenerate = sample
        turn = await session.ask(Ask([user("u1")]), attempt_key="k")
        assert turn.answer.text == "a" and await session.ask(Ask([user("u1")]), attempt_key="k") is turn

        async def hang(request, on_tokens=None):
            await asyncio.Event().wait()

        session.engine.agenerate = hang
        waiting = asyncio.ensure_future(session.ask(Ask([user("u2")])))
        await asyncio.sleep(0)
        session.finish()
        with pytest.raises(SessionEnded, match="finished"):
            await waiting
        assert session.trace()["tokens"] == {"sampled": 2, "trained": 2}

    asyncio.run(talk())


def test_a_session_of_300_turns_is_linear(monkeypatch):
    """In characters that are encoded, calls of the template, and bytes of the trace."""
    encoded, rendered = [], []
    encode, render = prompting.encode, ChatTemplate.text
    monkeypatch.setattr(prompting, "encode", lambda t, text, **o: encoded.append(len(text)) or encode(t, text, **o))
    monkeypatch.setattr(ChatTemplate, "text", lambda *a, **o: rendered.append(1) or render(*a, **o))

    async def talk():
        session = session_of("kimi", [(f"answer {i}", "<|im_end|>") for i in range(300)])
        messages, sizes = [], []
        for i in range(300):
            messages = [*json.loads(json.dumps(messages)), user(f"question {i}")]
            turn = await session.ask(Ask(messages, tools=TOOLS))
            assert turn.parent == (i - 1 if i else None)
            messages.append(turn.answer.message())
            if i in (149, 299):
                sizes.append(len(json.dumps(session.trace())))
        return session, sizes

    session, sizes = asyncio.run(talk())
    assert sum(encoded) < len(session.text()) + 1000
    assert len(rendered) == 300
    assert sizes[1] < 2.1 * sizes[0]
    assert json.dumps(session.trace()).count('"tools"') == 1  # harnesses have 100 KB of them
