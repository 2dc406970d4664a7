"""Which tokens of a row are learned, rows of preferences, and what is said of rows that cannot be used."""

import itertools
import json
import logging

import numpy as np
import pytest
from transformers import AutoTokenizer

from arealite.api.cli_args import DatasetConfig, SFTConfig
from arealite.api.errors import DatasetError
from arealite.dataset.examples import load_answers, load_preferences, pack_examples
from arealite.dataset.loader import StatefulDataLoader

USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("user", "What is 2?"), ("assistant", "Two. ")))


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def rows_in(folder, *rows, **settings) -> DatasetConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetConfig(path=str(path), **settings)


def spans(example, tokenizer, side=0) -> list[tuple[bool, str]]:
    """Runs of tokens that are learned or not, as text."""
    tokens, mask = example.tokens[side], example.loss_mask[side]
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    return [(bool(mask[a]), tokenizer.decode(tokens[a:b])) for a, b in itertools.pairwise(borders)]


def test_only_answers_are_learned(tmp_path, tokenizer):
    sure = [USER, ASSISTANT, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]
    asked, chat, raw = (
        load_answers(rows_in(tmp_path, row, **settings), tokenizer, 0)[0]
        for row, settings in (
            (
                {"question": "1 + 1?", "answer": "It is\n#### 2"},
                {"system_prompt": "Be brief", "prompt_template": "{prompt} Think."},
            ),
            ({"messages": sure}, {"system_prompt": "Be brief"}),
            ({"text": "Once"}, {}),
        )
    )
    system = "<|im_start|>system\nBe brief<|im_end|>\n"
    assert spans(asked, tokenizer) == [
        (False, f"{system}<|im_start|>user\n1 + 1? Think.<|im_end|>\n<|im_start|>assistant\n"),
        (True, "It is\n#### 2<|im_end|>"),
    ]
    assert spans(chat, tokenizer) == [
        (False, f"{system}<|im_start|>user\nWhat is 2?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Two. <|im_end|>"),
        (False, "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Yes<|im_end|>"),
    ]
    assert raw.loss_mask[0].tolist() == [False] + [True] * (len(raw.tokens[0]) - 1)
    assert raw.tokens[0][-1] == tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    plain = load_answers(rows_in(tmp_path, {"messages": [USER, ASSISTANT]}), tokenizer, 0)[0]
    assert plain.tokens[0][: len(ids)].tolist() == ids  # what the model is asked with is what it was trained on


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_one(tmp_path, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [USER, ASSISTANT, USER, {"role": "assistant", "content": "Still two"}]
    example = load_answers(rows_in(tmp_path, {"messages": turns}), tokenizer, 0)[0]
    assert [text for is_learned, text in spans(example, tokenizer) if is_learned] == ["<think>Still two<|im_end|>"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}!"
    with pytest.raises(DatasetError, match=r"rows.jsonl:1: the chat template does not put the last answer"):
        load_answers(rows_in(tmp_path, {"messages": turns}), tokenizer, 0)


def test_preferences_in_three_forms(tmp_path, tokenizer):
    dialogue = "\n\nHuman: What is 2?\n\nAssistant: {}"
    sides = [[USER, {"role": "assistant", "content": text}] for text in ("Two.", "Dunno.")]
    source = rows_in(
        tmp_path,
        {"prompt": "What is 2?", "chosen": "Two.", "rejected": "Dunno."},
        {"chosen": dialogue.format("Two."), "rejected": dialogue.format("Dunno.")},
        {"chosen": sides[0], "rejected": sides[1]},
    )
    found = load_preferences(source, tokenizer, 0)
    for example in found:
        for side, text in enumerate(("Two.", "Dunno.")):
            *answer, added = example.tokens[side].tolist()
            assert tokenizer.decode(answer).endswith(f"assistant\n{text}<|im_end|>") and added == 0
            assert np.flatnonzero(example.loss_mask[side]).tolist() == [len(answer)]
    batch = pack_examples(found, [4, 0, 2], 5)
    assert batch.rewards.tolist() == [1, 0] * 3 and batch.group_ids.tolist() == [4, 4, 0, 0, 2, 2]
    assert batch.num_groups == 5 and batch.num_sequences == 6 and batch.tokens[batch.cu_seqlens[1:] - 1].sum() == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?"}, "rows.jsonl:2: no answer: found the columns question"),
        ({"messages": [USER]}, "rows.jsonl:2: messages does not end with an assistant's turn"),
        (
            {"messages": [USER, {"role": "assistant"}]},
            r"rows.jsonl:2: messages\[1\] \(assistant\) has a content that is",
        ),
    ],
)
def test_malformed_answers_are_named(tmp_path, tokenizer, row, said):
    with pytest.raises(DatasetError, match=said):
        load_answers(rows_in(tmp_path, {"messages": [USER, ASSISTANT]}, row), tokenizer, 0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "?", "chosen": "a"}, "rows.jsonl:1: no rejected"),
        (
            {"prompt": "?", "chosen": "a", "rejected": "a"},
            "nothing to use: 1 have an empty .* or two equal sides, the",
        ),
        ({"chosen": "a", "rejected": "b"}, "rows.jsonl:1: no question"),
        ({"chosen": [USER], "rejected": [USER, ASSISTANT]}, "chosen does not end with an assistant's turn"),
    ],
)
def test_malformed_preferences_are_named(tmp_path, tokenizer, row, said):
    with pytest.raises(DatasetError, match=said):
        load_preferences(rows_in(tmp_path, row), tokenizer, 0)


def test_long_rows_are_counted_and_left_out(tmp_path, tokenizer, caplog):
    rows = [{"question": "Why?", "answer": "word " * n} for n in (1, 50, 2)]
    with caplog.at_level(logging.WARNING):
        kept = load_answers(rows_in(tmp_path, *rows, max_length=30), tokenizer, 0)
    assert [e.id for e in kept] == ["r0", "r2"]
    assert "1 of 3 rows are left out: 1 exceed max_length (30), the first is" in caplog.text
    with pytest.raises(DatasetError, match="nothing to use: 3 exceed max_length \\(3\\)"):
        load_answers(rows_in(tmp_path, *rows, max_length=3), tokenizer, 0)


def test_pairs_that_prefer_nothing_are_counted_and_left_out(tmp_path, tokenizer, caplog):
    asked = "\n\nHuman: a\n\nAssistant:"
    sides = [(" b", " c"), (" b", ""), (" b", " b"), (" b\n\nHuman: c", " d")]
    rows = [{name: asked + text for name, text in zip(("chosen", "rejected"), pair, strict=True)} for pair in sides]
    with caplog.at_level(logging.WARNING):
        assert [e.id for e in load_preferences(rows_in(tmp_path, *rows), tokenizer, 0)] == ["r0"]
    assert "3 of 4 rows" in caplog.text and "rows.jsonl:2" in caplog.text


def test_examples_are_drawn_like_tasks(tmp_path, tokenizer):
    source = rows_in(tmp_path, *({"text": f"row {i}"} for i in range(5)))
    source.batch_size = 2
    examples = load_answers(source, tokenizer, 0)
    loader, other = (StatefulDataLoader(examples, SFTConfig(train_dataset=source)) for _ in range(2))
    first = [next(loader).id for _ in range(7)]
    other.load_state_dict(loader.state_dict())
    assert next(other).id == next(loader).id and first[5].startswith("e1-") and loader.steps_per_epoch == 3
