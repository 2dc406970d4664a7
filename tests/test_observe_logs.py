"""What a run writes about itself: metrics through kills and full disks, rollouts, the progress line, TensorBoard."""

import errno
import io
import json
import math
import sys
from pathlib import Path

import pytest
from rich.console import Console

from arealite.api.atomic import read_jsonl
from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import ArealiteError
from arealite.api.run_args import StatsLoggerConfig
from arealite.api.types import Group, Task, Trajectory
from arealite.observe.progress import Progress, format_span, time_shares
from arealite.observe.reasons import MAX_KINDS, by_kind
from arealite.observe.records import (
    num_restarts,
    read_metrics,
    rollout_rows,
    rollout_stats,
    version_spans,
)
from arealite.observe.run_folder import RunFolder
from arealite.observe.stats_logger import StatsLogger

QUIET = StatsLoggerConfig(tensorboard=False)


def trajectory(member=0, reward=1.0, status="ok", versions=(3, 3, 4), **changes) -> Trajectory:
    num = len(versions)
    fields = {
        "task_id": "e0-r1", "member": member, "tokens": [7, 8, *range(num)], "loss_mask": [False, False] + [True] * num,
        "logprobs": [0.0] * (2 + num), "versions": [-1, -1, *versions], "reward": reward, "finish_reason": "stop",
        "status": status, "prompt_text": "2+3=", "completion_text": "5",
    }  # fmt: skip
    return Trajectory(**(fields | changes))


def group(*trajectories, task="e0-r1", ordinal=0) -> Group:
    return Group(Task(id=task, prompt="2+3=", answer="5"), ordinal, list(trajectories))


def quiet_progress(total=10, clock=lambda: 0.0) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(total, Console(file=out, highlight=False), clock), out


def logger(folder: RunFolder, config: StatsLoggerConfig = QUIET) -> tuple[StatsLogger, io.StringIO]:
    progress, out = quiet_progress()
    return StatsLogger(folder, config, 10, progress), out


