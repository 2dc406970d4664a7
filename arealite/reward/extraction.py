"""What counts as the answer of a completion, by a named policy, and one spelling for it; imports nothing heavy.

Called by math.py, equality.py, number.py, and by evaluation/figures.py for majority votes.

| policy | the answer |
|---|---|
| `boxed` | the last `\\boxed{}`; without one there is none |
| `marked` | the last box, else what follows the last mark: `####`, `<answer>`, "the answer is", "Answer:", or Chinese |
| `final` | the same, else the last formula between dollars or number of the last line that has one |

A `####` or `<answer>` after the last box comes before it. Text up to `</think>` is no answer, nor is thinking that does
not end. Without box or `####`, a question or a denial ("is not 10") answers nothing. What a mark gives is the whole
phrase: "5 or 6" is two numbers and equals neither.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Literal, get_args

Policy = Literal["boxed", "marked", "final"]
MAX_TEXT = 200_000  # characters at the end of a completion that are looked at
MAX_LENGTH = 1_000  # characters of an answer that is read
MAX_NESTED_BOXES = 5
BOX = re.compile(r"\\f?box(?:ed)?\s*(?:\{|(?=[\d\w\\$(-]))")
TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.S | re.I)
# What follows the mark of a heading is text ("#### Step 2: add"), or a number that counts headings ("#### 2. Add").
HASHES = re.compile(
    r"(?:^|(?<=\s))####[ *]*+(?!(?:step|part|case|solution|explanation)\b|\d+[.:)] +\S)([^\n]*)", re.M | re.I
)
PHRASE = re.compile(
    r"(?:\b(?:final |correct |right )?(?:answer|result|solution)(?: to [^.\n:]{1,80}| choice| option)?"
    r"(?:\s*is(?: that)?(?![\w'])|\s*[:=]|\s*would be)|\b(?:correct|right) (?:choice|option) is"
    r"|(?:最终|正确|最后)?(?:答案|结果|选项)(?:应该|应当|应)?\s*(?:是|为|选|[:\uff1a])|故选|因此选|所以选)"
    r"\s*[:\uff1a]?\s*(?:\*\*)?\s*(?=([^\n]*))",
    re.I,
)
# Between dollars, the second of which is no currency: "$5 and $7" are two amounts.
FORMULA = re.compile(
    r"\$\$?([^$\n]{1,2000})\$\$?(?!\d)|\\\(((?:(?!\\\)).){1,2000})\\\)|\\\[((?:(?!\\\]).){1,2000})\\\]", re.S
)
NUMBER_OR_FRACTION = re.compile(
    r"(?:(?<![\w)}.])[-+]\s?)?\\?[$€£¥]?(?:\\[dt]?frac\{-?\d+\}\{-?\d+\}|(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?"
    r"(?:\s?/\s?\d+)?|\.\d+)(?:\s?\\?%)?"
)
BARE = re.compile(r"[(\[{][^\nA-Za-z?]{1,80}[)\]}]")  # a tuple, interval or set and nothing else
QUESTION = ("?", "\uff1f")
EITHER = re.compile(r"\bor\b|或")
MANY_BRACKETS = re.compile(r"[(\[{]{30}|[)\]}]{30}")
DENIAL = re.compile(
    r"\bnot\b|n['\u2019]t\b|\bnever\b|\bno\b(?!\.)|\bneither\b|\bcannot\b|\bwrong\b|\bincorrect\b|\bunknown\b|\bimpossible\b|不是|不等|不对|错误|并非|不为",
    re.I,
)
FULL_WIDTH = re.compile(r"[\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff5e\u3000]")
MINUS = dict.fromkeys(map(ord, "\u2212\u2013\u2012\ufe63\uff0d"), "-")  # what typesetters use for it


def extract_answer(text: str, policy: Policy = "final") -> str | None:
    """The answer that `text` gives, as written; None if it gives none.

    Raises ValueError: there is no policy of that name.
    """
    if policy not in get_args(Policy):
        raise ValueError(f"the policy is {policy!r}; expected one of {', '.join(get_args(Policy))}")
    text = _said(text[-MAX_TEXT:]).translate(MINUS)
    boxed, box_start = last_box(text)
    if policy == "boxed":
        return boxed
    for pattern in (HASHES, TAG):
        marks = [mark for mark in pattern.finditer(text) if mark[1].strip()]
        if marks and marks[-1].start() > box_start:
            return _sentence(marks[-1][1])
    if boxed is not None:
        return boxed
    phrases = list(PHRASE.finditer(text))
    if phrases:
        answer = _sentence(phrases[-1][1])
        start = max(text.rfind(end, 0, phrases[-1].start()) for end in ("\n", ". ", "。", "! "))
        denied = DENIAL.search(text[start + 1 : phrases[-1].start()]) or DENIAL.match(answer)
        return None if denied or phrases[-1][1].rstrip().endswith(QUESTION) or not answer else _formula_in(answer)
    return _last_value(text) if policy == "final" else None


def last_box(text: str) -> tuple[str | None, int]:
    """What is inside the last outermost box, without boxes around it alone, and where it starts; else (None, -1)."""
    inside, start, end = None, -1, -1
    for box in BOX.finditer(text):
        if box.start() < end:
            continue
        if not box[0].endswith("{"):
            bare = re.compile(r"\\[dt]?frac\s*\{?\d+\}?\{?\d+\}?|-?[\w.,]+|\$[^$]*\$").match(text, box.end())
            inside, start, end = bare[0] if bare else None, box.start(), box.end()
            continue
        end = _closing(text, box.end())
        inside, start = text[box.end() : end], box.start()
    for _ in range(MAX_NESTED_BOXES):
        nested = BOX.match((inside or "").strip())
        if inside is None or nested is None or not nested[0].endswith("{"):
            break
        inside = inside.strip()
        close = _closing(inside, nested.end())
        if inside[close + 1 :].strip():
            break
        inside = inside[nested.end() : close]
    return (inside.strip() if inside is not None else None), start


def _closing(text: str, start: int) -> int:
    """Where the brace that is open at `start` closes; an open one ends with its line."""
    depth = 1
    for brace in re.finditer(r"\\?[{}]|\n\n", text[start:]):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0 or brace[0] == "\n\n":
            return start + brace.start()
    return len(text)


def _said(text: str) -> str:
    """What comes after the thinking; nothing if the thinking does not end."""
    before, ended, after = text.rpartition("</think>")
    return after if ended else before if before else "" if "<think>" in text else text


def _sentence(text: str) -> str:
    """A marked phrase up to the end of its sentence, without what decorates it."""
    text = re.split(
        r"(?<=[^.\s])[.!?](?=\s+[A-Z\u4e00-\u9fff]|\s*$)|[。;]|(?<!\d),?\s+(?:because|since|so|which|as)\b",
        text,
        maxsplit=1,
    )[0]
    text = re.sub(r"(?<=\S)\*\*(?=[\s.,:]|$)", "", text.strip().strip("*_`").strip())
    return re.sub(r"\s*\((?:which|because|since|that)\b[^()]*\)\s*$", "", text)


def _formula_in(phrase: str) -> str:
    """The formula of a phrase that has one and says nothing else that could be an answer, else the phrase."""
    formulas = list(FORMULA.finditer(phrase))
    rest = FORMULA.sub(" ", phrase)
    if len(formulas) == 1 and not re.search(r"\d|\b(?:or|and)\b|或|和", rest):
        return next(group for group in formulas[0].groups() if group)
    return phrase


def _last_value(text: str) -> str | None:
    """The last formula or number of the last line that has one; None where that line asks or denies."""
    if BARE.fullmatch(text.strip()):
        return text.strip()
    for line in reversed(text.strip().splitlines()):
        values = [*FORMULA.finditer(line)] or [*NUMBER_OR_FRACTION.finditer(line)]
        if MANY_BRACKETS.search(line):
            return None
        if not values:
            if line.rstrip().endswith(QUESTION):
                return None
            continue
        start = max(line.rfind(end, 0, values[-1].start()) for end in (". ", "! ", "。", "? "))
        clause = line[start + 1 :]
        if DENIAL.search(clause) or (len(values) > 1 and EITHER.search(clause)) or clause.rstrip().endswith(QUESTION):
            return None
        return next((group for group in values[-1].groups() if group), values[-1][0])
    stripped = text.strip()
    return stripped if stripped and len(stripped) <= 80 and not DENIAL.search(stripped) else None


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
