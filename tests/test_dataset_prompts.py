"""Messages and texts become tokens in one way: special tokens once, templates that refuse or leave out, all their
variables; what ends a turn."""

import json
import logging
import re

import pytest
from support.inference import EOS, LocalServer, byte_tokenizer, save_tiny_llama, served
from support.rewards import by_word
from tokenizers.processors import TemplateProcessing

from arealite.api.cli_args import (
    DatasetConfig,
    GenerationHyperparameters,
    GRPOConfig,
    PPOActorConfig,
    SFTConfig,
    TrainEngineConfig,
)
from arealite.api.errors import ConfigError, DatasetError, PromptError
from arealite.api.types import Task
from arealite.dataset.examples import load_answers, load_preferences
from arealite.dataset.loader import load_tasks, load_tokenizer
from arealite.dataset.prompts import encode, prompt_of, render, turn_end
from arealite.workflow.rlvr import RLVRWorkflow

BOS = 257
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PADDED = CHATML.replace("<eos>", "<pad>")
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DEAF = CHATML.replace(
    "<{{ m.role }}>{{ m.content }}<eos>",
    "{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}<eos>{% endif %}",
)
ENDLESS = CHATML.replace("<eos>", "\n")
THINKING = CHATML.replace("<assistant>{%", "<assistant>{% if enable_thinking is false %}<think></think>{% endif %}{%")
TOOLED = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.a }}){% endfor %}",
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
LONE = "a\ud83d"


