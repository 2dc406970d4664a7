"""The evaluator: what counts, what is written, beside the trainer, several ranks, the report before / after."""

import io
import json
import re
import threading
import time
from dataclasses import asdict

import pytest
from rich.console import Console
from support.ranks import Alone, Meeting, on_ranks

from arealite.api.atomic import read_jsonl
from arealite.api.errors import ArealiteError, RewardError
from arealite.api.run_args import StatsLoggerConfig
from arealite.api.types import Group, Task, Trajectory
from arealite.cli import main
from arealite.evaluation import evaluator as evaluator_module
from arealite.evaluation.evaluator import Evaluator
from arealite.observe.progress import Progress
from arealite.observe.reasons import reasons
from arealite.observe.records import read_evaluations
from arealite.observe.run_folder import RunFolder
from arealite.observe.stats_logger import StatsLogger
from arealite.observe.summary import report
from arealite.rollout import share

TASKS = [Task(id=f"e0-r{i}", messages=[{"role": "user", "content": f"{i}+1="}], answer=str(i + 1)) for i in range(4)]


class Rollout:
    """Answers with the given rewards; a list per task, None is a failed reward."""

    def __init__(self, rewards, before=lambda: None):
        self.rewards, self.before, self.calls = rewards, before, 0

    def run_groups(self, tasks, workflow):
        self.calls += 1
        self.before()
        return [
            Group(task, i, [self.answer(task, m, r) for m, r in enumerate(self.rewards[i])])
            for i, task in enumerate(tasks)
            if self.rewards[i] is not None
        ]

    def answer(self, task, member, reward):
        status, error = ("ok", "") if reward is not None else ("reward_error", "ValueError: bad verifier")
        return Trajectory(
            task.id, member, [1, 2], [False, True], [0.0, -1.0], [-1, 0], reward, "stop", status,
            prompt_text="<user>?", completion_text=f"answer {reward}", error=error,
            statistics={"num_turns": member + 1},
        )  # fmt: skip


def make(folder, rewards, collective=None, tasks=TASKS, **rollout):
    head = Rollout(rewards, **rollout)
    return Evaluator(RunFolder(folder), head, None, tasks, collective or Alone()), head


def test_errors_are_not_zeros(tmp_path):
    evaluator, _ = make(tmp_path, [[1.0], [None], [0.0], None])
    result = evaluator.evaluate(0)
    assert result.accuracy == 0.5 and 0 < result.low < 0.2 and 0.8 < result.high < 1 and result.versions == [0]
    assert (result.num_tasks, result.num_tasks_scored, result.num_samples) == (4, 2, 2)
    assert (result.num_reward_errors, result.num_failed) == (1, 1)
    rows = read_jsonl(RunFolder(tmp_path).evaluation(0))
    assert [row["reward"] for row in rows] == [1.0, None, 0.0]
    assert rows[0]["question"] == "0+1=" and rows[1]["error"].startswith("ValueError")
    assert read_evaluations(RunFolder(tmp_path)) == [asdict(result)]


def test_tasks_weigh_the_same_whatever_their_samples(tmp_path):
    evaluator, _ = make(tmp_path, [[1.0, 1.0, 1.0, 1.0], [0.0, None, None, 0.0]], tasks=TASKS[:2])
    result = evaluator.evaluate(3)
    assert result.accuracy == 0.5
    assert result.pass_at == {1: 0.5, 2: 0.5}


def test_partly_right_answers_count_for_the_mean_and_not_for_pass_at_k(tmp_path):
    evaluator, _ = make(tmp_path, [[1.0, 0.5, 0.0, 0.0], [0.5] * 4, [1.25, 0.0, 1.0, 0.0, 1.0, 1.0]], tasks=TASKS[:3])
    result = evaluator.evaluate(1)
    assert result.accuracy == pytest.approx((1.5 / 4 + 0.5 + 4.25 / 6) / 3)
    assert result.pass_at == pytest.approx({1: (1 / 4 + 4 / 6) / 3, 2: (1 / 2 + 14 / 15) / 3, 4: (1 + 1) / 3})


