"""Reward functions that misbehave, importable by worker processes. Used by test_reward_pool.py and workflow tests."""

import json
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal

import numpy as np


def length_reward(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    return {"reward": len(completion), "num_ids": len(completion_ids), "extra": extras.get("bonus", 0)}


def by_trace(prompt, completion, prompt_ids, completion_ids, *, answer, level, trace, workspace):
    """Of what the command wrote, and what was recorded."""
    with open(f"{workspace}/answer.json") as file:
        written = json.load(file)["choices"][0]["message"]["content"]
    assert prompt == "add 2 and 3" and completion == written and len(trace["turns"]) == 1
    return {"reward": float(written == answer), "level": level}


def greedy_math(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    """math_reward, with a comparison that takes as many GiB as the completion's answer says; `after`: what may be had
    when it is over."""
    from arealite.reward import equality, math

    equality._equal = lambda one, other: bool(bytes(int(one) << 30))
    reward = math.math_reward(prompt, completion, prompt_ids, completion_ids, answer=answer)
    return {"reward": reward, **reward.parts, "after": len(bytes(3 << 30)) >> 30}


def without_answer(prompt, completion, prompt_ids, completion_ids, **extras):
    return float("answer" not in extras)


def by_word(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    """Does what the completion says."""
    if completion == "hang":
        while True:
            time.sleep(1)
    if completion == "spin":
        while True:
            pass
    if completion.startswith("child"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(answer, "w") as file:
            file.write(str(child.pid))
        if completion.endswith("exit"):
            os._exit(4)
        time.sleep(600)
    if completion == "raise":
        raise KeyError("no such answer")
    if completion == "exit":
        os._exit(3)
    if completion == "sys.exit":
        sys.exit(1)
    if completion == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "fork":
        return float(os.fork() != 0)
    if completion == "print":
        print("words on stdout must not disturb the protocol")
    if completion == "pid":
        return os.getpid()
    if completion == "alarm":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # raises outside a main thread
    if completion == "tensor":
        import torch

        return {"reward": torch.tensor(True), "part": torch.tensor([0.5]), "decimal": Decimal("0.25")}
    strange = {"np.True_": np.True_, "np.float32": np.float32(1), "0-d": np.array(1), "array": np.ones(2)}
    strange |= {"np.nan": np.float32("nan"), "bytes": b"1"}
    strange |= {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None, "list": [1.0]}
    strange |= {"no_reward": {"format": 1.0}, "bad_part": {"reward": 1.0, "format": "good"}}
    return strange.get(completion, 1.0)
