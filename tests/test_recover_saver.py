"""Checkpoints: which are kept, what a failed save does."""

import errno
from pathlib import Path

import pytest
from support.ranks import Alone, Meeting, on_ranks

from arealite.api.errors import ArealiteError
from arealite.api.run_args import SaverConfig
from arealite.engine.checkpoint import Saver
from arealite.observe.run_folder import RunFolder


class FakeActor:
    """As the engine: all ranks gather, rank 0 writes."""

    def __init__(self, collective=None):
        self.collective, self.error = collective or Alone(), None

    def save(self, path, tokenizer):
        self.collective.barrier("weights")
        if self.collective.rank != 0:
            return
        if self.error:
            raise self.error
        Path(path).mkdir(parents=True)
        (Path(path) / "config.json").write_text("{}")


def kept(tmp_path):
    return sorted(p.name for p in (tmp_path / "checkpoints").iterdir())


def test_newest_are_kept(tmp_path):
    saver, actor = Saver(SaverConfig(freq_steps=2, num_kept=2), RunFolder(tmp_path)), FakeActor()
    saved = [saver.maybe_save(step, 0, actor) for step in range(1, 9)]
    assert [path.name for path in saved if path] == [f"step_00000{i}" for i in (2, 4, 6, 8)]
    assert kept(tmp_path) == ["step_000006", "step_000008"]


def test_all_are_kept_by_default(tmp_path):
    saver, actor = Saver(SaverConfig(freq_steps=1), RunFolder(tmp_path)), FakeActor()
    for step in range(1, 5):
        saver.maybe_save(step, 0, actor)
    assert len(kept(tmp_path)) == 4


def test_the_last_weights_are_saved_whatever_the_frequency(tmp_path, caplog):
    for config in (SaverConfig(), SaverConfig(freq_steps=2)):
        saver, actor = Saver(config, RunFolder(tmp_path / str(config.freq_steps))), FakeActor()
        saver.begin(0, 0, actor, total_steps=3)
        saved = [saver.maybe_save(step, 0, actor, last=step == 3) for step in (1, 2, 3)]
        assert [bool(path) for path in saved] == [False, config.freq_steps == 2, True]
    assert not caplog.text
    saver.begin(3, 0, actor, total_steps=3)  # it is there
    saver.begin(5, 0, actor, total_steps=4)  # stopped after five steps, and then the length was lowered
    assert kept(tmp_path / "2") == ["step_000002", "step_000003", "step_000005"]
    assert "made all its 3 steps" in caplog.text and "raise total_train_steps" in caplog.text


def test_last_weights_that_cannot_be_saved_are_an_error_at_once(tmp_path):
    saver, actor = Saver(SaverConfig(), RunFolder(tmp_path)), FakeActor()
    actor.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ArealiteError, match="No space left.* last of the run"):
        saver.maybe_save(3, 0, actor, last=True)


def test_the_one_just_saved_is_never_deleted(tmp_path):
    """After a resume the folder may hold checkpoints of later steps of the killed life."""
    (tmp_path / "checkpoints/step_000030").mkdir(parents=True)
    saver, actor = Saver(SaverConfig(freq_steps=1, num_kept=1), RunFolder(tmp_path)), FakeActor()
    saver.maybe_save(21, 0, actor)
    assert kept(tmp_path) == ["step_000021"]


def test_a_folder_that_cannot_be_made_is_a_failed_save_on_all_ranks(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    meeting = Meeting(2)
    savers = [Saver(SaverConfig(freq_steps=1), RunFolder(tmp_path)) for _ in range(2)]
    actors = [FakeActor(meeting.of(rank)) for rank in range(2)]
    assert on_ranks(meeting, lambda rank: savers[rank].maybe_save(1, 0, actors[rank])) == [None, None]
    outcomes = on_ranks(meeting, lambda rank: savers[rank].maybe_save(2, 0, actors[rank]))
    assert all(isinstance(o, ArealiteError) and "rank 0: " in str(o) for o in outcomes)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed: No space left")],
)
def test_failed_save_warns_then_stops(tmp_path, caplog, error):
    saver, actor = Saver(SaverConfig(freq_steps=1, num_kept=1), RunFolder(tmp_path)), FakeActor()
    saver.maybe_save(1, 0, actor)
    actor.error = error
    assert saver.maybe_save(2, 0, actor) is None
    assert "Training goes on" in caplog.text
    with pytest.raises(ArealiteError, match="No space left.* second in a row"):
        saver.maybe_save(3, 0, actor)
    assert kept(tmp_path) == ["step_000001"]
