"""Runs reward functions with a hard time limit: `def` in worker processes, `async def` in an event loop of its own.
Called by workflows.

A process, because only a process can be ended: a parser in an endless loop does not notice a thread's time limit, and
libraries that use signals (math-verify) work only in a main thread. What is `async def` waits for others (a judge, a
reward model), so many of its calls run at the same time.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

from arealite.api.errors import ConfigError, RewardError, WaitTimeout
from arealite.observe.loop_thread import LoopBlocked, SideLoop
from arealite.observe.reasons import last_line, reasons
from arealite.observe.waits import waiting
from arealite.reward.weighted import WeightedSum, is_async
from arealite.reward.worker import Call, Outcome, Setup, told_result

START_LIMIT_S = 120.0  # a worker may import torch for the function's sake
END_LIMIT_S = 5.0
CLOSED = "the reward workers are closed"
GUARD = 'if __name__ == "__main__":'
EXPECTED = "def reward(prompt, completion, prompt_ids, completion_ids, *, answer, **extras)"
TOO_SLOW = "Make the reward function faster, or raise rollout.reward_timeout_s"
RETRY_DELAY_S = 0.5  # before a failed call is made again; twice as long each time

Result = float | dict[str, float]
RewardFunction = Callable[..., Result | Awaitable[Result]]


@dataclass(frozen=True)
class Score:
    """A reward and its named parts, all finite."""

    reward: float
    parts: dict[str, float] = field(default_factory=dict)


class RewardPool:
    """Runs `reward_fn(prompt, completion, prompt_ids, completion_ids, answer=..., **extras)`.

    Args:
        reward_fn: `def`: picklable by its module's name (a function at the top of a module or of the script), run in
            worker processes. `async def`: run in an event loop of its own. A WeightedSum may hold both.
        num_workers: processes; started when first needed.
        limit_s: of one call, imports not counted. A worker that passes it is killed and replaced.
        num_retries: times a call that failed is made again, RETRY_DELAY_S later and then twice as long each time.

    Raises:
        ConfigError: worker processes cannot get at the function, or it is not one that they can call.
    """

    def __init__(
        self, reward_fn: RewardFunction, num_workers: int = 1, limit_s: float = 15.0, num_retries: int = 0
    ) -> None:
        self.num_retries = num_retries
        self._signature = _signature_of(reward_fn)
        functions = reward_fn.split() if isinstance(reward_fn, WeightedSum) else [reward_fn]
        self._runners = [
            _Coroutines(function, limit_s) if is_async(function) else _Processes(function, num_workers, limit_s)
            for function in functions
        ]
        self._is_closed = False

    async def score(
        self,
        prompt: str,
        completion: str,
        prompt_ids: list[int],
        completion_ids: list[int],
        answer: str | None = "",
        extras: dict[str, Any] | None = None,
    ) -> Score:
        """The reward of one answer and its named parts, all finite. The function gets no `answer` where it is None.

        Raises:
            ConfigError: the function does not take these arguments.
            RewardError: the function raised (with its traceback), returned something that is not a finite number,
                passed the limit, its process died, each time that it was tried, or the pool is closed.
        """
        call = (prompt, completion, prompt_ids, completion_ids), self.named_arguments(answer, extras or {})
        num_failures = 0
        while True:
            try:
                scores = await asyncio.gather(*(runner.run(call) for runner in self._runners))
                return Score(sum(s.reward for s in scores), {k: v for s in scores for k, v in s.parts.items()})
            except RewardError as error:
                if self._is_closed:
                    raise
                num_failures += 1
                if num_failures > self.num_retries:
                    reasons.tell("reward errors", last_line(str(error)))
                    raise
                reasons.count("reward retries", last_line(str(error)))
                await asyncio.sleep(RETRY_DELAY_S * 2 ** (num_failures - 1))

    def named_arguments(self, answer: str | None, extras: dict[str, Any]) -> dict[str, Any]:
        """What the function is given by name. Raises ConfigError when it does not take it."""
        named = extras if answer is None else {**extras, "answer": answer}
        try:
            if self._signature is not None:
                self._signature.bind("", "", [], [], **named)
        except TypeError as error:
            raise _not_callable(self._signature, named, error) from error
        return named

    def close(self) -> None:
        """End all workers; calls that wait fail with RewardError. May be called again, from any thread."""
        self._is_closed = True
        for runner in self._runners:
            runner.close()


class _Coroutines:
    """Calls of an `async def` function, side by side in a loop of their own: what blocks holds up no rollout."""

    def __init__(self, reward_fn: RewardFunction, limit_s: float) -> None:
        self._reward_fn, self._limit_s = reward_fn, limit_s
        self._loop = SideLoop("the event loop of the `async def` reward functions")

    async def run(self, call: Call) -> Score:
        """Consumes: one call. Waits for: its coroutine, `limit_s`, and a little longer for the loop to turn."""
        if self._loop.is_closed:
            raise RewardError(CLOSED)
        try:
            return _score_of(await self._loop.run(self._call(call), "reward.call", self._limit_s))
        except LoopBlocked as error:
            raise RewardError(
                f"no answer within {self._limit_s} s, and {error}. Make it `def`, or await what it waits for"
            ) from error
        except WaitTimeout as error:
            raise RewardError(f"no answer within {self._limit_s} s; {TOO_SLOW}") from error
        except asyncio.CancelledError:
            if self._loop.is_closed:
                raise RewardError(CLOSED) from None
            raise

    async def _call(self, call: Call) -> Outcome:
        try:
            result = await cast(Awaitable[Result], self._reward_fn(*call[0], **call[1]))
        except RewardError as error:
            return 0.0, {}, str(error)
        except Exception:  # user code; the text is reported
            return 0.0, {}, traceback.format_exc()
        return told_result(result)

    def close(self) -> None:
        self._loop.close()


class _Processes:
    """Calls of a `def` function, each in one of `num_workers` processes."""

    def __init__(self, reward_fn: RewardFunction, num_workers: int, limit_s: float) -> None:
        self._limit_s = limit_s
        self._setup = _setup_for(reward_fn)
        self._lock = threading.Lock()
        self._alive: set[_Worker] = set()
        self._is_closed = False
        # One thread per worker waits on its pipe. The threads also are the workers' parents in the kernel's eyes, so
        # they must live as long as the pool does: worker processes die with the thread that started them.
        self._of_thread = threading.local()
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="reward")

    async def run(self, call: Call) -> Score:
        with self._lock:
            if self._is_closed:
                raise RewardError(CLOSED)
            future = self._threads.submit(self._call, call)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._is_closed and future.cancelled():
                raise RewardError(CLOSED) from None  # `close` cancelled it, not our caller
            raise

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            workers = list(self._alive)
        for worker in workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _call(self, call: Call) -> Score:
        """One call on this thread's worker, which is started when there is none, and given up when it fails."""
        worker: _Worker | None = vars(self._of_thread).get("worker")
        try:
            if worker is None:
                worker = self._of_thread.worker = _Worker()
                with self._lock:
                    self._alive.add(worker)
                    is_closed = self._is_closed
                if is_closed:
                    raise RewardError(CLOSED)
                worker.set_up(self._setup)
            outcome = worker.exchange(call, self._limit_s, "reward.call")
        except RewardError:
            if worker is not None:
                worker.kill()
                with self._lock:
                    self._alive.discard(worker)
            self._of_thread.worker = None
            raise
        return _score_of(outcome)


