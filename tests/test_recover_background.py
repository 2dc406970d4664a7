"""A point is written while training goes on: what it holds, what waits for it, and what a kill in its midst leaves."""

from __future__ import annotations

import logging
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import layouts
from support.ranks import Alone
from test_engine_layouts import TOLERANCE, save_model
from test_engine_resume import engine, step, weights
from test_recover_points import Counter, Life, run_config

from arealite.api.errors import ArealiteError, WaitTimeout
from arealite.api.run_args import RecoverConfig
from arealite.api.types import Dims
from arealite.engine.recover import RecoverHandler
from arealite.observe.run_folder import RunFolder

NUM_STEPS = 16


class SlowLife(Life):
    """Its disk writes nothing before `disk` is set."""

    def __init__(self, root, config=None, **settings):
        super().__init__(root, config, Alone(), **settings)
        self.disk = threading.Event()
        write = self.actor.write
        self.actor.write = lambda *args: self.disk.wait(20) and write(*args)

    def begin(self, number):
        self.actor.value = self.rollout.value = self.dataloader.value = number
        return self.recover.maybe_save(number, 0)


def test_training_goes_on_and_the_point_holds_what_was_when_it_began(tmp_path):
    life = SlowLife(tmp_path, freq_steps=4)
    assert life.begin(4).name == "point_000004"
    for number in (5, 6):
        assert life.begin(number) is None
    assert life.points() == [".partial-point_000004"]
    life.disk.set()
    deadline = time.monotonic() + 20
    while life.points() != ["point_000004"] and time.monotonic() < deadline:
        time.sleep(0.01)  # nobody has to call anything
    again = Life(tmp_path)
    assert again.load() == 4
    assert again.actor.value == again.rollout.value == again.dataloader.value == 4
    assert life.recover.finish().name == "point_000004" and life.recover.finish() is None


def test_a_due_point_waits_for_the_one_before_under_a_name_and_a_limit(tmp_path):
    config = run_config()
    config.actor.collective_timeout_s = 0.2
    life = SlowLife(tmp_path, config)
    life.begin(1)
    with pytest.raises(WaitTimeout, match="recovery point point_000001 on disk"):
        life.begin(2)
    life.disk.set()
    patient = SlowLife(tmp_path / "other")
    patient.begin(1)
    threading.Timer(0.2, patient.disk.set).start()
    patient.begin(2)
    assert "point_000001" in patient.points()
    assert patient.recover.finish().name == "point_000002"


def test_a_failure_in_the_background_shows_at_the_next_step_and_the_second_in_a_row_stops(tmp_path, caplog):
    life = SlowLife(tmp_path)
    life.disk.set()
    life.actor.broken = True
    life.begin(1)
    assert life.recover.finish() is None and "point_000001 could not be written" in caplog.text
    life.begin(2)
    with pytest.raises(ArealiteError, match=r"point_000002 could not .*No space left.* second in a row"):
        life.begin(3)
    assert life.points() == []
    life.actor.broken = False
    life.begin(3)
    life.recover.close()
    assert life.points() == ["point_000003"]


def test_a_run_that_ends_by_an_error_ends_its_point_first(tmp_path):
    life = SlowLife(tmp_path)
    with pytest.raises(ZeroDivisionError), life.session():
        life.begin(1)
        threading.Timer(0.2, life.disk.set).start()
        raise ZeroDivisionError
    assert life.points() == ["point_000001"]


def test_close_raises_nothing(tmp_path, caplog):
    life = SlowLife(tmp_path)
    life.disk.set()
    life.actor.broken = True
    for number in (1, 2):
        life.begin(number)
        life.recover.close()
    assert "second in a row" in caplog.text


def recover_of(root: str, *parts: Any) -> RecoverHandler:
    return RecoverHandler(run_config(recover=RecoverConfig(freq_steps=1)), RunFolder(Path(root)), *parts)


def live(rank: int, model: str, root: str) -> None:
    """Trains from the newest point on, with a point after every step, on a disk that takes its time."""
    from arealite.engine import recover as points

    logging.disable()
    save = points.dcp.save

    def slow(*args, **options):
        time.sleep(0.03)
        save(*args, **options)
        time.sleep(0.03)

    points.dcp.save = slow
    actor = engine(model, Dims(d=2), optimizer={"lr_scheduler": "constant"}, collective_timeout_s=30.0)
    rollout, loader = Counter(), Counter()
    recover = recover_of(root, actor, rollout, loader)
    for number in range(recover.load(), NUM_STEPS):
        assert actor.num_updates == rollout.value == loader.value == number
        step(actor, number % 3)
        rollout.value = loader.value = number + 1
        recover.maybe_save(number + 1, 0)
    recover.finish()


def test_killed_in_the_midst_of_a_save_the_point_before_is_whole(tmp_path):
    """Both ranks or one of them are killed; one process, another layout, then finds a whole point of a step that the
    ranks made, and goes on as if nothing had happened."""
    model, root, choose = save_model("llama", tmp_path), tmp_path / "run", random.Random(1)
    straight = engine(model, optimizer={"lr_scheduler": "constant"})
    expected = [weights(straight)]
    for number in range(NUM_STEPS):
        step(straight, number % 3)
        expected.append(weights(straight))
    num_hits, newest = 0, 0
    for victims in ([0, 1], [1], [0, 1], [0]):
        with layouts.ranks(2, live, model, str(root)) as started:
            processes = [process for process, _ in started]
            wait_for_point(root, newest + 1, processes)
            time.sleep(choose.random() * 0.2)
            for victim in victims:
                processes[victim].kill()
            for process in processes:
                process.join(40)
                assert process.exitcode is not None, "a rank whose peer was killed goes on waiting"
        num_hits += any(path.name.startswith(".partial") for path in (root / "recover").iterdir())
        resumed = engine(model, optimizer={"lr_scheduler": "constant"})
        rollout, loader = Counter(), Counter()
        newest = recover_of(root, resumed, rollout, loader).load()
        assert newest == resumed.num_updates == rollout.value == loader.value > 0
        for name, weight in weights(resumed).items():
            limit = TOLERANCE * np.abs(weight).max()
            np.testing.assert_allclose(weight, expected[newest][name], rtol=0, atol=limit, err_msg=name)
    assert num_hits, "no kill hit a save: the test proves nothing"


def wait_for_point(root: Path, number: int, processes) -> None:
    deadline = time.monotonic() + 120
    while not (root / f"recover/point_{number:06d}").exists():
        assert time.monotonic() < deadline and all(p.is_alive() for p in processes)
        time.sleep(0.02)
