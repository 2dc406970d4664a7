"""Recovery points: whole or not there, through kills, full disks, several ranks and changed configurations."""

import errno
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import layouts
from support.ranks import Alone, Meeting, on_ranks

from arealite.api.cli_args import GRPOConfig, TrainEngineConfig
from arealite.api.errors import ArealiteError, RecoveryError
from arealite.api.run_args import RecoverConfig
from arealite.engine import recover as recover_module
from arealite.engine.recover import COMPLETE, RecoverHandler
from arealite.observe import stop
from arealite.observe.run_folder import RunFolder


class Counter:
    """A dataloader or a rollout head that is one number."""

    def __init__(self, value=0):
        self.value, self.num_loads = value, 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value, self.num_loads = state["value"], self.num_loads + 1


class FakeActor:
    """Writes real files, one per rank, whose whole content is the value; `pause_s` between two parts of a file."""

    def __init__(self, collective, value=0, num_bytes=800, pause_s=0.0):
        self.collective, self.value, self.num_bytes, self.pause_s = collective, value, num_bytes, pause_s
        self.broken = False

    @property
    def background(self):
        return self.collective.background

    def stage_state(self, path):
        return lambda value=self.value, broken=self.broken: self.write(path, value, broken)

    def write(self, path, value, broken):
        if broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        with open(Path(path) / f"rank_{self.collective.rank}.txt", "w", buffering=1) as out:
            for _ in range(10):
                out.write(f"{value:8d}" * (self.num_bytes // 80))
                out.flush()
                time.sleep(self.pause_s)

    def load_state(self, path):
        text = (Path(path) / f"rank_{self.collective.rank}.txt").read_text()
        assert len(text) == self.num_bytes and len({text[i : i + 8] for i in range(0, len(text), 8)}) == 1
        self.value = int(text[:8])


def run_config(**changes) -> GRPOConfig:
    config = GRPOConfig(seed=7)
    config.actor.path = "model"
    config.train_dataset.path = "data.jsonl"
    for name, value in changes.items():
        setattr(config, name, value)
    return config


class Life:
    """One process's parts over a run folder."""

    def __init__(self, root, config=None, collective=None, **settings):
        self.folder = RunFolder(Path(root))
        self.actor, self.rollout, self.dataloader = FakeActor(collective or Alone()), Counter(), Counter()
        config = config or run_config()
        config.recover = RecoverConfig(**{"freq_steps": 1} | settings)
        self.recover = RecoverHandler(config, self.folder, self.actor, self.rollout, self.dataloader)

    def train(self, step, epoch=0):
        self.actor.value = self.rollout.value = self.dataloader.value = step
        self.recover.maybe_save(step, epoch)
        return self.recover.finish()

    def load(self):
        return self.recover.load()

    def session(self):
        return self.recover.session()

    def end_step(self, step, last=False):
        self.actor.value = self.rollout.value = self.dataloader.value = step
        self.recover.maybe_save(step, 0, last)

    def points(self):
        return sorted(p.name for p in self.folder.recover_dir.iterdir())


def test_round_trip(tmp_path):
    first = Life(tmp_path, freq_steps=2)
    assert first.load() == 0 and first.actor.value == 0 and first.rollout.num_loads == 0
    assert [first.train(step, epoch=3) is not None for step in range(1, 8)] == [step % 2 == 0 for step in range(1, 8)]
    assert first.points() == ["point_000004", "point_000006"]
    second = Life(tmp_path)
    assert second.load() == 6
    assert (second.actor.value, second.rollout.value, second.dataloader.value, second.recover.epoch) == (6, 6, 6, 3)


@pytest.mark.parametrize("mode", ["fresh", "off"])
def test_modes_that_go_on_with_nothing_refuse_a_used_folder(tmp_path, mode):
    first = Life(tmp_path, mode=mode)
    assert first.load() == 0
    assert (first.train(1) is None) == (mode == "off")
    Life(tmp_path).train(1)
    with pytest.raises(RecoveryError, match=rf"mode is {mode}, .* an earlier run \(point_000001\).*trial_name"):
        Life(tmp_path, mode=mode).load()


def test_another_configuration_is_refused_before_its_points_are_read(tmp_path):
    first = Life(tmp_path)
    first.load()
    first.train(1)
    with pytest.raises(RecoveryError, match=r"seed: 7 there, 8 in this configuration(.|\n)*choose another trial_name"):
        Life(tmp_path, run_config(seed=8)).load()
    faster = run_config(total_train_steps=9)
    faster.actor.optimizer.lr = 1.0
    assert Life(tmp_path, faster).load() == 1


def test_a_run_without_a_point_begins_again_and_says_so(tmp_path, caplog):
    Life(tmp_path).load()
    assert "begins again" not in caplog.text
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert Life(tmp_path).load() == 0 and "no recovery point: its run begins again" in caplog.text
    with pytest.raises(RecoveryError, match="another configuration"):
        Life(tmp_path, run_config(seed=8)).load()


def test_the_last_step_leaves_a_point_whatever_the_frequency(tmp_path):
    life = Life(tmp_path, freq_steps=2)
    with life.session() as step:
        for number in range(step + 1, 6):
            life.end_step(number, last=number == 5)
    assert life.points() == ["point_000004", "point_000005"]
    assert Life(tmp_path).load() == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at_point", [False, True])
def test_a_stop_is_heeded_after_the_step_and_leaves_a_point(tmp_path, caplog, number, at_point):
    life, earlier = Life(tmp_path, freq_steps=2 if at_point else 100), signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, life.session():
        life.end_step(1)
        os.kill(os.getpid(), number)
        life.actor.value = 2  # goes on to the end of the step
        life.end_step(2)
        pytest.fail("the run goes on")
    assert ended.value.code == 128 + number and signal.getsignal(number) is earlier
    assert life.points() == ["point_000002"] and f"stopped by {number.name}, 2 steps are finished" in caplog.text
    again = Life(tmp_path)
    assert again.load() == again.actor.value == again.rollout.value == 2


def test_a_stop_in_the_wait_for_groups_keeps_the_finished_steps(tmp_path):
    life = Life(tmp_path, freq_steps=100)
    with pytest.raises(SystemExit), life.session():
        life.end_step(1)
        os.kill(os.getpid(), signal.SIGTERM)
        stop.look()  # as prepare_batch does
    assert life.points() == ["point_000001"]
    with pytest.raises(SystemExit), Life(tmp_path, freq_steps=100).session() as step:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.look()
    assert step == 1 and life.points() == ["point_000001"]


def test_two_stops_are_not_waited_for_and_no_stop_outlives_its_run(tmp_path):
    with pytest.raises(KeyboardInterrupt), Life(tmp_path, freq_steps=100).session():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    stop.look()


def test_a_stop_reaches_all_ranks(tmp_path, monkeypatch):
    """Signals arrive at one of them, in its main thread; it is rank 0 that decides."""
    meeting = Meeting(2)
    lives = [Life(tmp_path, collective=meeting.of(rank), freq_steps=100) for rank in range(2)]

    def run(rank):
        with pytest.raises(SystemExit), lives[rank].session():
            lives[rank].end_step(1)
            if rank == 0:
                monkeypatch.setattr(stop, "_noted", [signal.SIGTERM])
            lives[rank].end_step(2)
            pytest.fail("the run goes on")

    on_ranks(meeting, run)
    assert lives[0].points() == ["point_000002"]


def test_parameters_of_a_task_survive_json(tmp_path):
    config = run_config()
    config.train_dataset.params = {"range": (1, 9), 3: None}
    config.actor.optimizer.max_grad_norm = float("inf")
    first = Life(tmp_path, config)
    first.load()
    first.train(1)
    assert Life(tmp_path, config).load() == 1


def cut_file(point):
    (point / "actor" / "rank_0.txt").write_text("7")


@pytest.mark.parametrize(
    "damage",
    [
        lambda point: (point / COMPLETE).unlink(),
        lambda point: (point / COMPLETE).write_text("{"),
        lambda point: (point / "actor" / "rank_0.txt").unlink(),
        cut_file,
        lambda point: (point / "point.json").unlink(),
    ],
)
def test_damaged_point_is_passed_over_and_never_counts_as_kept(tmp_path, damage):
    life = Life(tmp_path, num_kept=1)
    life.train(1)
    shutil.copytree(tmp_path / "recover/point_000001", tmp_path / "recover/point_000002")
    damage(tmp_path / "recover/point_000002")
    assert Life(tmp_path).load() == 1
    life.recover._prune()
    assert Life(tmp_path).load() == 1
    damage(tmp_path / "recover/point_000001")
    with pytest.raises(RecoveryError, match="none of the recovery points .* is complete"):
        Life(tmp_path).load()


def test_full_disk_keeps_the_point_before_and_the_second_in_a_row_stops(tmp_path):
    life = Life(tmp_path, num_kept=1)
    life.train(1)
    life.actor.broken = True
    assert life.train(2) is None
    life.actor.broken = False
    assert life.train(3) is not None
    life.actor.broken = True
    assert life.train(4) is None
    with pytest.raises(ArealiteError, match=r"point_000005 could not .*No space left.* second in a row"):
        life.train(5)
    assert life.points() == ["point_000003"]
    assert Life(tmp_path).load() == 3


@pytest.mark.parametrize("step", ["sync", "_begin"])
def test_full_disk_at_rank_0s_own_files(tmp_path, monkeypatch, step):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    life = Life(tmp_path)
    life.train(1)
    if step == "sync":
        monkeypatch.setattr(recover_module, "sync", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    assert life.train(2) is None
    monkeypatch.undo()
    assert life.points() == ["point_000001"]


def test_step_saved_again_replaces_its_point(tmp_path):
    life = Life(tmp_path)
    life.train(1)
    life.rollout.value = 41
    life.recover.save(1, 0)
    assert life.points() == ["point_000001"]
    again = Life(tmp_path)
    assert again.load() == 1 and again.rollout.value == 41


def test_kill_between_the_two_renames_of_a_replacement(tmp_path):
    Life(tmp_path).train(1)
    recover_dir = tmp_path / "recover"
    (recover_dir / "point_000001").rename(recover_dir / ".replaced-point_000001")
    (recover_dir / ".partial-point_000001").mkdir()
    half = tmp_path / "checkpoints/.removed-step_000001"
    half.mkdir(parents=True)
    life = Life(tmp_path)
    assert life.load() == 1
    assert life.points() == ["point_000001"] and not half.exists()


def test_killed_at_random_moments_a_complete_point_of_the_newest_finished_step_exists(tmp_path):
    """The fake actor's files are checked byte by byte on every load, here and in the next life."""
    choose = random.Random(0)
    finished, leftovers = 0, 0
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-m", "support.recover_child", str(tmp_path)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
        )  # fmt: skip
        try:
            loaded = child.stdout.readline().split()
            assert loaded[:1] == ["loaded"] and len(set(loaded[1:])) == 1
            # One less: it was still being written. One more: killed before it could say so.
            assert int(loaded[1]) in range(finished - 1, finished + 2)
            for _ in range(choose.randint(1, 4)):
                finished = int(child.stdout.readline().split()[1])
            time.sleep(choose.random() * 0.05)
        finally:
            child.kill()
            rest = child.stdout.read()
            child.wait(timeout=20)
        whole = [line for line in rest.split("\n")[:-1] if line]
        finished = int(whole[-1].split()[1]) if whole else finished
        leftovers += any(p.name.startswith(".") for p in (tmp_path / "recover").iterdir())
        copy = tmp_path.with_name(tmp_path.name + "-copy")
        shutil.copytree(tmp_path, copy)
        life = Life(copy)
        life.actor.num_bytes = 200_000
        assert life.load() in range(finished - 1, finished + 2)
        assert len({life.actor.value, life.rollout.value, life.dataloader.value}) == 1
        assert all(name.startswith("point_") for name in life.points())
        shutil.rmtree(copy)
    assert leftovers, "no kill hit a save: the test proves nothing"


def lives_of(tmp_path, num_ranks, **settings):
    """The lives of all ranks, and a function that runs a call on all of them at once."""
    meeting = Meeting(num_ranks)
    lives = [Life(tmp_path, collective=meeting.of(rank), **settings) for rank in range(num_ranks)]
    return lives, lambda call: on_ranks(meeting, lambda rank: call(lives[rank]))


def test_two_ranks_each_save_and_load_their_part(tmp_path):
    _, on_all = lives_of(tmp_path, 2)
    assert on_all(lambda life: life.train(3)) == [tmp_path / "recover/point_000003"] * 2
    again, on_all = lives_of(tmp_path, 2)
    assert on_all(lambda life: life.load()) == [3, 3]
    assert [life.actor.value for life in again] == [3, 3]
    assert [life.rollout.value for life in again] == [3, 3]  # the others note the version
    assert [life.dataloader.value for life in again] == [3, 3]


def test_part_missing_on_another_rank_is_no_point(tmp_path):
    lives, on_all = lives_of(tmp_path, 3)
    on_all(lambda life: life.train(1))
    lives[2].actor.broken = True
    assert on_all(lambda life: life.train(2)) == [None] * 3
    assert lives[0].points() == ["point_000001"]
    outcomes = on_all(lambda life: life.train(3))
    assert all(isinstance(o, ArealiteError) and "(rank 2: [Errno 28] No space left" in str(o) for o in outcomes)


def test_refusal_reaches_all_ranks(tmp_path):
    Life(tmp_path).train(1)
    outcomes = lives_of(tmp_path, 2, mode="fresh")[1](lambda life: life.load())
    assert all(isinstance(o, RecoveryError) for o in outcomes)


def fill_the_disk(rank: int, path: str, root: str) -> list[str]:
    """Where only rank 1's own file, after what all ranks write together, finds it full; what is logged."""
    import torch

    from arealite.engine.fsdp_engine import FSDPEngine

    told: list[str] = []
    logging.getLogger("arealite").addHandler(logging.Handler())
    logging.getLogger("arealite").handlers[-1].emit = lambda record: told.append(record.getMessage())
    actor = FSDPEngine(TrainEngineConfig(path=path, collective_timeout_s=30.0))
    actor.initialize()
    recover = RecoverHandler(GRPOConfig(), RunFolder(Path(root)), actor, Counter(), Counter())
    write = torch.save

    def full(value, file, **options):
        if "random-1" in str(file):
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
        write(value, file, **options)

    torch.save = full if rank == 1 else write
    assert recover.save(1, 0) is None
    torch.save = write
    assert recover.save(2, 0).name == "point_000002"
    assert recover.load() == 2
    return told


def test_full_disk_under_one_rank_of_the_real_engine_holds_up_nobody(tmp_path, tiny_llama):
    told, _ = layouts.on_ranks(2, fill_the_disk, tiny_llama, str(tmp_path))
    assert any("(rank 1: PytorchStreamWriter failed" in each for each in told)