def _score_of(outcome: Outcome) -> Score:
    reward, parts, error = outcome
    if error:
        raise RewardError(error)
    return Score(reward, parts)


class _Worker:
    """One process and the pipe to it. Used by one thread at a time; `kill` may come from another."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "arealite.reward.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                start_new_session=True,  # so that what the function starts can be killed with it
            )

    def set_up(self, setup: Setup) -> None:
        _, script, _, _ = setup
        _, _, error = self.exchange(setup, START_LIMIT_S, "reward.start")
        if error:
            ran = f" (a worker runs {script} again: what is to run once belongs under `{GUARD}`)" if script else ""
            raise RewardError(f"the reward function cannot be loaded in a worker process:\n{error.rstrip()}{ran}")

    def kill(self) -> None:
        """Kill the process and whatever it started, and reap it. Until it is reaped its id belongs to nobody else."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(END_LIMIT_S)

    def exchange(self, message: Setup | Call, limit_s: float, name: str) -> Outcome:
        try:
            with waiting(name, f"reward worker {self.process.pid}", limit_s):
                self.pipe.send(message)
                if not self.pipe.poll(limit_s):
                    raise RewardError(f"no answer within {limit_s} s; the worker process was killed. {TOO_SLOW}")
                outcome: Outcome = self.pipe.recv()
                return outcome
        except (EOFError, OSError) as error:
            # It is about to end: wait without reaping it, else the reason would be our own SIGKILL.
            with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(self.process.pid)) as ended:
                wait([ended.fileno()], END_LIMIT_S)
            self.kill()
            code = self.process.returncode
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            raise RewardError(f"the worker process ended during the call ({how})") from error


def _setup_for(reward_fn: RewardFunction) -> Setup:
    try:
        pickled = pickle.dumps(reward_fn)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the reward function {reward_fn!r} cannot be sent to a worker process ({error}); define it with `def` at"
            " the top of a module or of the script: no lambda, no function inside a function"
        ) from error
    if b"__main__" not in pickled:
        return list(sys.path), None, None, pickled
    main = vars(sys.modules["__main__"])
    path = main.get("__file__")
    if path is None or not Path(path).is_file():
        raise ConfigError(
            "the reward function is defined in a session (notebook, prompt or standard input) that worker processes"
            " cannot run: write it into a file, and import it from there"
        )
    if not _is_guarded(Path(path)):
        raise ConfigError(
            f"the reward function is defined in {path}, which each reward worker runs again to find it, and nothing"
            f" keeps the rest of the script from running there too: put what starts the run under `{GUARD}`, or the"
            " function into a module of its own"
        )
    return list(sys.path), path, main.get("__package__"), pickled


def _is_guarded(script: Path) -> bool:
    """Whether something in the script depends on `__name__`'s being "__main__"."""
    compared = [node for node in ast.walk(ast.parse(script.read_bytes())) if isinstance(node, ast.Compare)]
    return any("__name__" in (text := ast.unparse(node)) and "__main__" in text for node in compared)


def _signature_of(reward_fn: RewardFunction) -> inspect.Signature | None:
    """None where Python does not know it (functions of compiled modules)."""
    if not callable(reward_fn):
        raise ConfigError(f"the reward function is {reward_fn!r}, which cannot be called: write {EXPECTED}")
    try:
        signature = inspect.signature(reward_fn)
    except ValueError:
        return None
    try:
        signature.bind_partial("", "", [], [])
    except TypeError as error:
        raise _not_callable(signature, {}, error) from error
    return signature


def _not_callable(signature: inspect.Signature | None, named: dict[str, Any], error: TypeError) -> ConfigError:
    given = ", ".join(["prompt", "completion", "prompt_ids", "completion_ids", *(f"{name}=..." for name in named)])
    return ConfigError(
        f"the reward function's signature is {signature}, but it is called with ({given}): {error}. Write {EXPECTED}"
    )
