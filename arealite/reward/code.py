"""Rewards for programs: what a model wrote is run against a row's tests in a sandbox. Used by scripts and data sets.

Expected outputs never get where the program runs: it is given inputs, and what comes back is compared here. What rows
may look like stands in problems.py.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from functools import partial
from math import inf, isclose
from typing import Any, Literal

from arealite.api.errors import RewardError
from arealite.reward.plain_values import decode, encode
from arealite.reward.problems import CodeProblem, extract_program, load_problems_with_testcase_batch, problem_of
from arealite.reward.sandbox import Ended, ProcessLimits, Sandbox, SandboxError, Stopped, call, check

logger = logging.getLogger(__name__)

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?", re.ASCII)
RELATIVE = 1e-6  # of numbers that are printed with a fraction or an exponent
MAX_SHOWN = 300  # characters of an error
WHOLE_LIMIT_S = 10.0  # of a reward: below rollout.reward_timeout_s, so that a slow program is a zero and no error

Reason = Literal["passed", "no code", "wrong answer", "timeout", "crash", "output", "files"]


@dataclass(frozen=True)
class Verdict:
    """Of one program: `reason` of the first test that failed, `told`: what was seen there; `sandbox`: its kind."""

    reason: Reason
    num_passed: int
    num_tests: int
    told: str = ""
    sandbox: str = ""


def grade(problem: CodeProblem, program: str, sandbox: Sandbox | RemoteSandbox, whole_limit_s: float = inf) -> Verdict:
    """Run the tests until the first that fails, or until all have taken `whole_limit_s` together, which is a timeout.

    Raises SandboxError: nothing is known about the program.
    """
    verdict = partial(Verdict, num_tests=len(problem.tests), sandbox=sandbox.kind)
    if not program.strip():
        return verdict("no code", 0)
    whole = _whole(problem, program)
    deadline = time.monotonic() + whole_limit_s
    for number, (given, expected) in enumerate(problem.tests):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return verdict("timeout", number, told=f"all tests together may take {whole_limit_s:g} s")
        problem = replace(problem, limits=replace(problem.limits, limit_s=min(problem.limits.limit_s, left_s)))
        if problem.kind == "stdin":
            ended = sandbox.run(whole, str(given).encode(errors="replace"), problem.limits)
            reason, told = _failure(ended)
            if not reason and not same_output(ended.stdout.decode(errors="replace"), str(expected)):
                reason, told = "wrong answer", ended.stdout[:MAX_SHOWN].decode(errors="replace")
        elif isinstance(sandbox, RemoteSandbox):
            reason, told = sandbox.called(problem, whole, given, expected)
        elif problem.kind == "call":
            reason, told = _called(problem, whole, given, expected, sandbox)
        else:
            job = {"code": given, "preamble": problem.preamble, "entry": problem.entry}
            said, end = check(sandbox, whole, job, problem.limits)
            reason, told = ("", "") if said == expected else ("wrong answer", said)
            if reason and end is not None and any(_failure(end)):
                reason, told = _failure(end)
        if reason:
            return verdict(reason, number, told=told)
    return verdict("passed", len(problem.tests))


def code_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], **row: Any
) -> dict[str, float]:
    """1.0 when the completion's program passes all tests of the row, else 0.0; the row's columns as `problem_of` has
    them. Parts: 1.0 for what happened (passed, wrong_answer, timeout, crash, output, files, no_code).

    Raises:
        ValueError: the row has no tests that can be read.
        SandboxError: there is no sandbox, or it broke.
    """
    verdict = grade(problem_of(row), extract_program(completion), _sandbox_of_process(), WHOLE_LIMIT_S)
    reasons = ("passed", "wrong answer", "timeout", "crash", "output", "files", "no code")
    parts = {reason.replace(" ", "_"): float(verdict.reason == reason) for reason in reasons}
    return {"reward": parts["passed"], **parts}


def code_verify(
    id2info: Mapping[str, Mapping[str, Any]],
    generateds: Sequence[str],
    query_ids: Sequence[str],
    num_workers: int | None = None,
    url: str | None = None,
) -> list[Verdict]:
    """The verdict of each generated text on the problem of its query id, `num_workers` (the CPU cores) at a time, each
    in a sandbox of its own; with `url`, by the SandboxFusion service there. In the order of `generateds`.

    Raises:
        ValueError: a row has no tests that can be read, or there are not as many ids as texts.
        SandboxError: there is no sandbox, or one broke twice with the same program.
    """
    if len(generateds) != len(query_ids):
        raise ValueError(f"{len(generateds)} texts and {len(query_ids)} query ids; expected as many of each")
    problems = {query: parts[0] for query, parts in load_problems_with_testcase_batch(id2info, query_ids).items()}
    num_workers = num_workers or len(os.sched_getaffinity(0))
    queue = enumerate(zip(query_ids, generateds, strict=True))  # taken from by all; `next` of it is atomic
    verdicts: dict[int, Verdict] = {}

    def work(_: int) -> None:
        sandbox: Sandbox | RemoteSandbox = Sandbox() if url is None else RemoteSandbox(url)
        try:
            for place, (query, text) in queue:
                try:
                    verdicts[place] = grade(problems[query], extract_program(text), sandbox)
                except SandboxError as error:
                    logger.warning("a sandbox broke and is made anew: %s", error)
                    sandbox.close()
                    sandbox = Sandbox() if url is None else RemoteSandbox(url)
                    verdicts[place] = grade(problems[query], extract_program(text), sandbox)
        finally:
            sandbox.close()

    with ThreadPoolExecutor(num_workers, thread_name_prefix="sandbox") as threads:
        list(threads.map(work, range(min(num_workers, len(generateds)))))
    return [verdicts[place] for place in range(len(generateds))]


class RemoteSandbox:
    """The same by a SandboxFusion service at `url` (POST /run_code). Checks of the kind "check" are refused: there they
    would lie beside the program."""

    kind = "remote"

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def close(self) -> None:
        """Nothing is kept open."""

    def run(self, code: str, stdin: bytes, limits: ProcessLimits) -> Ended:
        """As Sandbox.run. Raises SandboxError."""
        body = {
            "code": code, "language": "python", "stdin": stdin.decode(errors="replace"), "run_timeout": limits.limit_s,
            "memory_limit_MB": limits.memory_bytes >> 20,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/run_code", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=2 * limits.limit_s + 30) as answer:
                said = json.load(answer)
            if said["status"] == "SandboxError":
                raise SandboxError(f"{self.url}: {said.get('message')}")
            ran = said["run_result"]
            why = "timeout" if ran["status"] == "TimeLimitExceeded" else ""
            out, err = (str(ran.get(name) or "").encode(errors="replace") for name in ("stdout", "stderr"))
            code_number = ran.get("return_code")
            return Ended(
                why, 1 if code_number is None else int(code_number), float(ran.get("execution_time") or 0), out, err
            )
        except (OSError, ValueError, KeyError, TypeError, urllib.error.URLError) as error:
            raise SandboxError(f"{self.url}/run_code: {type(error).__name__}: {error}") from error

    def called(self, problem: CodeProblem, program: str, arguments: list[Any], expected: Any) -> tuple[str, str]:
        """As `_called`: the value comes back behind a mark on its standard output."""
        if problem.kind == "check":
            raise RewardError("tests that are code need a sandbox here: a remote one would show them to the program")
        mark, place = secrets.token_hex(16), problem.entry.replace(".", "().", 1)
        tail = f"\nimport json as _j, sys as _s\nprint('\\n{mark}' + _j.dumps({place}(*_j.loads(_s.stdin.read()))))\n"
        ended = self.run(program + tail, json.dumps(arguments).encode(), problem.limits)
        reason, told = _failure(ended)
        if reason:
            return reason, told
        try:
            value = json.loads(ended.stdout.decode(errors="replace").rpartition(mark)[2])
        except ValueError:
            return "wrong answer", "it returned nothing that is JSON"
        return ("", "") if same_value(value, expected) else ("wrong answer", repr(value)[:MAX_SHOWN])


def same_output(written: str, expected: str) -> bool:
    """Equal line by line, but for white space at the ends and how a number is written. Digits are ASCII's: look-alikes
    are other characters."""
    lines, wanted = ([line.split() for line in text.strip().splitlines()] for text in (written, expected))
    return len(lines) == len(wanted) and all(
        len(line) == len(want) and all(map(_same_word, line, want)) for line, want in zip(lines, wanted, strict=True)
    )


def same_value(value: Any, expected: Any) -> bool:
    """Equal as plain values: lists and tuples are the same, True is not 1, floats up to 1e-9 of their size."""
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        keys = {str(key): key for key in expected}  # JSON has text keys only
        return len(value) == len(expected) and all(
            str(key) in keys and same_value(entry, expected[keys[str(key)]]) for key, entry in value.items()
        )
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        if isinstance(value, int) and isinstance(expected, int):
            return value == expected
        try:
            return isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9)
        except OverflowError:
            return False
    return type(value) is type(expected) and bool(value == expected)


def _same_word(word: str, want: str) -> bool:
    if word == want:
        return True
    if len(word) > 400 or not (NUMBER.fullmatch(word) and NUMBER.fullmatch(want)):
        return False
    try:
        one, other = Decimal(word), Decimal(want)
    except InvalidOperation:
        return False
    is_exact = re.fullmatch(r"[-+]?\d+", want) is not None
    return one == other if is_exact else abs(one - other) <= Decimal(RELATIVE) * max(Decimal(1), abs(other))


def _called(
    problem: CodeProblem, program: str, arguments: list[Any], expected: Any, sandbox: Sandbox
) -> tuple[str, str]:
    """Why the call failed, and what was seen; empty when the value is the expected one."""
    try:
        answer = call(sandbox, program, problem.entry, encode(arguments), problem.limits)
        if "raised" in answer:
            return "crash", f"{answer['raised']}: {answer.get('text')}"[:MAX_SHOWN]
        value = decode(answer["value"])
    except Stopped as stopped:
        reason, told = _failure(stopped.ended)
        return reason or "crash", told or "it ended before it answered"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "wrong answer", "it answered nonsense"
    return ("", "") if same_value(value, expected) else ("wrong answer", repr(value)[:MAX_SHOWN])


def _failure(ended: Ended) -> tuple[Any, str]:
    """The reason, and the last lines of what it told; empty when the program ended well."""
    told = ended.stderr[-MAX_SHOWN:].decode(errors="replace").strip()
    if ended.why in ("timeout", "output", "files"):
        return ended.why, told
    if ended.code == -24:  # SIGXCPU
        return "timeout", told
    return ("crash", told or f"exit code {ended.code}") if ended.code else ("", "")


def _whole(problem: CodeProblem, program: str) -> str:
    """The program with what stands before it; a base model continues the preamble's signature."""
    entry = problem.entry.partition(".")[0]
    if not problem.preamble or not entry:
        return f"{problem.preamble}\n{program}"
    signature = re.compile(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(entry)}\b", re.MULTILINE)
    if not signature.search(program):
        return problem.preamble + program
    start = signature.search(problem.preamble)
    return f"{problem.preamble[: start.start()] if start else problem.preamble}\n{program}"


_own: Sandbox | None = None


def _sandbox_of_process() -> Sandbox:
    """One per reward worker, which ends with it."""
    global _own
    if _own is None:
        _own = Sandbox()
        logger.info("programs run in a sandbox of the kind %s", _own.kind)
    return _own
