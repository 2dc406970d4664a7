"""Random agents over chat templates of many kinds: what they are asked and what is sampled always are whole rows, each
sampled token is trained once or labelled, and the order of arrival does not matter."""

import asyncio
import json
import random
import re
from dataclasses import replace

import pytest
from support.chats import FAMILIES, ScriptedModel, family_tokenizer
from transformers import AutoTokenizer

from arealite.api.cli_args import GenerationHyperparameters
from arealite.api.types import Completion, Task
from arealite.dataset.prompts import chat_messages
from arealite.gateway.asks import Ask
from arealite.gateway.forest import Turn, account_of, ids_through, joined, labels_of, returns_of, rows_of
from arealite.gateway.prompting import Prompter
from arealite.gateway.session import Session, SessionLimits

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
MARKED = re.compile(r"[uar]\d+;")  # every message has one of its own
NUM_ASKS = 24


class Agent:
    """Asks at random: goes on from any turn, asks again, begins sub-agents, compacts, wants titles; sends back what it
    got as clients do, with other blanks, orders, and without thoughts."""

    def __init__(self, family, tokenizer, history, seed):
        self.random, self.family, self.history = random.Random(seed), family, history
        template_ends = ["<|im_end|>"] if family == "smollm2" else FAMILIES[family][1]
        self.ends = template_ends
        self.model = ScriptedModel(tokenizer, self.say)
        gconfig = GenerationHyperparameters(max_new_tokens=400)
        self.prompter = Prompter(tokenizer, history)
        self.session = Session("s", self.model, self.prompter, gconfig, SessionLimits(max_turns=100))
        self.num_said = self.num_written = 0
        self.known = []  # (messages, tools, turn) that can be gone on from
        self.asked = []

    def new(self, kind):
        self.num_written += 1
        return f"{kind}{self.num_written};"

    def say(self, request):
        self.num_said += 1
        draw, text = self.random.random, f"a{100 + self.num_said};"
        thought = f"hm{self.num_said}\n</think>\n\n"
        if self.family == "deepseek":
            text = thought + text
        elif draw() < 0.4 and self.family != "smollm2":
            text = "<think>\n" + thought + text
        arguments = json.dumps({"b": [self.num_said], "a": True}, separators=(",", ":") if draw() < 0.5 else None)
        if self.family != "llama3" and draw() < 0.5:
            calls = self.random.randint(1, 2)
            text += f'\n<tool_call>\n{{"name": "look", "arguments": {arguments}}}\n</tool_call>' * calls
        elif draw() < 0.2:
            text += '\n<tool_call>\n{"name": "look", "argum'  # of which nothing becomes a call
        text += "\n\n" if draw() < 0.2 else ""
        end = None if draw() < 0.15 else self.random.choice(self.ends)
        return text, end

    def sent_back(self, answer):
        message = answer.message()
        if self.random.random() < 0.5:
            message.pop("reasoning_content", None)
        if self.random.random() < 0.5:
            message["content"] = message["content"].strip() or None
        for call in message.get("tool_calls", []):
            call["function"] = {
                "name": "look",
                "arguments": json.dumps(
                    json.loads(call["function"]["arguments"]), indent=self.random.choice([None, 1])
                ),
            }
        return message

    async def act(self):
        kind = self.random.choice(["on"] * 6 + ["branch", "again", "other", "compact", "title"])
        tools, parent = TOOLS, None
        if kind in ("on", "branch") and self.known:
            messages, tools, turn = self.known[-1] if kind == "on" else self.random.choice(self.known)
            answer = turn.answer
            since = [{"role": "tool", "tool_call_id": c.id, "content": self.new("r")} for c in answer.calls]
            if not since or self.random.random() < 0.1:
                since.append({"role": "user", "content": self.new("u")})
            messages, parent = [*messages, self.sent_back(answer), *since], turn.id
        elif kind == "again" and self.asked:
            messages, tools, parent = self.random.choice(self.asked)
        else:
            tools = [] if kind == "title" else TOOLS
            messages = [{"role": "user", "content": self.new("u")}]
            if kind == "other":
                messages.insert(0, {"role": "system", "content": self.new("u")})
        self.asked.append((messages, tools, parent))
        turn = await self.session.ask(Ask(messages, tools=tools))
        self.check(messages, tools, parent, turn)
        self.known.append((messages, tools, turn))

    def check(self, messages, tools, parent, turn):
        text = self.prompter.tokenizer.decode(self.model.requests[turn.id].input_ids)
        expected = [mark for m in messages for mark in MARKED.findall(m.get("content") or "")]
        assert MARKED.findall(text) == expected  # all that was said, once and in order
        if self.history == "keep":
            assert turn.parent == parent, turn.reason
        else:
            asked = chat_messages("messages", messages)
            assert text == self.prompter.text(asked, tools, True, Ask())


def tokenizer_of(family, smollm2):
    if family == "smollm2":
        return AutoTokenizer.from_pretrained(smollm2)
    return family_tokenizer(FAMILIES[family][0], FAMILIES[family][1][0])


@pytest.mark.parametrize("history", ["keep", "template"])
@pytest.mark.parametrize("family", [*FAMILIES, "smollm2"])
def test_what_a_random_agent_makes_is_whole_rows(family, history, smollm2):
    tokenizer = tokenizer_of(family, smollm2)
    for seed in range(1 if family == "smollm2" else 3):
        agent = Agent(family, tokenizer, history, seed)

        async def live(agent=agent):
            for _ in range(NUM_ASKS):
                await agent.act()

        asyncio.run(live())
        check_rows(agent.session, agent.model)
        check_orders(agent.session, agent.model, random.Random(seed))


