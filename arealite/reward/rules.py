"""Rewards for what a rule can tell: format, length, exact text, pattern, JSON schema, choice, instructions.

Used by scripts, alone or as parts of a WeightedSum. A setting is a column of the row, or fixed:
`partial(length_reward, full_tokens=200, max_tokens=400)`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

THINK_ANSWER = r"\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*"
FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)```", re.DOTALL)
# How people and models mark the option they choose; the last such mark counts.
CHOICE_MARK = re.compile(
    r"(?i:\\boxed\s*\{\s*(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?|\banswer(?:\s+is)?\s*(?::|is\b)?|答案(?:是|为|選|选)?\s*:?|选择?|<answer>)"
    r"[\s*_:(\[【「]*([A-Z])(?=\s*(?:[)\]}.:;*_】」$\\]|,(?!\s*[A-Z]\b)|</|because\b|since\b|as\b|(?![和或与、])[^\x00-\x7f]|$|\n))"
)
CHOICE_ALONE = re.compile(r"[\s*_(\[]*([A-Za-z])[\s*_)\].:]*")
CHOICE_LINE = re.compile(r"[*(]*([A-Z])[*]*[.):](?!.*\s\(?[A-Z][.)]\s)\s.*")


def format_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *,
    format_pattern: str = THINK_ANSWER, **extras: Any,
) -> float:  # fmt: skip
    """1.0 when the whole completion matches `format_pattern` (a regular expression in which . matches line ends too);
    by default one <think> block, then one <answer> block, neither empty, and nothing else."""
    return float(re.fullmatch(format_pattern, completion, re.DOTALL) is not None)


def length_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *,
    full_tokens: int, max_tokens: int, **extras: Any,
) -> float:  # fmt: skip
    """1.0 up to `full_tokens` sampled tokens, from there linearly down to 0.0 at `max_tokens`.

    Raises ValueError unless 0 <= full_tokens < max_tokens.
    """
    if not 0 <= full_tokens < max_tokens:
        raise ValueError(f"full_tokens is {full_tokens} and max_tokens {max_tokens}; expected 0 <= full < max")
    return min(1.0, max(0.0, (max_tokens - len(completion_ids)) / (max_tokens - full_tokens)))


def exact_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **extras: Any
) -> float:
    """1.0 when the completion is `answer`, but for case, white space, the width of characters and a final full stop."""
    return float(_folded(completion) == _folded(answer))


def regex_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **extras: Any
) -> float:
    """1.0 when the whole completion, without white space around it, matches the regular expression `answer`."""
    return float(re.fullmatch(answer, completion.strip(), re.DOTALL) is not None)


def json_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *,
    json_schema: dict[str, Any] | str, **extras: Any,
) -> float:  # fmt: skip
    """1.0 when the completion, or the last fenced block of it, is one JSON value that is valid by `json_schema` (a
    dict, or its JSON text).

    Raises:
        ImportError: jsonschema is not installed.
        ValueError: the schema itself is wrong.
    """
    try:
        import jsonschema  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("json_reward needs the package jsonschema: pip install 'arealite[verifiers]'") from None
    schema = json.loads(json_schema) if isinstance(json_schema, str) else json_schema
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"the row's json_schema is no JSON schema: {error.message}") from error
    values = _json_in(completion)
    return float(bool(values) and validator(schema).is_valid(values[0]))


def choice_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **extras: Any
) -> float:
    """1.0 when the completion chooses the option `answer` (a letter, "(B)" and "b" too): by the last mark ("the answer
    is B", \\boxed{B}, <answer>B), or because it is that letter alone, or one line that begins with it ("B. Paris").
    Letters that are only mentioned choose nothing.

    Raises ValueError: `answer` is no single letter.
    """
    expected = CHOICE_ALONE.fullmatch(answer)
    if expected is None:
        raise ValueError(f"the task's answer is {answer!r}; expected the letter of an option")
    alone = CHOICE_ALONE.fullmatch(completion.strip()) or CHOICE_LINE.fullmatch(completion.strip())
    *_, last = [None, *CHOICE_MARK.finditer(unicodedata.normalize("NFKC", completion))]
    chosen = alone or last
    return float(chosen is not None and chosen[1].upper() == expected[1].upper())


def instructions_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *,
    instructions: list[dict[str, Any]], **extras: Any,
) -> dict[str, float]:  # fmt: skip
    """1.0 when the completion keeps all of `instructions`; part `kept_share`: of them.

    An instruction is {kind: value}, the kinds those of INSTRUCTIONS: [{"max_words": 50}, {"contains": ["sea"]}].

    Raises ValueError: there is none, or one that is not known.
    """
    wanted = [pair for instruction in instructions for pair in instruction.items()]
    if not wanted or any(kind not in INSTRUCTIONS for kind, _ in wanted):
        known = ", ".join(INSTRUCTIONS)
        raise ValueError(
            f"the row's instructions are {instructions!r}; expected one or more {{kind: value}} of {known}"
        )
    kept = [INSTRUCTIONS[kind](completion, value) for kind, value in wanted]
    return {"reward": float(all(kept)), "kept_share": sum(kept) / len(kept)}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['\u2019-]\w+)*", text)


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]


def _bullets(text: str) -> list[str]:
    return re.findall(r"^\s*(?:[-*+•]|\d+[.)])\s+\S", text, re.MULTILINE)


def _json_in(text: str) -> list[Any]:
    """The JSON value that a text, or the last fenced block of it, is; empty if it is none."""
    *_, last = [text, *FENCE.findall(text)]
    try:
        return [json.loads(last, parse_constant=_refuse)]
    except (ValueError, RecursionError):
        return []


# What an instruction may ask of a text, and whether the text keeps it.
INSTRUCTIONS: dict[str, Callable[[str, Any], bool]] = {
    "min_words": lambda text, number: len(_words(text)) >= number,
    "max_words": lambda text, number: len(_words(text)) <= number,
    "num_paragraphs": lambda text, number: len(_paragraphs(text)) == number,
    "num_bullets": lambda text, number: len(_bullets(text)) == number,
    "contains": lambda text, words: all(word.casefold() in text.casefold() for word in words),
    "avoids": lambda text, words: not any(word.casefold() in text.casefold() for word in words),
    "starts_with": lambda text, beginning: text.strip().startswith(beginning),
    "ends_with": lambda text, end: text.strip().endswith(end),
    "avoids_commas": lambda text, asked: not asked or not re.search("[,\uff0c\u3001]", text),
    "is_lowercase": lambda text, asked: not asked or (text == text.lower() and text != text.upper()),
    "is_uppercase": lambda text, asked: not asked or (text == text.upper() and text != text.lower()),
    "is_json": lambda text, asked: not asked or bool(_json_in(text)),
}


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
