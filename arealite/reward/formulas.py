"""Formulas as sympy reads them, their values at sample points, and the limit of time. Called by equality.py."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
import time
from collections.abc import Iterator
from functools import cache

from latex2sympy2_extended import latex2sympy
from sympy import Basic, Expr, I, Rational

from arealite.reward.spelling import TooCostly

LIMIT_S = 1.0  # of processor time of the comparing thread: the verdict does not depend on how busy the machine is
POINTS = (Rational(17, 13), Rational(-19, 11), Rational(31, 23), Rational(-7, 29), Rational(41, 17), Rational(3, 31))


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
    """Raise TooCostly in this thread when it has used LIMIT_S of processor time, which another thread watches."""
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

    threading.Thread(target=watch, name="math limit", daemon=True).start()
    try:
        yield
    except (_Stop, RecursionError, MemoryError, OverflowError) as error:
        raise TooCostly(f"comparing took more than {LIMIT_S} s, or too much memory") from error
    finally:
        with lock:
            done.set()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