def check_rows(session, model):
    """P1 and P2, for what the server saw and gave."""
    turns = joined(session.turns.values())
    labels = labels_of(turns)
    rows = rows_of(turns, labels)
    trained = []
    for row in rows:
        for id in row.path:
            seen = [*model.requests[id].input_ids, *model.completions[id].token_ids]
            assert row.tokens[: len(seen)] == seen
        assert len(seen) == len(row.tokens)
        for i, id in enumerate(row.turn_of):
            assert row.loss_mask[i] == (id >= 0)
            if id >= 0:
                place = i - len(model.requests[id].input_ids)
                completion = model.completions[id]
                assert (row.logprobs[i], row.versions[i]) == (completion.logprobs[place], completion.versions[place])
                trained.append((id, place))
    assert len(trained) == len(set(trained))
    account = account_of(turns, labels, rows)
    assert account["sampled"] == sum(len(c.token_ids) for c in model.completions)
    assert account["sampled"] == account["trained"] + account.get("auxiliary", 0) + account.get("discarded", 0)
    assert account["trained"] == len(trained)
    trajectory = session.trajectory(Task("t", []), 0, 1.0)
    assert sum(trajectory.loss_mask) == len(trained) and len(trajectory.tokens) == sum(len(r.tokens) for r in rows)


def check_orders(session, model, rng):
    """P4: whatever came first, and whether its parent was known by then."""

    def rows(turns):
        every = joined(turns)
        made = rows_of(every, dict.fromkeys(every, "agent"))
        return sorted((row.tokens, row.loss_mask, row.logprobs) for row in made)

    expected = rows(session.turns.values())
    for _ in range(3):
        order = rng.sample(range(len(session.turns)), len(session.turns))
        new = {old: position for position, old in enumerate(order)}
        moved = []
        for old in order:
            turn = session.turns[old]
            parent, added = turn.parent, turn.added_ids
            if parent is not None and (new[parent] > new[old] or rng.random() < 0.3):
                parent, added = None, model.requests[old].input_ids
            moved.append(replace(turn, id=new[old], parent=None if parent is None else new[parent], added_ids=added))
        assert rows(moved) == expected


def turn_of(id, parent, added, sampled, tools=True, rewards=None):
    completion = Completion(sampled, [-float(id)] * len(sampled), [id] * len(sampled), "stop")
    return Turn(id, parent, added, Ask(tools=TOOLS if tools else []), "", completion, rewards=rewards or {})


def test_turns_are_joined_by_the_longest_equal_beginning():
    """Against a search of all pairs."""
    rng = random.Random(0)
    for _ in range(200):
        turns = {}
        for id in range(rng.randint(1, 9)):
            parent = rng.choice([None, *turns])
            turns[id] = turn_of(id, parent, rng.choices([1, 2], k=rng.randint(0, 2)), rng.choices([1, 2], k=1))
        whole = {id: ids_through(turns, id) for id in turns}
        out = joined(turns.values())
        for id, turn in out.items():
            prompt = whole[id][:-1]
            longest = max(
                (len(w) for w in whole.values() if prompt[: len(w)] == w and len(w) <= len(prompt)), default=0
            )
            before = 0 if turn.parent is None else len(whole[turn.parent])
            assert before == longest and ids_through(out, id) == whole[id]


def test_a_token_that_several_rows_pass_through_is_trained_in_one():
    turns = {t.id: t for t in (turn_of(0, None, [1], [2]), turn_of(1, 0, [3], [4]), turn_of(2, 0, [5], [6]))}
    rows = rows_of(turns)
    assert [row.tokens for row in rows] == [[1, 2, 3, 4], [1, 2, 5, 6]]
    assert [row.loss_mask for row in rows] == [[False, True, False, True], [False, False, False, True]]
    assert rows[1].versions == [-1, -1, -1, 2]


def test_labels_say_why_a_turn_is_not_trained():
    turns = [
        turn_of(0, None, [1], [2]),  # answered again, and that one was gone on with
        turn_of(1, None, [1], [3]),
        turn_of(2, 1, [4], [5]),
        turn_of(3, None, [9], [8], tools=False),  # a title
        turn_of(4, 2, [6], [7]),  # best of two: the last counts
        turn_of(5, 2, [6], [8]),
    ]
    labels = labels_of({t.id: t for t in turns})
    assert labels == {0: "discarded", 1: "agent", 2: "agent", 3: "auxiliary", 4: "discarded", 5: "agent"}


def test_returns_go_along_the_path_and_not_by_the_order_of_arrival():
    """Two sub-agents whose turns came interleaved."""
    turns = {
        t.id: t
        for t in (
            turn_of(0, None, [1], [2], rewards={"r": 1.0}),
            turn_of(1, None, [7], [8], rewards={"r": 2.0}),
            turn_of(2, 0, [3], [4]),
            turn_of(3, 1, [3], [4], rewards={"r": 4.0}),
            turn_of(4, 2, [5], [6], rewards={"r": 8.0}),
        )
    }
    rewards = {id: sum(t.rewards.values()) for id, t in turns.items()}
    rows = rows_of(turns)
    ids = [id for row in rows for id in row.turn_of]
    returns = dict(zip(ids, returns_of(rows, rewards, 10.0, 0.5), strict=True))
    assert returns.pop(-1) == 0
    assert returns == {4: 18.0, 2: 9.0, 0: 5.5, 3: 14.0, 1: 9.0}
