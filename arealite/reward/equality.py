"""Whether two answers say the same: numbers exactly, structures part by part, formulas at sample points. math.py asks.

Conventions, each with rows in tests/math_pairs.jsonl: a percentage equals its fraction and, where the other side has no
sign, its number; units count when both sides have them; a list without brackets has no order; (1, 2) may be a pair or
an open interval; as a pair it is "x = 1, y = 2" and the column vector of 1 and 2, not the row; a decimal of four digits
or more equals the exact value that it rounds; a choice is its letter.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache
from string import ascii_lowercase
from typing import Any

from sympy import Expr, Rational

from arealite.reward.extraction import normal
from arealite.reward.formulas import TooCostly, check_cost, limited, read_formula, sample_pairs, samples, warm_up

MAX_PARTS = 64  # of a list, tuple or set
MIN_DIGITS = 4  # of a decimal that stands for the exact value that it rounds
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
UNITS = {
    "dollar": "$", "usd": "$", "buck": "$", "euro": "€", "pound": "£", "centimeter": "cm", "centimetre": "cm",
    "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "millimeter": "mm", "inche": "in", "inch": "in",
    "feet": "ft", "foot": "ft", "gram": "g", "kilogram": "kg", "hour": "h", "hr": "h", "minute": "min", "second": "s",
    "sec": "s", "liter": "l", "litre": "l", "degree": "°", "mile": "mi", "cent": "¢", "元": "¥", "yuan": "¥",
}  # fmt: skip
SHORT_UNITS = [
    "m", "g", "h", "s", "l", "L", "cm", "mm", "km", "kg", "mg", "ft", "in", "mi", "ml", "mL", "hr", "lb", "oz",
    "pm", "am",
]  # fmt: skip
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
PLAIN = re.compile(
    rf"([-+]?)\s*({NUMBER})(?:[eE]([-+]?\d{{1,3}})|\s*(?:\\times|\*|\u00d7|\\cdot)\s*10\s*\^\s*\{{?\s*([-+]?\d{{1,3}})\s*\}}?)?"
)
RATIO = re.compile(r"([-+]?)\s*(?:(\d+)\s+)?(-?\d+)\s*/\s*(-?\d+)")
FRAC = re.compile(r"([-+]?)\s*(\d*)\s*\\frac\{(-?\d+)\}\{(-?\d+)\}")
UNIT = r"(?:(?:square|cubic|sq\.?|per)\s+)?[a-zA-Z°€£¥¢$元米个]+(?:[\s/][a-zA-Z]+){0,3}(?:\^\{?\d\}?)?\.?"
ENVIRONMENT = re.compile(
    r"\\begin\{[pbvB]?(?:small)?matrix\}(.*)\\end\{[pbvB]?(?:small)?matrix\}|\\begin\{array\}\{[^}]*\}(.*)\\end\{array\}",
    re.S,
)
SEPARATOR = r"(?<!\d),|,(?!\d{3}(?!\d))|;|\band\b|\bor\b|和|或|\bcup\b"
NAME = re.compile(r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?|[a-zA-Z]+\([a-z]\)|[A-Za-z]+(?: [A-Za-z]+)*")
RELATION = re.compile(r"(\\leq?(?![a-z])|\\geq?(?![a-z])|<=|>=|≤|≥|<|>)")
STRANGE_DIGIT = re.compile(r"[^\W\x00-\x7f\u4e00-\u9fff]*(?![0-9])\d|[\u2460-\u24ff]")


def math_equal(a: str, b: str) -> bool:
    """Whether the answers `a` and `b` are the same; what cannot be read equals only its own text. Symmetric.

    Raises TooCostly: one of them is beyond the limits above, or comparing takes more than LIMIT_S of processor time.
    """
    for text in (a, b):
        check_cost(text)
    one, other = normal(a), normal(b)
    if not one or not other or STRANGE_DIGIT.search(one + other):
        return False
    warm_up()
    with limited():
        return bool(_equal(one, other))


def _equal(one: str, other: str) -> bool:
    """Of normal texts: by text, as choices, as structures, as numbers, then as formulas."""
    if _squeezed(one) == _squeezed(other):
        return True
    for x, y in ((one, other), (other, one)):
        if re.fullmatch(r"\(?\s*[A-J]\s*\)?", x):
            letter = re.match(r"\(?\s*([A-Ja-j])\s*(?:\)|[.:]\s|$)", y)
            return (
                letter is not None
                and letter[1].upper() == x.strip("() ")
                and not re.search(r"(?<![A-Za-z])[A-J](?![A-Za-z])", y[letter.end() :])
            )
        if (unlabelled := re.match(r"\(?[A-J]\s*[).:]\s+(?=\S)", y)) and not re.match(r"\(?[A-J]\s*[).:]\s", x):
            return _equal(x, y[unlabelled.end() :])
    structures = _structure(one), _structure(other)
    if any(s is not None for s in structures):
        return _same_structure(*structures, one, other)
    return _same_value(one, other)


def _squeezed(text: str) -> str:
    text = re.sub(r"(?<!\d)\s|\s(?!\d)|\\|(?<=\d),(?=\d{3}(?!\d))", "", text)
    return text if len(text) == 1 else text.casefold()


Structure = tuple[str, list[Any]]


def _structure(text: str) -> Structure | None:
    """(kind, parts) of a list, tuple, interval, set, union, matrix or relation; None of anything else."""
    text = re.sub(r"^(?:[a-zA-Z]\s*\\in\b|\([a-z](?:, ?[a-z])+\) ?=)\s*", "", text.strip())
    if matrix := ENVIRONMENT.fullmatch(text.strip("() ") if "array" in text else text):
        return "matrix", [row.split("&") for row in re.split(r"\\\\", matrix[1] or matrix[2]) if row.strip()]
    if text in (r"\emptyset", r"\varnothing", "∅", r"\{\}", r"\{ \}"):
        return "set", []
    if len(union := split(text, r"\\cup")) > 1:
        return "union", union
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set", split(text[2:-2], ",")
    if len(text) > 1 and text[0] in "([{" and _end(text) == len(text) - 1 and len(parts := split(text[1:-1], ",")) > 1:
        if text[0] == "[" and all(p.strip().startswith("[") and p.strip().endswith("]") for p in parts):
            return "matrix", [split(p.strip()[1:-1], ",") for p in parts]
        return ("set" if text[0] == "{" else text[0] + text[-1]), parts
    relations = RELATION.split(text)
    if len(relations) in (3, 5) and len(split(text, ",")) == 1:
        return _interval(relations)
    if len(parts := split(text, SEPARATOR)) > 1:
        return "list", [p for p in parts if p.strip()]
    if "\\pm" in text and "\\mp" not in text:
        return "list", [text.replace("\\pm", "+").lstrip(" +"), text.replace("\\pm", "-")]
    return None


def _interval(sides: list[str]) -> Structure | None:
    """The interval that `x > 2` or `1 < x \\le 3` describes, with its variable; else a relation of formulas."""
    sides = [s.strip() for s in sides]
    signs = [
        {"\\leq": "<=", "\\le": "<=", "≤": "<=", "\\geq": ">=", "\\ge": ">=", "≥": ">="}.get(s, s) for s in sides[1::2]
    ]
    values = sides[::2]
    if all(s.startswith(">") for s in signs):
        values, signs = values[::-1], [s.replace(">", "<") for s in signs[::-1]]
    if len(values) == 2 and re.fullmatch(r"[a-zA-Z]", values[0]):
        values, signs = [r"-\infty", *values], ["<", *signs]
    elif len(values) == 2 and re.fullmatch(r"[a-zA-Z]", values[1]):
        values, signs = [*values, r"\infty"], [*signs, "<"]
    if len(values) != 3 or not all(s.startswith("<") for s in signs) or not re.fullmatch(r"[a-zA-Z]", values[1]):
        return ("relation" + "".join(signs), values)
    return ("([")[signs[0] == "<="] + ")]"[signs[1] == "<="], [values[0], values[2], values[1]]


def _same_structure(a: Structure | None, b: Structure | None, one: str, other: str) -> bool:
    if a is None or b is None:
        alone, parts = (one, b) if a is None else (other, a)
        assert parts is not None
        return parts[0] in ("set", "list") and len(parts[1]) == 1 and _equal(alone, normal(parts[1][0]))
    (kind, x), (kind_of_other, y) = a, b
    if max(len(x), len(y)) > MAX_PARTS:
        raise TooCostly(f"{max(len(x), len(y))} parts")
    if kind != kind_of_other:
        (kind, x), (kind_of_other, y) = _as_tuple(a, one), _as_tuple(b, other)
        if kind == "()" == kind_of_other and len(x) != len(y):
            return False
    if kind == "matrix" == kind_of_other:
        return [len(r) for r in x] == [len(r) for r in y] and all(
            _equal(normal(p), normal(q)) for r, s in zip(x, y, strict=True) for p, q in zip(r, s, strict=True)
        )
    if "matrix" in (kind, kind_of_other):
        return False
    x, y = ([normal(str(p)) for p in parts] for parts in (x, y))
    if kind in ("set", "list", "union") and kind_of_other in ({"set", "list"} if kind != "union" else {"union"}):
        return _covers(x, y) and _covers(y, x)
    if kind != kind_of_other or (len(x) != len(y) and {len(x), len(y)} != {2, 3}):
        return False
    if len(x) == len(y) == 3 and kind[0] in "([" and re.fullmatch(r"[a-zA-Z]", x[2]) and x[2] != y[2]:
        return False
    if len(x) != len(y) and not re.fullmatch(r"[a-zA-Z]", max(x, y, key=len)[2]):
        return False
    return all(_equal(p, q) for p, q in zip(x, y, strict=False))


def _as_tuple(structure: Structure, text: str) -> Structure:
    """A column vector, or "x = 1, y = 2" of letters that follow each other, as the tuple in their order."""
    kind, parts = structure
    if kind == "matrix" and all(len(row) == 1 for row in parts):
        return "()", [row[0] for row in parts]
    found = [re.fullmatch(r"[\s$]*([a-z])\s*=([^=$]*)[\s$]*", part) for part in parts] if kind == "list" else []
    named = {point[1]: point[2] for point in found if point}
    letters = "".join(sorted(named))
    is_point = len(named) == len(parts) > 0 and letters in ascii_lowercase and not re.search(r"\bor\b|或", text)
    return ("()", [named[letter] for letter in letters]) if is_point else structure


def _covers(parts: list[str], others: list[str]) -> bool:
    return all(any(_equal(p, q) for q in others) for p in parts)


def split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators outside all brackets."""
    parts, start, depth, i, pattern = [], 0, 0, 0, re.compile(separator)
    while i < len(text):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0 and (found := pattern.match(text, i)):
            parts.append(text[start:i])
            start = i = found.end()
        else:
            i += 1
    return [*parts, text[start:]]


