"""A run that is stopped, started again, finished, lengthened: what it did is kept, and nothing is written over."""

import signal

from support.runs import TINY, Run
from test_run_supervised import SFTRun

SPARSE = ("recover.freq_steps=null", "saver.freq_steps=null")


class RLRun(Run):
    tiny = (*TINY, "actor.path={model}", "evaluator.freq_steps=null", *SPARSE, "total_train_steps=10")


class ShortSFTRun(SFTRun):
    tiny = (*SFTRun.tiny, *SPARSE, "total_train_steps=3")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_and_go_on(run, number: int) -> dict:
    """Stops the run by signal `number` after two of its steps and starts it again; its summary."""
    total = int(run.command[-1].partition("=")[2])
    run.until(lambda: len(run.steps()) >= 2, "two steps")
    pids = run.pids()
    assert "trainer-0" in pids
    run.process.send_signal(number)
    assert run.wait(120) == 128 + number, run.text()
    assert run.pids() == {}, f"of {pids} some still live"
    stopped = len(run.steps())
    assert names(run.folder / "recover") == [f"point_{stopped:06d}"] and 2 <= stopped < total, run.text()
    assert not (run.folder / "checkpoints").exists()

    summary = run.start().succeed()
    assert names(run.folder / "checkpoints") == [f"step_{total:06d}"]
    assert names(run.folder / "recover")[-1] == f"point_{total:06d}"
    return summary


def test_a_stopped_run_goes_on_and_ends(tmp_path, tiny_llama):
    with RLRun(tmp_path, tiny_llama) as run:
        run.check_records(stop_and_go_on(run, signal.SIGINT), num_steps=10)


def test_a_finished_run_is_made_longer_and_never_written_over(tmp_path, tiny_llama):
    with ShortSFTRun(tmp_path, tiny_llama) as run:
        check_same_again_and_longer(run, run.succeed()["steps"])
        config = (run.folder / "config.yaml").read_bytes()
        run.command.append("train_dataset.shuffle=false")
        assert run.start().wait() == 2
        assert "train_dataset.shuffle: True there, False in this configuration" in run.text()
        assert (run.folder / "config.yaml").read_bytes() == config


def check_same_again_and_longer(run, total):
    metrics = (run.folder / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in run.steps()] == list(range(total))
    assert run.start().succeed()["steps"] == total
    assert f"made all its {total} steps" in run.text() and (run.folder / "metrics.jsonl").read_bytes() == metrics
    run.command.append(f"total_train_steps={total + 1}")
    assert run.start().succeed()["steps"] == total + 1
    assert [line["step"] for line in run.steps()] == list(range(total + 1))
    assert names(run.folder / "checkpoints")[-1] == f"step_{total + 1:06d}"
    assert f"changed settings: total_train_steps: {total} there, {total + 1} in this" in run.text()
