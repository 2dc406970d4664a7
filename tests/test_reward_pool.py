"""Reward workers: real processes that hang, crash, exit, lie, and die with their parent."""

import asyncio
import os
import re
import subprocess
import sys
import time

import pytest
from support.rewards import by_word, length_reward

from arealite.api.errors import ConfigError, RewardError
from arealite.observe.reasons import Reasons
from arealite.reward.pool import RewardPool


@pytest.fixture(scope="module")
def pool():
    pool = RewardPool(by_word, num_workers=2, limit_s=1.0)
    yield pool
    pool.close()


def score(pool, completion, answer=""):
    return asyncio.run(pool.score("p", completion, [1], [2], answer))


def is_gone(pid, limit_s=20.0):
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.02)
    return False


def test_the_function_gets_everything_and_may_return_parts():
    pool = RewardPool(length_reward)
    try:
        result = asyncio.run(pool.score("p", "four", [1], [2, 3], "a", {"bonus": 5}))
    finally:
        pool.close()
    assert result.reward == 4.0
    assert result.parts == {"num_ids": 2.0, "extra": 5.0}


@pytest.mark.parametrize("word", ["hang", "spin"])
def test_a_call_over_the_limit_is_killed_and_the_next_one_works(pool, word):
    with pytest.raises(RewardError, match="no answer within 1.0 s"):
        score(pool, word)
    assert score(pool, "fine").reward == 1.0


@pytest.mark.parametrize(("word", "told"), [("child", "no answer within"), ("child and exit", "exit code 4")])
def test_what_the_function_started_is_killed_with_it(pool, tmp_path, word, told):
    with pytest.raises(RewardError, match=told):
        score(pool, word, str(tmp_path / "pid"))
    assert is_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(("word", "told"), [("exit", "exit code 3"), ("segfault", "signal SIGSEGV")])
def test_a_crash_is_an_error_and_not_a_hang(pool, word, told):
    with pytest.raises(RewardError, match=told):
        score(pool, word)
    assert score(pool, "fine").reward == 1.0


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("raise", r"(?s)Traceback.*by_word.*KeyError: 'no such answer'"),
        ("sys.exit", "SystemExit"),
        ("nan", "reward = nan"),
        ("inf", "reward = inf"),
        ("text", "reward = '1.0'; expected a finite number"),
        ("none", "reward = None.*returns nothing"),
        ("array", r"reward = array\(\[1., 1.\]\)"),
        ("np.nan", "reward = np.float32"),
        ("bytes", "reward = b'1'"),
        ("list", r"reward = \[1.0\]"),
        ("no_reward", 'without "reward"'),
        ("bad_part", "format = 'good'"),
    ],
)
def test_whatever_is_not_a_finite_number_is_an_error(pool, word, told):
    with pytest.raises(RewardError, match=told):
        score(pool, word)


def test_any_scalar_is_a_number():
    patient = RewardPool(by_word, limit_s=60.0)  # the function imports torch
    found = {word: score(patient, word) for word in ("np.True_", "np.float32", "0-d", "tensor")}
    patient.close()
    assert [result.reward for result in found.values()] == [1.0] * 4
    assert found["tensor"].parts == {"part": 0.5, "decimal": 0.25}


def test_the_first_failure_of_each_kind_is_told_at_once(pool, caplog, monkeypatch):
    monkeypatch.setattr("arealite.reward.pool.reasons", Reasons())
    for word in ("raise", "raise", "exit"):
        with pytest.raises(RewardError):
            score(pool, word)
    told = [r.getMessage().removesuffix(" (told once, then counted)") for r in caplog.records]
    ended = "reward errors: the worker process ended during the call (exit code 3)"
    assert told == ["reward errors: KeyError: 'no such answer'", ended]


def test_printing_and_alarms_are_allowed(pool):
    assert score(pool, "print").reward == score(pool, "alarm").reward == 1.0


def test_calls_run_side_by_side_and_workers_are_used_again(pool):
    async def many():
        return await asyncio.gather(*(pool.score("p", "pid", [], []) for _ in range(20)))

    pids = {r.reward for r in asyncio.run(many())}
    assert 1 <= len(pids) <= 2
    assert {r.reward for r in asyncio.run(many())} <= pids
    assert os.getpid() not in pids


def test_close_ends_workers_and_waiting_calls():
    pool = RewardPool(by_word, limit_s=60.0)
    pid = int(score(pool, "pid").reward)

    async def close_during_a_call():
        call = asyncio.ensure_future(pool.score("p", "hang", [], []))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(pool.close)
        with pytest.raises(RewardError):
            await call

    asyncio.run(close_during_a_call())
    assert is_gone(pid)
    with pytest.raises(RewardError, match="closed"):
        score(pool, "fine")