def _end(text: str) -> int:
    """Where the bracket that opens a text closes."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return i
    return -1


def _same_value(one: str, other: str) -> bool:
    sides_one, sides_other = (split(t, r"(?<![<>!\\])=(?!=)") for t in (one, other))
    if len(sides_one) > 1 and len(sides_other) > 1:
        return _same_equation([s.strip() for s in sides_one], [s.strip() for s in sides_other])
    if len(sides_one) > 1 or len(sides_other) > 1:
        sides, alone = (sides_one, other) if len(sides_one) > 1 else (sides_other, one)
        sides = [normal(s) for s in sides]
        names = [i for i, side in enumerate(sides) if NAME.fullmatch(side)]
        if len(names) == 1 and len(sides) == 2:
            name, value = sides[names[0]], sides[1 - names[0]]
            is_defined = not re.search(rf"(?<![a-zA-Z\\]){re.escape(name)}(?![a-zA-Z])", value)
            return is_defined and _equal(value, alone)
        rest = sides[1:] if names[:1] == [0] else sides
        return all(_equal(s, alone) for s in rest)
    return _same_quantity(one, other)


def _same_equation(one: list[str], other: list[str]) -> bool:
    """Two equations: both sides the same, or the difference of the sides the same but for a constant factor."""
    if len(one) == len(other) == 2:
        if all(map(_same_quantity, one, other)) or all(map(_same_quantity, one, other[::-1])):
            return True
        try:
            f, g = (read_formula(f"({left})-({right})") for left, right in (one, other))
        except ValueError:
            return False
        if not f.free_symbols or f.free_symbols != g.free_symbols:
            return False
        quotients = list(samples(f / g))
        return len(quotients) > 1 and all(abs(q - quotients[0]) < 1e-12 * (1 + abs(q)) for q in quotients)
    return len(one) == len(other) and all(map(_same_quantity, one, other))


def _same_quantity(one: str, other: str) -> bool:
    """Numbers, percentages and units by their exact values; what is no number as a formula."""
    bases = [re.fullmatch(r"\(?(\w+?)\)?_\{?(\d+)\}?", t) for t in (one, other)]
    if bases[0] and bases[1]:
        return bases[0].groups() == bases[1].groups()
    (x, unit_x), (y, unit_y) = _quantity(one.strip()), _quantity(other.strip())
    if x is None and y is None:
        return _same_formula(one, other)
    if unit_x and unit_y and unit_x != unit_y:
        return False
    if x is not None and y is not None:
        if (unit_x == "%") != (unit_y == "%"):
            percent, plain = (x, y) if unit_x == "%" else (y, x)
            return plain in (percent, percent / 100)
        return x == y or _rounds_to(one, x, y) or _rounds_to(other, y, x)
    number, text, formula = (x, one, other) if x is not None else (y, other, one)
    assert number is not None
    try:
        value = read_formula(_without_unit(formula))
    except ValueError:
        return False
    if value.free_symbols:
        return False
    (exact, *_) = [*samples(value), None]
    if exact is None:
        return False
    if abs(exact - Rational(number.numerator, number.denominator)) <= abs(exact) * Rational(1, 10**25):
        return True
    return (
        not exact.is_Rational
        and abs(exact.as_real_imag()[1]) < 1e-20
        and _rounds_to(text, number, _fraction(exact.as_real_imag()[0]))
    )


def _fraction(value: Expr) -> Fraction:
    exact = Rational(str(value))
    return Fraction(int(exact.p), int(exact.q))


def _rounds_to(text: str, decimal: Fraction, exact: Fraction) -> bool:
    """Whether `text` is a decimal of enough digits which is `exact` rounded, `exact` itself being no such decimal."""
    found = re.search(r"(\d*)\.(\d+)", text)
    if found is None or "/" in text or "\\frac" in text or "e" in text.lower() or ("10" in text and "^" in text):
        return False
    remaining = exact.denominator
    for prime in (2, 5):
        while remaining % prime == 0:
            remaining //= prime
    is_endless = remaining > 1 or exact.denominator > 10**20
    digits = len((found[1] + found[2]).lstrip("0"))
    return is_endless and digits >= MIN_DIGITS and abs(decimal - exact) * 2 <= Fraction(1, 10 ** len(found[2]))


@cache
def _quantity(text: str) -> tuple[Fraction | None, str]:
    """The exact value of a number as people write it, and its unit ("%", "cm^2", ""); (None, "") of anything else."""
    if text.casefold() in WORDS:
        return Fraction(WORDS.index(text.casefold())), ""
    text = re.sub(r"^(?:about|approximately|exactly|only|approx\.?|\\approx|约)\s*", "", text)
    money = re.match(r"([-+]?)\s*([$€£¥])\s*(?=[-\d.(\\])", text)
    unit = money[2] if money else ""
    text = money[1] + text[money.end() :] if money else text
    text = text[1:-1].strip() if text[:1] == "(" and _end(text) == len(text) - 1 else text
    for pattern in (RATIO, FRAC, PLAIN):
        if not (found := pattern.match(text)):
            continue
        rest = text[found.end() :].strip()
        rest = re.sub(r"^-(?=[a-z])", "", rest)
        if rest and not (rest == "%" or re.fullmatch(UNIT, rest)):
            continue
        short = re.match(r"[a-zA-Z]{1,2}(?![a-zA-Z])", rest)
        if short and short[0] not in SHORT_UNITS:
            continue
        value = _number(pattern, found)
        return (value, _unit(rest) or unit) if value is not None else (None, "")
    return None, ""


def _number(pattern: re.Pattern[str], found: re.Match[str]) -> Fraction | None:
    sign = -1 if found[1] == "-" else 1
    if pattern is PLAIN:
        exponent = int(found[3] or found[4] or 0)
        return sign * Fraction(found[2].replace(",", "").rstrip(".")) * Fraction(10) ** exponent
    if int(found[4]) == 0:
        return None
    return sign * (int(found[2] or 0) + Fraction(int(found[3]), int(found[4])))


def _unit(text: str) -> str:
    text = re.sub(r"^(?:of|in) ", "", text.rstrip("."))
    text = re.sub(r"\b(?:square|sq\.?) (\w+)", r"\1^2", re.sub(r"\bcubic (\w+)", r"\1^3", text))
    text = re.sub(r"\^\{(\d)\}", r"^\1", re.sub(r"\s*/\s*|\s+per\s+", "/", text))
    words = re.split(r"([\s/^])", text)
    singular = [w if len(w) < 3 else w.casefold().removesuffix("s") for w in words]
    return "".join(UNITS.get(w, w) for w in singular).strip()


def _without_unit(text: str) -> str:
    return re.sub(
        r"^\s*[$€£¥](?=[\d\\])|(?<=[\d}i\s])\s*(?:°|%|\b(?:cm|mm|km|units?|inches|feet|meters|square \w+)\b"
        r"(?:\^\{?\d\}?)?)\s*$",
        "",
        text,
    )


def _same_formula(one: str, other: str) -> bool:
    one, other = _without_unit(one), _without_unit(other)
    if _is_prose(one) or _is_prose(other):
        words = [re.sub(r"^(?:the|an?) |[^\w ]", "", t.casefold()).strip() for t in (one, other)]
        return words[0] == words[1] != ""
    try:
        f, g = read_formula(one), read_formula(other)
    except ValueError:
        return False
    if f == g:
        return len(one) > 1 or one == other
    if f.free_symbols != g.free_symbols:
        return False
    pairs = list(sample_pairs(f, g))
    return bool(pairs) and all(abs(p - q) <= 1e-18 * (abs(p) + abs(q)) + 1e-24 for p, q in pairs)


def _is_prose(text: str) -> bool:
    """Whether a text is words rather than a formula: a word of three letters that is no LaTeX command or function."""
    return bool(re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}|[\u4e00-\u9fff]|[a-zA-Z]{2} [a-zA-Z]{2}", text))