def test_nothing_scored_is_an_error_with_the_reason(tmp_path):
    evaluator, _ = make(tmp_path, [[None]] * 4)
    with pytest.raises(RewardError, match="none of the 4 held-out tasks .* bad verifier"):
        evaluator.evaluate(0)
    assert read_evaluations(RunFolder(tmp_path)) == []


def test_the_same_step_is_not_asked_twice(tmp_path):
    evaluator, head = make(tmp_path, [[1.0]] * 4)
    assert evaluator.evaluate(9) is evaluator.evaluate(9) and head.calls == 1
    metrics = evaluator.evaluate(9).metrics()
    assert metrics["accuracy"] == metrics["accuracy_high"] == 1.0 > metrics["accuracy_low"] and metrics["step"] == 9
    assert metrics["workflow_num_turns"] == 1.0


def test_the_trainer_goes_on_beside_an_evaluation(tmp_path):
    """`begin` returns while nothing is answered; `finish` waits for all of it, once. Until then the result is owed."""
    asked, waits = threading.Event(), []
    evaluator, head = make(tmp_path, [[1.0]] * 4, before=lambda: waits.append(asked.wait(5)))
    owed = RunFolder(tmp_path).owed_evaluation(3)
    assert evaluator.finish() is None
    evaluator.begin(3)
    assert owed.is_file() and read_evaluations(RunFolder(tmp_path)) == []
    with pytest.raises(ArealiteError, match="after step 3 is still running"):
        evaluator.begin(4)
    asked.set()
    assert evaluator.finish().step == 3 and evaluator.finish() is None and head.calls == 1
    assert waits == [True], "the answers had to wait for what the trainer does after begin()"
    assert not owed.exists() and read_evaluations(RunFolder(tmp_path))[0]["step"] == 3


def test_ranks_wait_in_short_waits_and_get_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setattr(share, "BEAT_S", 0.0)
    ranks = Meeting(3)

    monkeypatch.setattr(evaluator_module, "LOOK_S", 0.02)
    evaluators = [make(tmp_path, [[1.0]] * 4, collective=ranks.of(r), before=lambda: time.sleep(0.3)) for r in range(3)]
    outcomes = on_ranks(ranks, lambda rank: evaluators[rank][0].evaluate(5))
    assert outcomes[0].accuracy == 1.0 and outcomes[1] == outcomes[0] == outcomes[2]
    assert [head.calls for _, head in evaluators] == [1, 0, 0]
    assert ranks.num_scatters > 3


def test_failure_on_rank_0_reaches_all_ranks(tmp_path):
    ranks = Meeting(2)
    evaluators = [make(tmp_path, [[None]] * 4, collective=ranks.of(r))[0] for r in range(2)]
    outcomes = on_ranks(ranks, lambda rank: evaluators[rank].evaluate(5))
    assert isinstance(outcomes[0], RewardError)
    assert isinstance(outcomes[1], RewardError) and "bad verifier" in str(outcomes[1])


def a_run(folder, steps=30):
    make(folder.root, [[0.0], [0.0], [1.0], [0.0]])[0].evaluate(0)
    log = StatsLogger(folder, StatsLoggerConfig(tensorboard=False), steps, Progress(steps, Console(file=io.StringIO())))
    for step in range(steps):
        reasons.count("reward errors", f"ValueError: no number in row {step}")
        log.commit(step, 0, {"reward_mean": min(1.0, 0.2 + step / 30 + 0.1 * (step % 3)), "step_s": 2.0,
                             "num_completion_tokens": 100, "num_samples": 8, "staleness_mean": 0.5, "staleness_max": 1,
                             "mismatch_mean": 0.01, "rollout_wait_s": 1.0, "train_s": 0.8, "sync_s": 0.1,
                             "num_reward_errors": 1, "skipped": float(step == 3)})  # fmt: skip


