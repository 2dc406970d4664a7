"""The process that runs a reward function: answers calls until its pipe closes. Started by pool.py as
`python -m arealite.reward.worker FD PARENT_PID`; imports nothing heavy by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, SupportsFloat

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """First message to a worker. `main_path`: the script that defines the function, when it is not in a module, and
    `main_package` what its relative imports start from."""

    sys_path: list[str]
    main_path: str | None
    main_package: str | None
    reward_fn: bytes


@dataclass(frozen=True)
class Call:
    """One call of the reward function."""

    prompt: str
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]
    named: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """What came of it: a reward and its parts, or the text of the error."""

    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    error: str = ""


def checked_score(result: Any) -> Score:
    """The reward function's result as a Score; `error` is set when it is not a finite number or a dict of such."""
    values = result if isinstance(result, Mapping) else {"reward": result}
    if "reward" not in values:
        return Score(error=f'the reward function returned a dict without "reward": it has {sorted(map(str, values))}')
    numeric = {str(name): as_number(value) for name, value in values.items()}
    for name, value in values.items():
        if not math.isfinite(numeric[str(name)]):
            hint = ": a branch of it returns nothing" if value is None else ""
            return Score(error=f"the reward function returned {name} = {value!r:.200}; expected a finite number{hint}")
    reward = numeric.pop("reward")
    return Score(reward, numeric)


def as_number(value: Any) -> float:
    """The value of whatever is one number: Python's, numpy's, a tensor of one element; NaN of anything else."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):  # an array or a tensor of several, a huge integer
        return math.nan


def run_call(reward_fn: Callable[..., Any], call: Call) -> Score:
    """Call the function; whatever it raises becomes text."""
    try:
        result = reward_fn(call.prompt, call.completion, call.prompt_ids, call.completion_ids, **call.named)
        return checked_score(result)
    except BaseException:  # user code: sys.exit() or its own alarm must not end the worker, and the text is reported
        return Score(error=traceback.format_exc())


def load_function(setup: Setup) -> Callable[..., Any]:
    """Unpickle the function; one that the script itself defines is found by running the script under another name."""
    sys.path[:] = setup.sys_path
    if setup.main_path is not None:
        spec = importlib.util.spec_from_file_location("__reward_main__", setup.main_path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.__package__ = setup.main_package
        sys.argv = [setup.main_path]
        sys.modules["__main__"] = sys.modules["__reward_main__"] = module
        spec.loader.exec_module(module)
    return pickle.loads(setup.reward_fn)


def serve(pipe: Connection) -> None:
    """Consumes: a Setup, then Calls. Produces: a Score for each. Waits for: the next message of the parent process.
    Unblocked by: a message, or the pipe's end when the parent closes it or dies."""
    try:
        reward_fn = load_function(pipe.recv())
    except EOFError:
        return
    except BaseException:  # the user's module may raise anything; the parent reports the text
        pipe.send(Score(error=traceback.format_exc()))
        return
    pipe.send(Score())
    process = os.getpid()
    with contextlib.suppress(EOFError):
        while True:
            score = run_call(reward_fn, pipe.recv())
            if os.getpid() != process:
                os._exit(0)  # the function forked, and the child came back too: one of them answers
            pipe.send(score)


def die_with(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent dies, however that happens (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)  # it died before we asked


def main() -> None:
    die_with(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the parent ends us
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    # Pickle finds the records under their module's name, not under __main__.
    from arealite.reward import worker

    worker.main()
