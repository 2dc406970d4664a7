"""A run that is stopped, started again, finished, lengthened: what it did is kept, and nothing is written over."""

import signal

import pytest
from runs import TINY, Run
from test_run_supervised import SFTRun

SPARSE = ("recover.freq_steps=null", "saver.freq_steps=null")


class RLRun(Run):
    tiny = (*TINY, "actor.path={model}", "evaluator.freq_steps=null", *SPARSE, "total_train_steps=12")


class LongSFTRun(SFTRun):
    tiny = (*SFTRun.tiny, *SPARSE, "total_train_steps=60")


def steps_of(run) -> list[int]:
    return [line["step"] for line in run.metrics() if "step_s" in line]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", [RLRun, LongSFTRun])
def test_a_stopped_run_goes_on_ends_and_is_never_written_over(kind, tmp_path, tiny_llama):
    with kind(tmp_path, tiny_llama) as run:
        total = int(run.command[-1].partition("=")[2])
        run.until(lambda: len(steps_of(run)) >= 2, "two steps")
        run.process.send_signal(signal.SIGINT)
        assert run.wait(120) == 130, run.text()
        stopped = len(steps_of(run))
        assert names(run.folder / "recover") == [f"point_{stopped:06d}"] and 2 <= stopped < total, run.text()
        assert not (run.folder / "checkpoints").exists()

        assert run.start().succeed()["steps"] == total and steps_of(run) == list(range(total))
        assert names(run.folder / "checkpoints") == [f"step_{total:06d}"]
        assert names(run.folder / "recover")[-1] == f"point_{total:06d}"
        if kind is LongSFTRun:
            check_same_again_and_longer(run, total)

        config = (run.folder / "config.yaml").read_bytes()
        run.command.append("train_dataset.shuffle=false")
        assert run.start().wait() == 2
        assert "train_dataset.shuffle: True there, False in this configuration" in run.text()
        assert (run.folder / "config.yaml").read_bytes() == config


def check_same_again_and_longer(run, total):
    metrics = (run.folder / "metrics.jsonl").read_bytes()
    assert run.start().succeed()["steps"] == total
    assert f"made all its {total} steps" in run.text() and (run.folder / "metrics.jsonl").read_bytes() == metrics
    run.command.append(f"total_train_steps={total + 1}")
    assert run.start().succeed()["steps"] == total + 1 and steps_of(run) == list(range(total + 1))
    assert names(run.folder / "checkpoints")[-1] == f"step_{total + 1:06d}"
    assert f"changed settings: total_train_steps: {total} there, {total + 1} in this" in run.text()
