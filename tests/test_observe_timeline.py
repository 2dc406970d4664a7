"""The timeline: spans of the steps asked for, of threads and of requests that overlap, readable after a kill."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from arealite.observe.run_folder import RunFolder
from arealite.observe.timeline import StatsTracker, Timeline, timeline
from arealite.observe.waits import waiting


def events(path):
    """As viewers read it: the array's end may be missing."""
    return json.loads(path.read_text().rstrip().rstrip(",") + "]")


def spans(path):
    """Names of finished spans, in the order of their ends; a thread's ends must close the innermost begin."""
    open_spans, done = {}, []
    for event in events(path):
        key = (event["tid"], event.get("id"))
        if event["ph"] in "Bb":
            open_spans.setdefault(key, []).append(event["name"])
        elif event["ph"] in "Ee":
            assert open_spans[key].pop() == event["name"]
            done.append(event["name"])
    return done


@pytest.fixture
def folder(tmp_path):
    yield RunFolder(tmp_path)
    timeline.open(RunFolder(tmp_path), 0, 0)


def test_steps_asked_for_are_recorded(folder):
    timeline.open(folder, 3, rank=1)
    stats = StatsTracker()
    for step in range(4, 8):
        timeline.begin_step(step)
        with stats.timer(f"train{step}"), waiting("others", "trainers", 5.0):
            pass
    path = folder.timeline_dir / "rank-1.json"
    assert spans(path) == ["wait: others", "train4", "wait: others", "train6"]
    times = [e["ts"] for e in events(path) if "ts" in e]
    assert times == sorted(times) and {e["pid"] for e in events(path)} == {1}
    assert [e["name"] for e in events(path) if e["ph"] == "i"] == ["step 4", "step 6"]


def test_requests_overlap_and_threads_are_apart(folder):
    timeline.open(folder, 1, rank=0)
    timeline.begin_step(0)
    gates = [asyncio.Event(), asyncio.Event()]

    async def request(i):
        with timeline.span("request", rid=f"r{i}"):
            await gates[i].wait()

    async def both():
        running = [asyncio.ensure_future(request(i)) for i in range(2)]
        await asyncio.sleep(0)
        for gate, task in zip(gates, running, strict=True):  # the first to begin is the first to end: no nesting
            gate.set()
            await task

    thread = threading.Thread(target=lambda: asyncio.run(both()), name="head")
    thread.start()
    thread.join()
    path = folder.timeline_dir / "rank-0.json"
    assert spans(path) == ["request", "request"]
    assert [e["args"]["rid"] for e in events(path) if e["ph"] == "b"] == ["r0", "r1"]
    assert "head" in [e["args"]["name"] for e in events(path) if e["name"] == "thread_name"]


def test_a_timeline_is_bounded(folder):
    def record(step, **limits):
        bounded = Timeline(**limits)
        bounded.open(folder, 1, rank=0)
        bounded.begin_step(step)
        for _ in range(20):
            with bounded.span(f"s{step}"):
                pass

    path = folder.timeline_dir / "rank-0.json"
    record(0, max_step_events=6)
    assert 2 <= len(spans(path)) <= 3
    record(1, max_bytes=path.stat().st_size)
    assert "s1" not in spans(path)


KILLED = """
import os, signal, sys
from pathlib import Path
from arealite.observe.run_folder import RunFolder
from arealite.observe.timeline import StatsTracker, Timeline, timeline
timeline.open(RunFolder(Path(sys.argv[1])), 1, 0)
timeline.begin_step(0)
with timeline.span("done"):
    pass
with timeline.span("killed in"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_leaves_a_readable_file_and_the_next_start_appends(folder):
    ran = subprocess.run([sys.executable, "-c", KILLED, str(folder.root)], cwd=os.getcwd())
    assert ran.returncode == -signal.SIGKILL
    path = folder.timeline_dir / "rank-0.json"
    assert spans(path) == ["done"] and "killed in" in [e["name"] for e in events(path)]
    timeline.open(folder, 1, rank=0)
    timeline.begin_step(5)
    with timeline.span("after"):
        pass
    assert spans(path) == ["done", "after"]


def test_scalars_and_timers_of_a_step():
    """The last scalar counts, timers add up, also through errors, and an export starts anew."""
    stats = StatsTracker()
    stats.scalar("lr", 1.0)
    stats.update({"lr": 2, "loss": 0.5})
    with stats.timer("sync"):
        time.sleep(0.01)
    with pytest.raises(RuntimeError), stats.timer("sync"):
        time.sleep(0.01)
        raise RuntimeError
    found = stats.export()
    assert 0.02 <= found.pop("sync_s") < 10 and found == {"lr": 2.0, "loss": 0.5}
    assert stats.export() == {}