@pytest.mark.parametrize("columns", [80, 100, None])
def test_lines_fit_the_terminal(columns, monkeypatch):
    """Broken between fields, or between the words of what is longer than a line; in a log they are not broken."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    progress, out = quiet_progress(100)
    stats = {"reward_mean": 0.5, "tokens_per_s": 1e4, "train_tokens_per_s": 2e4, "mfu": 0.4, "staleness_mean": 0.5}
    stats |= {"staleness_max": 2, "step_s": 10, "rollout_wait_s": 5, "train_s": 4, "sync_s": 0.5, "num_failed": 3}
    progress.step(0, stats, {"failed": {"KeyError: " + "no such column in the row " * 9: 3}})
    progress.note("data set x: " + "7 of 70 rows are left out " * 5)
    lines = out.getvalue().splitlines()
    if columns is None:
        assert len(lines) == 2
        return
    assert max(map(len, lines)) <= columns and lines[0].startswith("step   1/100  reward 0.500  tokens/s 10000")
    assert all(line.startswith(("step", "warning", "  ")) for line in lines)
    together = " ".join(out.getvalue().split())
    for whole in (
        "stale 0.5 max 2",
        "step 10.0s: generate 50% reward 0% train 40% sync 5%",
        "failed 3 (3 x KeyError: no",
    ):
        assert whole in together
    assert sum("step 10.0s: generate 50% reward 0% train 40% sync 5%" in line for line in lines) == 1


def test_reasons_beyond_the_kinds_that_are_named_are_one_more_kind():
    texts = [letter * 3 for letter in "abcdefghijklmn"]
    counted = by_kind([*texts, "aaa"])
    assert len(counted) == MAX_KINDS + 1 and counted["other reasons"] == len(texts) - MAX_KINDS and counted["aaa"] == 2


def test_run_folder_follows_config_and_environment(tmp_path, monkeypatch):
    config = GRPOConfig(experiment_name="a", trial_name="b")
    config.cluster.fileroot = str(tmp_path)
    monkeypatch.delenv("AREALITE_RUN_DIR", raising=False)
    assert RunFolder.of(config).metrics == tmp_path / "a" / "b" / "metrics.jsonl"
    monkeypatch.setenv("AREALITE_RUN_DIR", str(tmp_path / "given"))
    assert RunFolder.of(config).root == tmp_path / "given"


def test_metrics_are_valid_json_also_when_values_are_not_finite(tmp_path):
    folder = RunFolder(tmp_path)
    log, _ = logger(folder)
    assert read_metrics(folder.metrics) == []
    log.commit(0, 0, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-6})
    line = folder.metrics.read_text().splitlines()[0]
    record = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (record["loss"], record["grad_norm"], record["lr"]) == (None, None, 1e-6)
    assert record["nonfinite"] == ["grad_norm", "loss"]
    assert read_metrics(folder.metrics) == [record]


def test_resumed_run_voids_the_steps_it_does_again(tmp_path):
    folder = RunFolder(tmp_path)
    first, _ = logger(folder)
    for step in range(5):
        first.commit(step, 0, {"life": 1})
    second, _ = logger(folder)
    second.commit(2, 0, {"life": 2})
    assert [(r["step"], r["life"]) for r in read_metrics(folder.metrics)] == [(0, 1), (1, 1), (2, 2)]
    assert num_restarts(folder.metrics) == 1


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_line_torn_by_a_kill_costs_only_itself(tmp_path, cut):
    folder = RunFolder(tmp_path)
    first, _ = logger(folder)
    for step in range(3):
        first.commit(step, 0, {})
    folder.metrics.write_bytes(folder.metrics.read_bytes()[:-cut])
    second, _ = logger(folder)
    second.commit(2, 0, {"again": 1})
    assert [r["step"] for r in read_metrics(folder.metrics)] == [0, 1, 2]
    assert read_metrics(folder.metrics)[2]["again"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_stops_at_the_metrics_with_a_clear_error(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log, _ = logger(RunFolder(tmp_path))
    with pytest.raises(ArealiteError, match=r"cannot write .*metrics.jsonl: No space left .* make room"):
        log.commit(0, 0, {"loss": 1.0})


def test_full_disk_drops_rollouts_visibly_and_goes_on(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    log, out = logger(folder)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    log.commit(0, 0, {}, [group(trajectory())])
    log.commit(1, 0, {}, [group(trajectory())])
    assert [r["num_logs_dropped"] for r in read_metrics(folder.metrics)] == [1, 2]
    assert list(folder.rollouts_dir.iterdir()) == []  # no halves
    assert out.getvalue().count("No space left on device") == 2


def test_rollout_rows(tmp_path):
    class Spell:
        def decode(self, token_ids):
            return "-".join(map(str, token_ids))

    odd = "line\nbreak\u2028and\x85more, half \ud83d of a pair"  # what UTF-8 cannot hold is no reason to stop
    members = [
        trajectory(0, completion_text=odd, reward_parts={"format": 0.5}),
        trajectory(1, reward=None, status="reward_error", error="Traceback"),
    ]
    log, _ = logger(RunFolder(tmp_path))
    log.commit(12, 0, {}, [group(*members)])
    first, second = read_jsonl(tmp_path / "rollouts" / "step_000012.jsonl")
    assert (first["member"], second["member"]) == (0, 1)
    assert first["completion"] == odd and first["versions"] == [[3, 2], [4, 1]]
    assert first["reward_parts"] == {"format": 0.5} and first["num_tokens"] == 3
    assert second["reward"] is None and second["status"] == "reward_error" and second["error"] == "Traceback"
    (bare,) = rollout_rows([group(trajectory(prompt_text="", completion_text=""))], Spell())
    assert (bare["prompt"], bare["completion"]) == ("7-8", "0-1-2")
    assert version_spans(trajectory(versions=())) == []


def test_rollout_stats_keep_errors_out_of_means():
    groups = [
        group(trajectory(0, 1.0), trajectory(1, 0.0), trajectory(2, None, "reward_error")),
        group(trajectory(0, 1.0), trajectory(1, 1.0, finish_reason="length")),
    ]
    stats = rollout_stats(groups)
    assert stats["reward_mean"] == 0.75 and stats["num_samples"] == 4
    assert stats["num_samples_reward_error"] == 1 and stats["num_completion_tokens"] == 12  # of those with a reward
    assert stats["truncated_share"] == 0.25 and stats["num_groups_equal_rewards"] == 1
    assert "reward_mean" not in rollout_stats([group(trajectory(0, None, "failed"))])


def test_a_commit_adds_time_and_speed_and_keeps_given_numbers(tmp_path):
    log, _ = logger(RunFolder(tmp_path))
    assert log.commit(0, 0, {})["step_s"] > 0  # a loop without timers: the time since the last commit
    numbers = log.commit(1, 0, {"step_s": 2.0, "reward_mean": 9.0}, [group(trajectory())])
    assert numbers["tokens_per_s"] == 1.5 and numbers["samples_per_s"] == 0.5
    assert (numbers["step_s"], numbers["reward_mean"]) == (2.0, 9.0)
    assert log.commit(2, 0, {"step_s": 2.0, "num_completion_tokens": 8})["tokens_per_s"] == 4.0  # without samples


def test_time_shares_split_the_wait_and_add_up():
    stats = {"step_s": 10.0, "rollout_wait_s": 4.0, "generate_s": 3.0, "reward_s": 1.0, "train_s": 3.0, "sync_s": 1.0}
    shares = {"generate": 0.3, "reward": 0.1, "train": 0.3, "sync": 0.1, "other": 0.2}
    assert time_shares(stats) == pytest.approx(shares)
    for unknown in ({"train_s": 1.0}, {"step_s": 1.0}):  # a loop without timers: nobody knows where its time goes
        assert time_shares(unknown) == {}
    assert [format_span(s) for s in (7, 187, 3729)] == ["0:07", "3:07", "1:02:09"]


def test_progress_line_is_one_plain_line_without_a_terminal():
    times = iter([0.0, 10.0, 20.0])
    progress, out = quiet_progress(total=100, clock=lambda: next(times))
    stats = {"reward_mean": 0.5, "tokens_per_s": 812.4, "staleness_mean": 0.6, "staleness_max": 1.0, "step_s": 10.0,
             "rollout_wait_s": 4.0, "train_s": 5.0, "sync_s": 1.0, "skipped": 1.0,
             "num_reward_errors": 2.0}  # fmt: skip
    progress.step(0, {"reward_mean": math.nan})
    progress.step(1, stats, {"reward errors": {"ValueError: no number": 2}})
    first, second = out.getvalue().splitlines()
    assert "reward nan" in first
    for part in ("step   2/100", "reward 0.500", "tokens/s 812", "stale 0.6 max 1", "generate 40%", "train 50%",
                 "sync 10%", "left 16:20", "STEP SKIPPED", "reward errors 2 (2 x ValueError: no number)"):  # fmt: skip
        assert part in second
    assert "\x1b" not in out.getvalue()


def test_tensorboard_events_of_a_resumed_run(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = RunFolder(tmp_path)
    for life, steps in ((1, range(4)), (2, range(2, 4))):
        log, _ = logger(folder, StatsLoggerConfig())
        for step in steps:
            log.commit(step, 0, {"life": life, "loss": math.nan})
        log.close()
    events = accumulator.EventAccumulator(str(folder.tensorboard_dir))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("life")] == [(0, 1), (1, 1), (2, 2), (3, 2)]
    assert "loss" not in events.Tags()["scalars"]


def test_missing_tensorboard_is_one_note(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log, out = logger(RunFolder(tmp_path), StatsLoggerConfig())
    for step in range(3):
        log.commit(step, 0, {"loss": 1.0})
    assert out.getvalue().count("pip install tensorboard") == 1
    assert len(read_metrics(RunFolder(tmp_path).metrics)) == 3


def test_observe_does_not_load_torch():
    import subprocess

    modules = ["stats_logger", "summary", "watchdog", "claim"]  # which import the others
    code = "import sys\n" + "".join(f"import arealite.observe.{m}\n" for m in modules)
    code += "assert not {'torch', 'matplotlib', 'tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