def test_an_evaluation_is_told_with_its_chances(tmp_path, capsys):
    make(tmp_path, [[1.0, 0.0], [0.0, 0.0], [None, None], [None, None]])[0].evaluate(0)
    assert "held-out accuracy after 0 steps: 0.250 [0.034, 0.735] on 2 of 4 tasks  pass@1 0.250  pass@2 0.500" in (
        capsys.readouterr().out
    )
    out = io.StringIO()
    report(RunFolder(tmp_path), Console(file=out, width=80, highlight=False))
    assert re.search(r"pass@2 +│ +0.500 │ +- │", out.getvalue())
    assert json.loads((tmp_path / "summary.json").read_text())["pass_at_before"] == {"1": 0.25, "2": 0.5}


def test_summary_and_report(tmp_path):
    folder = RunFolder(tmp_path / "addition" / "first")
    a_run(folder)
    a_run(folder)  # killed and done again: accuracy_before stays, nothing is counted twice
    make(folder.root, [[1.0], [1.0], [1.0], [None]])[0].evaluate(30)
    out = io.StringIO()
    report(folder, Console(file=out, width=120, highlight=False))
    summary = json.loads(folder.summary_json.read_text())
    assert summary["accuracy_before"] == 0.25 and summary["accuracy_after"] == 1.0
    assert summary["steps"] == 30 and summary["train_s"] == 60.0 and summary["tokens_per_s"] == 50.0
    assert summary["mismatch_mean"] == pytest.approx(0.01) and summary["staleness_max"] == 1
    assert summary["num_samples"] == 240 and summary["num_steps_skipped"] == 1
    assert summary["num_reward_errors"] == 30 and summary["num_restarts"] == 1
    assert summary["time_shares"]["train"] == pytest.approx(0.4)
    text = out.getvalue()
    assert summary["num_held_out_tasks_scored"] == [4, 3]
    why = {"reward errors": {"ValueError: no number in row 0": 30}}
    assert summary["why"] == why | {"held-out answers without a reward": {"ValueError: bad verifier": 1}}
    for part in (
        "on 4 and 3 of 4 held-out tasks",
        "reward errors: ValueError: no number in row 0",
        "0.250",
        "1.000",
        "0+1=",
        "answer 0.0",
        "answer 1.0",
        str(folder.summary_json),
    ):
        assert part in text
    assert folder.reward_png.read_bytes().startswith(b"\x89PNG")


def test_summary_of_a_run_that_did_nothing(tmp_path):
    summary = report(RunFolder(tmp_path), Console(file=io.StringIO()))
    assert summary["accuracy_before"] is None and summary["steps"] == 0 and summary["train_s"] == 0


def test_report_without_matplotlib_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    a_run(RunFolder(tmp_path), steps=2)
    out = io.StringIO()
    report(RunFolder(tmp_path), Console(file=out, width=200, highlight=False))
    assert "pip install matplotlib" in out.getvalue()


def test_held_out_answers_of_a_run_are_graded_again(tmp_path, capsys):
    make(tmp_path, [[1.0], [0.0], [0.0], [None]])[0].evaluate(0)
    before = read_jsonl(RunFolder(tmp_path).evaluation(0))
    place = tmp_path / "graders_of_runs.py"
    place.write_text("def reward(prompt, completion, *ids, answer): return float(answer == '2' or ids == ([1], [2]))\n")
    assert main(["eval", "reverify", str(tmp_path), "--reward", f"{place}:reward"]) == 0
    told = capsys.readouterr().out
    assert "step_000000: 3 of 4 answers have another reward than before" in told and "not graded -> 1" in told
    assert "mean reward 0.333 [0.038, 0.825] before, 1.000 [" in told
    assert read_jsonl(RunFolder(tmp_path).evaluation(0)) == before
    assert main(["eval", "reverify", str(tmp_path)]) == 2
    assert "nothing says how to grade" in capsys.readouterr().err
