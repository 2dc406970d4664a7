"""One spelling for an answer, and what is not to be given to a parser. Called by equality.py and math.py."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from arealite.reward.extraction import MINUS, extract_answer

MAX_LENGTH, MAX_DEPTH, MAX_DIGITS, MAX_PARTS = 1_000, 25, 200, 64
MAX_EXPONENT = 5_000
FULL_WIDTH = re.compile(r"[\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff5e\u3000]")


class TooCostly(Exception):
    """An answer whose grading would take too long or too much memory; the text says what it has."""


def check_cost(text: str) -> None:
    """Raise TooCostly for what is not to be given to a parser: length, depth, digits, powers of powers, factorials."""
    if len(text) > MAX_LENGTH:
        raise TooCostly(f"{len(text)} characters; the limit is {MAX_LENGTH}")
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH or re.search(rf"\d{{{MAX_DIGITS}}}", text) or text.count("\\frac") > MAX_DEPTH:
        raise TooCostly("nesting or digits beyond the limit")
    if re.search(r"\d{4,}[\s}\\)\]]*!|![\s}\\)\]]*!|\)\s*!.*\)\s*!|\^[^a-z]*!", text):
        raise TooCostly("a huge factorial")
    powers = [_exponent(text, caret.end()) for caret in re.finditer(r"\^|\*\*", text)]
    for power in powers:
        numbers = [int(n) for n in re.findall(r"\d+", power)]
        product = 1
        for number in numbers:
            product *= max(number, 1)
        is_tower = re.search(r"\d[\s)}]*(?:\^|\*\*)", power) and max(numbers) > 4
        if product > MAX_EXPONENT or is_tower or power.count("^") + power.count("**") > 1 or "binom" in power:
            raise TooCostly("a tower of powers")
    outer = 1
    for raised in re.finditer(r"[)}]\s*(?:\^|\*\*)\s*\{?\s*(\d+)", text):
        outer *= max(int(raised[1]), 1)
    if outer > MAX_EXPONENT or re.search(r"\\(?:binom|sum|prod|int)[^a-z].*\d{4,}", text):
        raise TooCostly("powers, sums or binomials of huge numbers")


def _exponent(text: str, start: int) -> str:
    rest = text[start:].lstrip()
    if not rest.startswith(("{", "(")):
        return (re.match(r"\\?[-+]?\w+(?:\s*(?:\^|\*\*)\s*[{(]?\w+)*", rest) or [""])[0]
    depth = 0
    for i, character in enumerate(rest):
        depth += (character in "{(") - (character in "})")
        if depth == 0:
            more = re.match(r"[})\s]*(?:\^|\*\*).*", rest[i + 1 :]) if rest[0] == "(" else None
            return rest[: i + 1] + (more[0] if more else "")
    return rest


def normal(text: str) -> str:
    """One spelling for what LaTeX, Markdown and Unicode write in several."""
    text = _ascii(text).translate(MINUS).strip().strip("*`_ \n").replace("\\$", "$")
    if "\\boxed" in text or "\\fbox" in text:
        text = extract_answer(text, "boxed") or text
    text = re.sub(r"^\$\$?(.*?)\$?\$$|^\\[(\[](.*)\\[)\]]$", lambda m: m[1] or m[2] or "", text, flags=re.S).strip()
    for pattern, spelling in SPELLINGS:
        text = pattern.sub(spelling, text)
    text = text.strip().rstrip(".,;: \u3002").strip() if not text.endswith("...") else text
    return re.sub(r"^\{([^{},]*)\}$", r"\1", text)


def _ascii(text: str) -> str:
    """Full-width punctuation as ASCII; digits and letters that only look like ASCII stay, and equal nothing."""
    return FULL_WIDTH.sub(lambda mark: unicodedata.normalize("NFKC", mark[0]), text)


def _root(found: re.Match[str]) -> str:
    return rf"\sqrt{{{next(group for group in found.groups() if group is not None)}}}"


def _repeating(found: re.Match[str]) -> str:
    """0.1(23)... as a fraction."""
    whole, once, again = found[1] or "0", found[2], found[3]
    bottom = (10 ** len(again) - 1) * 10 ** len(once)
    return rf"\frac{{{int(whole + once + again) - int(whole + once)}}}{{{bottom}}}"


SPELLINGS: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"(?<=\d),?\s*(?:\\!|\\,)\s*(?=\d{3}(?!\d))", ""),
        (r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|,|!|;|:|quad|qquad|limits)(?![a-zA-Z])", " "),
        (r"\\ |~|\u00a0", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{(?:[^{}]|\{[^{}]*\})*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}", r"\\frac{\1}{\2}"),
        (r"\{,\}", ","),
        (r"\\(?:text|textbf|mathrm|mbox|mathbf|textit|operatorname|mathit|textrm)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\%|\bpercent\b|percentage|\uff05", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|º", "°"),
        (r"\\infin\b|∞|\binfinity\b", r"\\infty "),
        (r"√\s*\(([^()]*)\)|√\s*\{?(\d+)\}?|(?<![\\a-z])sqrt\s*\(([^()]*)\)|(?<![\\a-z])sqrt\s*\{([^{}]*)\}", _root),
        (r"π|(?<![\\a-zA-Z])pi(?![a-z])", r"\\pi "),
        (r"²", "^2"), (r"³", "^3"), (r"½", r"\\frac{1}{2}"), (r"¼", r"\\frac{1}{4}"), (r"¾", r"\\frac{3}{4}"),
        (r"\u00d7", r"\\times "), (r"÷", "/"), (r"·", r"\\cdot "), (r"≤", r"\\le "), (r"≥", r"\\ge "),
        (r"\u222a", r"\\cup "),
        (r"±", r"\\pm "), (r"∈", r"\\in "), (r"\\lbrace", r"\\{"), (r"\\rbrace", r"\\}"), (r"\\l?vert|\\r?vert", "|"),
        (r"\\begin\{[bvB]matrix\}", r"\\begin{pmatrix}"), (r"\\end\{[bvB]matrix\}", r"\\end{pmatrix}"),
        (r"(?<![\\a-zA-Z])(sin|cos|tan|cot|sec|csc|ln|log|exp|arcsin|arccos|arctan)(?=[\s({\d^_])", r"\\\1"),
        (r"\\(sin|cos|tan|cot|sec|csc)\s*[({]?\s*(\d+(?:\.\d+)?)\s*°\s*[)}]?", r"\\\1(\\frac{\2\\pi}{180})"),
        (r"(\d*)\.(\d*)\\overline\s*\{\s*(\d{1,20})\s*\}", _repeating),
        (r"(?<![\w.,])\d{1,3}(?: \d{3})+(?![\w,])", lambda number: number[0].replace(" ", "")),
        (r"(?i)\b(?:one|a)[- ]half\b", "1/2"), (r"(?i)\bone[- ]third\b", "1/3"), (r"(?i)\bone[- ]quarter\b", "1/4"),
        (r"\*\*", "^"), (r"(?<=[\w)}])\s*\*\s*(?=[\w(\\{])", r" \\cdot "), (r"\s+\^", "^"), (r"[ \t\n]+", " "),
    )
]  # fmt: skip