def made(template=None, added="$A", **changes):
    """A byte tokenizer that adds special tokens as `added` says."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=added, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    tokenizer.chat_template = template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def source(folder, *rows, **settings) -> DatasetConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetConfig(path=str(path), **settings)


def learned(example, tokenizer) -> str:
    return tokenizer.decode(example.tokens[0][example.loss_mask[0]].tolist())


@pytest.mark.parametrize("added", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
@pytest.mark.parametrize("text", ["xy", "<bos>xy", "xy<eos>", "<bos>xy<eos>", "<bos>", ""])
def test_raw_text_has_each_special_token_once_and_no_end_that_nobody_wrote(added, text):
    tokenizer = made(added=added)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    begins = "<bos>" in added and not text.startswith("<bos>")
    assert encode(tokenizer, text, is_raw=True) == [BOS] * begins + plain
    assert encode(tokenizer, text) == plain


def test_texts_of_rows_and_of_the_servers_clients_are_encoded_alike(tmp_path):
    tokenizer = made(added="<bos> $A <eos>")
    config = source(tmp_path, {"text": "<bos>xy", "answer": "1"})
    (task,) = load_tasks(config, tokenizer, 0)
    prompt = [BOS, *tokenizer("xy", add_special_tokens=False)["input_ids"]]
    assert prompt_of(tokenizer, task) == ("<bos>xy", prompt)
    (example,) = load_answers(config, tokenizer, 0)
    assert example.tokens[0].tolist() == [*prompt, EOS]
    folder = save_tiny_llama(tmp_path / "model")
    tokenizer.save_pretrained(folder)
    with LocalServer(served(folder)) as server:
        for text in ("xy", "<bos>xy"):
            _, answer = server.post(
                "/generate", {"text": text, "return_prompt_token_ids": True, "sampling_params": {"max_new_tokens": 1}}
            )
            assert answer["prompt_token_ids"] == prompt


def test_the_limit_counts_what_is_sent_with_all_variables_of_the_template(tmp_path):
    tokenizer = made(THINKING)
    options = {"enable_thinking": False}
    text = render(tokenizer, [USER], **options)
    assert text.endswith("<think></think>")
    fits = source(
        tmp_path, {"question": "Hi"}, chat_template_kwargs=options, max_prompt_tokens=len(text) - len("<eos>") + 1
    )
    (task,) = load_tasks(fits, tokenizer, 0)
    workflow = RLVRWorkflow(by_word, GenerationHyperparameters(), tokenizer)
    assert workflow._prompt(task) == prompt_of(tokenizer, task) == (text, encode(tokenizer, text))
    workflow.close()
    fits.max_prompt_tokens -= 1
    with pytest.raises(DatasetError, match="1 exceed max_prompt_tokens"):
        load_tasks(fits, tokenizer, 0)
    for name, said in (
        ("tokenize", "tokenize cannot be set"),
        ("thinking", "the chat template has no variable thinking:"),
        ("enable", "the chat template has no variable enable:"),  # it has enable_thinking
    ):
        fits.chat_template_kwargs = {name: True}
        for load in (load_tasks, load_answers, load_preferences):
            with pytest.raises(PromptError, match=f"chat_template_kwargs: {said}"):
                load(fits, made(THINKING), 0)


REFUSED = [
    (NO_SYSTEM, {"system_prompt": "Be kind."}, {"question": "Hi"}, "refuses these messages: TemplateError: System"),
    (DEAF, {"system_prompt": "Be kind."}, {"question": "Hi"}, "leaves out 'Be kind.' of role 'system'.* prompt_te"),
    (DEAF, {}, {"messages": [USER, {"role": "tool", "content": "7"}]}, "leaves out '7' of role 'tool'"),
    (CHATML, {}, {"messages": [USER, {**ASSISTANT, "tool_calls": [CALL]}, USER]}, "leaves out the tool calls of role"),
    (CHATML, {}, {"question": "Hi", "tools": TOOLS}, "leaves out the tools"),
    ("{{ messages[1].content }}{{ nothing.at.all }}", {}, {"question": "Hi"}, "refuses these messages: UndefinedError"),
    ("{{ 1 // 0 }}", {}, {"question": "Hi"}, "refuses these messages: ZeroDivisionError"),
    (CHATML, {}, {"question": LONE}, "half of a surrogate pair"),
    (CHATML, {}, {"messages": [USER, {"role": "system", "content": LONE}, USER]}, "half of a surrogate pair"),
    (None, {}, {"text": LONE}, "half of a surrogate pair"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "settings", "row", "said"), REFUSED)
def test_what_the_template_cannot_show_is_refused_with_its_row(tmp_path, template, settings, row, said):
    config = source(
        tmp_path,
        {"question": "Hi", "answer": "Ho"} if not settings and template in (CHATML, DEAF) else row,
        row | {"answer": "Ho"},
        **settings,
    )
    with pytest.raises(DatasetError, match=f"rows.jsonl:[12]: .*{said}"):
        load_tasks(config, made(template), 0)
    row = {**row, "messages": [*row["messages"], ASSISTANT]} if "messages" in row else row
    with pytest.raises(DatasetError, match=f"rows.jsonl:1: .*{said}"):
        load_answers(source(tmp_path, row | {"answer": "Ho"}, **settings), made(template), 0)
    if "text" not in row:
        pair = {"chosen": row.pop("messages", "Ho"), "rejected": [USER, {"role": "assistant", "content": "No"}]}
        with pytest.raises(DatasetError, match=f"rows.jsonl:1: .*{said}"):
            load_preferences(source(tmp_path, row | pair, **settings), made(template), 0)


def test_calls_parts_and_an_opening_answer_are_learned(tmp_path):
    tokenizer = made(TOOLED)
    parts = [{"type": "text", "text": "Hi"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    rows = [{"messages": chat, "tools": json.dumps(TOOLS)}, {"messages": [ASSISTANT, USER, ASSISTANT]}]
    rows += [{"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": json.dumps([USER]), "completion": "Ho"}]
    about = {"instruction": "Greet:", "input": "me", "output": "Ho"}
    (example,) = load_answers(source(tmp_path, about), tokenizer, 0)
    assert tokenizer.decode(example.tokens[0].tolist()) == "<user>Greet:\n\nme<eos><assistant>Ho<eos>"
    called, opened, *asked = load_answers(source(tmp_path, *rows), tokenizer, 0)
    assert tokenizer.decode(called.tokens[0].tolist()) == "[add]<user>Hi<eos><assistant>add(7)<eos>"
    assert learned(called, tokenizer) == "add(7)<eos>" and learned(opened, tokenizer) == "Ho<eos>Ho<eos>"
    for example in asked:
        assert tokenizer.decode(example.tokens[0].tolist()) == "<user>Hi<eos><assistant>Ho<eos>"
    pair = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "No"}]}
    (example,) = load_preferences(source(tmp_path, pair), tokenizer, 0)
    assert [tokenizer.decode(side[:-1].tolist()) for side in example.tokens] == [
        f"<user>Hi<eos><assistant>{word}<eos>" for word in ("Ho", "No")
    ]


def test_an_end_is_learned_where_the_template_writes_none(tmp_path):
    tokenizer, rows = made(ENDLESS), source(tmp_path, {"messages": [USER, ASSISTANT, USER, ASSISTANT]})
    assert turn_end(tokenizer) == [] and turn_end(made(CHATML)) == [EOS]
    (example,) = load_answers(rows, tokenizer, 0)
    assert tokenizer.decode(example.tokens[0].tolist()) == "<user>Hi\n<assistant>Ho\n<user>Hi\n<assistant>Ho<eos>"
    assert learned(example, tokenizer) == "HoHo<eos>"
    tokenizer.eos_token = None
    for row in ({"text": "Once"}, {"question": "Hi", "answer": "Ho"}):
        with pytest.raises(DatasetError, match=r"rows.jsonl:1: .* no end-of-sequence token: name one as eos_token"):
            load_answers(source(tmp_path, row), tokenizer, 0)
    tokenizer.chat_template = CHATML  # what needs no end has none
    assert load_tasks(source(tmp_path, {"text": "Once"}, {"question": "Hi"}), tokenizer, 0)


def test_empty_cells_are_counted_and_answers_needed_only_by_rewards_that_take_them(tmp_path, caplog):
    def judge(prompt, completion, prompt_ids, completion_ids, answer="", **extras):
        return 0.0

    tokenizer = made(CHATML)
    nan = float("nan")
    rows = [{"question": "Hi", "answer": cell, "note": nan} for cell in ("Ho", nan, "", None)]
    rows.append({"question": "", "answer": "1"})
    with caplog.at_level(logging.WARNING):
        assert [t.id for t in load_tasks(source(tmp_path, *rows), tokenizer, 0, by_word)] == ["r0"]
        assert "4 of 5 rows are left out: 4 have an empty question or answer" in caplog.text and ":2" in caplog.text
        assert [e.id for e in load_answers(source(tmp_path, *rows), tokenizer, 0)] == ["r0"]
        assert len(load_tasks(source(tmp_path, *rows), tokenizer, 0, judge)) == 4
    assert "3 of 4 rows have no answer, their rewards get none" in caplog.text
    assert len(load_tasks(source(tmp_path, {"prompt": "Hi"}), tokenizer, 0, judge)) == 1
    with pytest.raises(DatasetError, match="rows.jsonl:1: no answer: found the columns prompt, expected an answer in"):
        load_tasks(source(tmp_path, {"prompt": "Hi"}), tokenizer, 0, by_word)


@pytest.mark.parametrize(
    ("template", "kind", "stop", "said"),
    [
        (CHATML, GRPOConfig, {}, None),
        (PADDED, GRPOConfig, {}, r"ends a turn with '<pad>', .*; set gconfig.stop_token_ids=\[256\]"),
        (PADDED, GRPOConfig, {"stop_token_ids": [256]}, None),
        (CHATML.replace("<eos>", "</turn>"), GRPOConfig, {"stop": ["</turn>"]}, None),
        (PADDED, SFTConfig, {}, "is no end token of .*; name it eos_token in"),
        (ENDLESS, SFTConfig, {}, "writes nothing after an answer, so the tokenizer's end of sequence is learned"),
        (ENDLESS, GRPOConfig, {}, None),
    ],
)  # fmt: skip
def test_a_turn_that_does_not_end_where_generation_does_is_told_at_start(tmp_path, caplog, template, kind, stop, said):
    folder = str(save_tiny_llama(tmp_path))
    made(template).save_pretrained(folder)
    settings = {"actor": PPOActorConfig(path=folder), "gconfig": GenerationHyperparameters(**stop)}
    config = kind(kind="sft", model=TrainEngineConfig(path=folder)) if kind is SFTConfig else kind(**settings)
    with caplog.at_level(logging.WARNING):
        load_tokenizer(config)
    assert len(caplog.messages) == (said is not None)
    assert said is None or re.search(said, caplog.messages[0])


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer can be read from .* set tokenizer_path"):
        load_tokenizer(GRPOConfig(actor=PPOActorConfig(path=str(tmp_path))))


def test_a_task_without_a_prompt_is_no_prompt():
    with pytest.raises(PromptError, match="no token"):
        prompt_of(made(CHATML), Task("e0-r0"))


def test_a_template_for_questions_is_not_ignored_by_rows_without_one(tmp_path):
    tokenizer, chat = made(CHATML), {"messages": [USER, ASSISTANT]}
    for row in ({"text": "Once"}, chat, {"prompt": [USER], "completion": "Ho"}):
        with pytest.raises(DatasetError, match="rows.jsonl:1: prompt_template is for rows with a question"):
            load_answers(source(tmp_path, row, prompt_template="Q: {prompt}"), tokenizer, 0)
    pair = {"chosen": chat["messages"], "rejected": [USER, USER | {"role": "assistant"}]}
    with pytest.raises(DatasetError, match="prompt_template is for rows with a question"):
        load_preferences(source(tmp_path, pair, prompt_template="Q: {prompt}"), tokenizer, 0)
    with pytest.raises(DatasetError, match="prompt_template is for rows with a question"):
        load_tasks(source(tmp_path, {"text": "Once"}, prompt_template="Q: {prompt}"), tokenizer, 0)
    with pytest.raises(DatasetError, match="leave system_prompt out"):
        load_answers(source(tmp_path, {"text": "Once"}, system_prompt="Be kind."), tokenizer, 0)


def test_reasoning_that_the_template_leaves_out_is_refused(tmp_path):
    thought = source(tmp_path, {"messages": [USER, ASSISTANT | {"reasoning_content": "Why?"}]})
    with pytest.raises(DatasetError, match="leaves out the reasoning content of role 'assistant'"):
        load_answers(thought, made(CHATML), 0)
    shows = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}")
    assert learned(load_answers(thought, made(shows), 0)[0], made(shows)) == "Why?Ho<eos>"


def test_sides_that_the_template_makes_equal_prefer_nothing(tmp_path):
    rows = [{"prompt": "Hi", "chosen": "Ho", "rejected": other} for other in ("Ho ", "Ha")]
    strips = made(CHATML.replace("m.content", "m.content | trim"))
    assert [example.id for example in load_preferences(source(tmp_path, *rows), strips, 0)] == ["r1"]


def test_messages_stored_as_text_are_told_by_any_of_their_keys(tmp_path):
    stored = json.dumps([{"name": "Ann", **USER}])
    assert load_tasks(source(tmp_path, {"prompt": stored}), made(CHATML), 0)[0].messages == [{"name": "Ann", **USER}]
    with pytest.raises(DatasetError, match="json.dumps, not str"):
        load_tasks(source(tmp_path, {"prompt": str([USER])}), made(CHATML), 0)


def test_an_answer_that_the_template_leaves_out_is_refused(tmp_path):
    """However short: what is said may stand in the template's own words by chance."""
    of_parts = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    rows = source(tmp_path, {"messages": [USER | {"content": "a"}, ASSISTANT]})
    with pytest.raises(DatasetError, match="leaves out 'a' of role 'user'"):
        load_answers(rows, made(of_parts), 0)
    asks_only = CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else '' }}")
    with pytest.raises(DatasetError, match="leaves out 'Ho' of role 'assistant'"):
        load_answers(rows, made(asks_only), 0)