def test_calls_that_wait_for_a_worker_fail_when_the_pool_is_closed():
    """An error, not a cancellation: that would end the episode without a word."""
    pool = RewardPool(by_word, limit_s=60.0)
    assert score(pool, "fine").reward == 1.0

    async def close_with_a_queue():
        calls = [asyncio.ensure_future(pool.score("p", "hang", [], [])) for _ in range(3)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(pool.close)
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [type(outcome) for outcome in asyncio.run(close_with_a_queue())] == [RewardError] * 3


def test_functions_that_workers_cannot_call_are_refused_at_once():
    with pytest.raises(ConfigError, match="no lambda"):
        RewardPool(lambda *args, **extras: 1.0)
    with pytest.raises(ConfigError, match="is 5, which cannot be called"):
        RewardPool(5)
    with pytest.raises(ConfigError, match=r"signature is \(path\), but .*\(prompt, completion, .*too many positional"):
        RewardPool(os.fspath)


def test_a_signature_that_lacks_a_column_is_told_with_the_columns():
    pool = RewardPool(no_extras)
    assert pool.named_arguments("4", {}) == {"answer": "4"}
    assert pool.named_arguments(None, {"answer": "4"}) == {"answer": "4"}
    with pytest.raises(
        ConfigError, match=r"completion_ids, answer\) -> None, but .*level=\.\.\., answer=\.\.\.\): .*'level'"
    ):
        asyncio.run(pool.score("p", "c", [], [], "4", {"level": 3}))
    pool.close()


def no_extras(prompt, completion, prompt_ids, completion_ids, answer) -> None: ...


UNGUARDED = """
import asyncio
from arealite.reward.pool import RewardPool

def reward(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    return 1.0

pool = RewardPool(reward)
print(asyncio.run(pool.score("p", "c", [], [])).reward)
"""


@pytest.mark.parametrize("way", ["file", "standard input"])
def test_a_script_that_would_run_again_in_the_worker_is_refused_at_once(tmp_path, repository, way):
    (tmp_path / "script.py").write_text(UNGUARDED)
    command, env = (
        [sys.executable, "-" if way != "file" else "script.py"],
        {**os.environ, "PYTHONPATH": str(repository)},
    )
    ran = subprocess.run(
        command, input=UNGUARDED, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    told = (
        'script.py, which .* put what starts the run under `if __name__ == "__main__":`' if way == "file" else "session"
    )
    assert ran.returncode == 1 and re.search(f"ConfigError: .*{told}", ran.stderr.splitlines()[-1]), ran.stderr


SCRIPT = """
import asyncio, os, sys
from arealite.reward.pool import RewardPool

def reward(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    if completion == "pid":
        return os.getpid()
    return helper(completion)

def helper(completion):
    return float(len(completion))

if __name__ == "__main__":
    pool = RewardPool(reward)
    print(asyncio.run(pool.score("p", "four", [], [])).reward, flush=True)
    print(int(asyncio.run(pool.score("p", "pid", [], [])).reward), flush=True)
    if sys.argv[1] == "stay":
        input()
    pool.close()
"""


def start_script(tmp_path, repository, word):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.Popen(
        [sys.executable, str(script), word], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_a_function_of_the_script_itself_works(tmp_path, repository):
    out, _ = start_script(tmp_path, repository, "end").communicate(timeout=60)
    assert out.splitlines()[0] == "4.0"


def test_workers_die_with_a_killed_parent(tmp_path, repository):
    process = start_script(tmp_path, repository, "stay")
    assert process.stdout.readline() == "4.0\n"
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert is_gone(worker)
    process.stdout.close()
    process.stdin.close()


def test_an_import_that_fails_in_the_worker_is_told(tmp_path, monkeypatch):
    module = tmp_path / "only_here.py"
    module.write_text("def reward(*args, **extras):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    module.write_text("import a_module_that_does_not_exist\n")
    pool = RewardPool(only_here.reward)
    try:
        with pytest.raises(RewardError, match=r"cannot be loaded(?s:.*)a_module_that_does_not_exist"):
            score(pool, "x")
    finally:
        pool.close()


def test_a_function_that_forks_answers_once(pool):
    for word, reward in (("fork", 1.0), ("fine", 1.0)) * 3:
        assert score(pool, word).reward == reward
