"""The timeline: spans of the steps asked for, of threads and of requests that overlap, readable after a kill."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from arealite.observe import timeline
from arealite.observe.run_folder import RunFolder
from arealite.observe.stats import StatsTracker
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
    timeline.open_timeline(RunFolder(tmp_path), 0, 0)


def test_steps_asked_for_are_recorded(folder):
    timeline.open_timeline(folder, 3, rank=1)
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
    timeline.open_timeline(folder, 1, rank=0)
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


def test_a_timeline_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(timeline, "MAX_STEP_EVENTS", 6)
    timeline.open_timeline(folder, 1, rank=0)
    timeline.begin_step(0)
    for _ in range(20):
        with timeline.span("s"):
            pass
    path = folder.timeline_dir / "rank-0.json"
    assert 2 <= len(spans(path)) <= 3
    monkeypatch.setattr(timeline, "MAX_BYTES", path.stat().st_size)
    timeline.begin_step(1)
    with timeline.span("too much"):
        pass
    assert "too much" not in spans(path)


KILLED = """
import os, signal, sys
from pathlib import Path
from arealite.observe import timeline
from arealite.observe.run_folder import RunFolder
timeline.open_timeline(RunFolder(Path(sys.argv[1])), 1, 0)
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
    timeline.open_timeline(folder, 1, rank=0)
    timeline.begin_step(5)
    with timeline.span("after"):
        pass
    assert spans(path) == ["done", "after"]
