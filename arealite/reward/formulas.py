"""Formulas as sympy reads them, their values at sample points, and the limits of what an answer may cost.

Called by equality.py and math.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import threading
import time
from collections.abc import Iterator
from functools import cache

import psutil
from latex2sympy2_extended import latex2sympy
from sympy import Basic, Expr, I, Rational

from arealite.reward.extraction import MAX_LENGTH

LIMIT_S = 1.0  # of processor time of the comparing thread: the verdict does not depend on how busy the machine is
MEMORY_BYTES = 2 << 30  # of address space that a comparison may add to its process
POINTS = (Rational(17, 13), Rational(-19, 11), Rational(31, 23), Rational(-7, 29), Rational(41, 17), Rational(3, 31))
MAX_DEPTH, MAX_DIGITS, MAX_EXPONENT = 25, 200, 5_000  # of what a parser is given


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


class _Stop(BaseException):
    """Raised in a thread that has used its time; not an Exception, since libraries swallow those."""


@cache
def read_formula(text: str) -> Expr:
    """The formula as sympy reads it. Raises ValueError where it is none."""
    if re.search(r"[^\x20-\x7e\n]", text):
        raise ValueError(text)
    text = re.sub(r"_(\d+|[a-z])(?![\w}])", r"_{\1}", text)
    text = re.sub(r"(\d),(?=\d{3}(?!\d))", r"\1", text)
    try:
        is_complex = re.search(r"(?<![a-zA-Z\\])i(?![a-zA-Z])", text) is not None
        formula = latex2sympy(text, is_real=not is_complex, convert_degrees=False, normalization_config=None)
    except MemoryError:  # of `limited`
        raise
    except Exception as error:  # the parser of a library: whatever it raises means that this is no formula
        raise ValueError(text) from error
    if not isinstance(formula, Expr):
        raise ValueError(text)
    return formula.subs({s: I for s in formula.free_symbols if str(s) == "i"})


def samples(*formulas: Expr) -> Iterator[Expr]:
    for values in _tuples(formulas):
        yield values[0]


def sample_pairs(f: Expr, g: Expr) -> list[tuple[Expr, Expr]]:
    """Values of both formulas at points where both are real; where that is so at one point only, at all of them."""
    pairs = [(p, q) for p, q in _tuples((f, g))]
    real = [(p, q) for p, q in pairs if all(abs(x.as_real_imag()[1]) < 1e-20 for x in (p, q))]
    return real if len(real) > 1 or (not f.free_symbols and real) else pairs


def _tuples(formulas: tuple[Expr, ...]) -> Iterator[tuple[Expr, ...]]:
    symbols = sorted({s for f in formulas for s in f.free_symbols}, key=str)
    for shift in range(len(POINTS) if symbols else 1):
        point: dict[Basic, Rational] = {s: POINTS[(shift + 2 * i) % len(POINTS)] + i for i, s in enumerate(symbols)}
        try:
            values = tuple(f.subs(point).doit().evalf(40) for f in formulas)
        except MemoryError:  # of `limited`
            raise
        except Exception:  # a library's arithmetic at a point where a formula has no value
            continue
        if all(v.is_number and v.is_finite for v in values):
            yield values


@cache
def warm_up() -> None:
    """The parser builds its tables at the first formula; that time is nobody's answer's."""
    for formula in (r"\frac{x}{2}+\sqrt{3}", r"\sin x^2", r"e^{2}"):
        read_formula(formula)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise TooCostly in this thread when it has used LIMIT_S of processor time, which another thread watches, or when
    its process grows by MEMORY_BYTES. The second only in a process without other threads, as reward workers are: the
    system's limit would be theirs too."""
    is_alone = threading.active_count() == 1
    thread = threading.get_ident()
    clock = time.pthread_getcpuclockid(thread)
    end = time.clock_gettime(clock) + LIMIT_S
    lock, done = threading.Lock(), threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            if time.clock_gettime(clock) > end:
                with lock:
                    if not done.is_set():
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stop))
                return

    watcher = threading.Thread(target=watch, name="math limit", daemon=True)
    watcher.start()
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if is_alone:
            largest = psutil.Process().memory_info().vms + MEMORY_BYTES
            others = [limit for limit in before if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min([largest, *others]), before[1]))
        yield
    except (_Stop, RecursionError, MemoryError, OverflowError) as error:
        told = f"comparing took more than {LIMIT_S} s, or more than {MEMORY_BYTES >> 30} GiB of memory"
        raise TooCostly(told) from error
    finally:
        with lock:
            done.set()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
        if is_alone:
            resource.setrlimit(resource.RLIMIT_AS, before)
        watcher.join()  # so that the next comparison finds no other thread
