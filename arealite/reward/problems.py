"""Rows of code data sets as problems (LiveCodeBench, APPS, TACO, HumanEval, MBPP are read as they come), and programs
out of what a model wrote. Called by code.py.
"""

from __future__ import annotations

import ast
import base64
import builtins
import io
import json
import pickle
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from arealite.reward.sandbox import ProcessLimits

FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = ("", "python", "python3", "py")
# What LiveCodeBench's starter code takes for granted.
IMPORTS = """from typing import *
from collections import *
from itertools import *
from functools import *
from heapq import *
from bisect import *
import collections, math, random, re, string
"""


@dataclass(frozen=True)
class CodeProblem:
    """What a program is asked.

    `kind` "stdin": each test is (input text, expected output); "call": (arguments, expected value) of the function
    `entry`, which may be Class.method; "check": (code that checks, "passed"), which calls `entry`. `preamble`: what
    stands before the program: imports, helpers, and the signature that a base model continues.
    """

    kind: Literal["stdin", "call", "check"]
    tests: tuple[tuple[Any, Any], ...]
    entry: str = ""
    preamble: str = ""
    limits: ProcessLimits = field(default_factory=ProcessLimits)


def problem_of(row: Mapping[str, Any]) -> CodeProblem:
    """The problem of a data set's row, told by its columns:

    - `input_output` (APPS, TACO; a dict or its JSON): "inputs", "outputs", and "fn_name" for calls;
    - `public_test_cases`, `private_test_cases`, `metadata` (LiveCodeBench; private ones may be packed);
    - `test`, `entry_point` and `code_prompt` or `prompt` (HumanEval);
    - `test_list`, `test_setup_code` or `test_imports` (MBPP).

    Raises ValueError: none of them, or tests that cannot be read.
    """
    try:
        if row.get("input_output"):
            return _apps(row)
        if row.get("public_test_cases") or row.get("private_test_cases"):
            return _live_code_bench(row)
        if row.get("test") and row.get("entry_point"):
            prompt = str(row.get("code_prompt") or row.get("prompt") or "")
            entry = str(row["entry_point"])
            return CodeProblem("check", ((f"{row['test']}\ncheck({entry})", "passed"),), entry, prompt)
        if row.get("test_list"):
            return _mbpp(row)
    except (KeyError, TypeError, AttributeError, SyntaxError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"the row's tests cannot be read: {type(error).__name__}: {error}") from error
    raise ValueError(
        f"the row has the columns {', '.join(map(str, row)) or 'none'}; expected tests in input_output,"
        " public_test_cases, test with entry_point, or test_list"
    )


def extract_program(completion: str) -> str:
    """The last fenced block of Python (or of no named language) after the last </think>; without fences the whole text,
    if that is Python; else "". A fence that is never closed holds all that follows."""
    text = completion.rpartition("</think>")[2]
    blocks = [code for language, code in FENCE.findall(text) if language.lower() in PYTHON]
    if blocks:
        return str(blocks[-1])
    if FENCE.search(text):
        return ""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    return text if any(not isinstance(node, ast.Expr) for node in tree.body) or called_names(tree) else ""


def load_problems_with_testcase_batch(
    id2info: Mapping[str, Mapping[str, Any]], query_ids: Sequence[str], test_case_batch_size: int | None = None
) -> dict[str, list[CodeProblem]]:
    """{query id: its problem}, cut into some of at most `test_case_batch_size` tests. Raises ValueError, KeyError."""
    loaded = {}
    for query in query_ids:
        problem = problem_of(id2info[query])
        size = test_case_batch_size or len(problem.tests)
        cuts = range(0, len(problem.tests), size)
        loaded[query] = [replace(problem, tests=problem.tests[start : start + size]) for start in cuts]
    return loaded


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _apps(row: Mapping[str, Any]) -> CodeProblem:
    tests = _json(row["input_output"])
    inputs, outputs, entry = tests["inputs"], tests["outputs"], tests.get("fn_name") or row.get("fn_name")
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(
            f"input_output has {len(inputs)} inputs and {len(outputs)} outputs; expected as many of each, some"
        )
    limit_s = float(row.get("timeout") or ProcessLimits.limit_s)
    memory = int(row.get("memory") or 0) << 20 or ProcessLimits.memory_bytes
    limits = ProcessLimits(limit_s=limit_s, memory_bytes=memory)
    preamble = str(row.get("starter_code") or "") if not entry else ""
    if not entry:
        lines = ["\n".join(map(str, text)) if isinstance(text, list) else str(text) for text in (*inputs, *outputs)]
        return CodeProblem(
            "stdin", tuple(zip(lines[: len(inputs)], lines[len(inputs) :], strict=True)), "", preamble, limits
        )
    is_method = "class Solution" in str(row.get("starter_code") or "")
    # APPS wraps the expected value of some calls into a list.
    return CodeProblem(
        "call", tuple(zip(inputs, outputs, strict=True)), f"Solution.{entry}" if is_method else entry, "", limits
    )


def _live_code_bench(row: Mapping[str, Any]) -> CodeProblem:
    cases = [*_json(row.get("public_test_cases") or []), *_packed(row.get("private_test_cases") or [])]
    entry = (_json(row.get("metadata") or {}) or {}).get("func_name")
    if not cases:
        raise ValueError("public_test_cases and private_test_cases are empty")
    if cases[0].get("testtype", "stdin") == "stdin":
        return CodeProblem("stdin", tuple((case["input"], case["output"]) for case in cases))
    tests = tuple(
        ([json.loads(line) for line in case["input"].splitlines() if line.strip()], json.loads(case["output"]))
        for case in cases
    )
    is_method = "class Solution" in str(row.get("starter_code") or "class Solution")
    return CodeProblem("call", tests, f"Solution.{entry}" if is_method else str(entry), IMPORTS)


def _mbpp(row: Mapping[str, Any]) -> CodeProblem:
    tests = [str(test) for test in _json(row["test_list"])]
    setup = "\n".join(_json(row["test_imports"])) if row.get("test_imports") else str(row.get("test_setup_code") or "")
    names = [name for test in tests for name in called_names(ast.parse(test)) if name not in vars(builtins)]
    known = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(setup))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    entry = next(name for name in names if name not in known)
    return CodeProblem("check", tuple((f"{setup}\n{test}", "passed") for test in tests), entry)


def called_names(tree: ast.AST) -> list[str]:
    """Names of the functions that are called, in the order of the text."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [
        node.func.id
        for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset))
        if isinstance(node.func, ast.Name)
    ]


class _TextOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"packed tests hold {module}.{name}; expected text")


def _packed(cases: Any) -> list[dict[str, Any]]:
    """LiveCodeBench's private tests: JSON, or base64 of zlib of a pickled text of it."""
    if not isinstance(cases, str):
        return list(cases)
    try:
        return list(json.loads(cases))
    except ValueError:
        return list(json.loads(_TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(cases)))).load()))
