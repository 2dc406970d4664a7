"""The process that runs a reward function: answers calls until its pipe closes. Started by pool.py as
`python -m arealite.reward.worker FD PARENT_PID`; imports nothing heavy by itself. What travels is plain tuples.
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
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, SupportsFloat

from arealite.reward.weighted import as_parts

PR_SET_PDEATHSIG = 1

Setup = tuple[list[str], str | None, str | None, bytes]  # sys.path, the script, its package, the pickled function
Call = tuple[tuple[str, str, list[int], list[int]], dict[str, Any]]  # arguments by position and by name
Outcome = tuple[float, dict[str, float], str]  # the reward, its parts, the text of the error


def run_call(reward_fn: Callable[..., Any], call: Call) -> Outcome:
    """Call the function; whatever it raises becomes text."""
    try:
        return told_result(reward_fn(*call[0], **call[1]))
    except BaseException:  # user code: sys.exit() or its own alarm must not end the worker, and the text is reported
        return 0.0, {}, traceback.format_exc()


def told_result(result: Any) -> Outcome:
    """What a reward function returned: a finite number or a dict of such; of anything else, text that says so."""
    values = as_parts(result)
    if "reward" not in values:
        found = sorted(map(str, values))
        return 0.0, {}, f'the reward function returned a dict without "reward": it has {found}'
    parts = {str(name): as_number(value) for name, value in values.items()}
    for name, value in values.items():
        if not math.isfinite(parts[str(name)]):
            hint = ": a branch of it returns nothing" if value is None else ""
            told = f"the reward function returned {name} = {value!r:.200}; expected a finite number{hint}"
            return 0.0, {}, told
    return parts.pop("reward"), parts, ""


def as_number(value: Any) -> float:
    """The value of whatever is one number: Python's, numpy's, a tensor of one element; NaN of anything else."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):  # an array or a tensor of several, a huge integer
        return math.nan


def load_function(setup: Setup) -> Callable[..., Any]:
    """Unpickle the function; one that the script itself defines is found by running the script under another name."""
    sys.path[:], script, package, pickled = setup
    if script is not None:
        spec = importlib.util.spec_from_file_location("__reward_main__", script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.__package__ = package
        sys.argv = [script]
        sys.modules["__main__"] = sys.modules["__reward_main__"] = module
        spec.loader.exec_module(module)
    reward_fn: Callable[..., Any] = pickle.loads(pickled)
    return reward_fn


def serve(pipe: Connection) -> None:
    """Consumes: a Setup, then Calls. Produces: an Outcome for each. Waits for: the next message of the parent process.
    Unblocked by: a message, or the pipe's end when the parent closes it or dies."""
    try:
        reward_fn = load_function(pipe.recv())
    except EOFError:
        return
    except BaseException:  # the user's module may raise anything; the parent reports the text
        pipe.send((0.0, {}, traceback.format_exc()))
        return
    pipe.send((0.0, {}, ""))
    process = os.getpid()
    with contextlib.suppress(EOFError):
        while True:
            outcome = run_call(reward_fn, pipe.recv())
            if os.getpid() != process:
                os._exit(0)  # the function forked, and the child came back too: one of them answers
            pipe.send(outcome)


if __name__ == "__main__":
    # Let the kernel kill this process when its parent dies, however that happens (Linux).
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        os._exit(1)  # it died before we asked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the parent ends us
    serve(Connection(int(sys.argv[1])))
