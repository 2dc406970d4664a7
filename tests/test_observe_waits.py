"""Named waits: limits hold with and without a heartbeat, the heartbeat says what is waited for, stacks are dumped."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from arealite.api.errors import WaitTimeout
from arealite.observe import waits
from arealite.observe.processes import Heartbeat
from arealite.observe.run_folder import RunFolder


@pytest.fixture
def configured(tmp_path):
    waits.configure(tmp_path, "trainer-0", heartbeat_s=0.05, stall_s=60)
    yield RunFolder(tmp_path)
    waits.shut_down()


def until(read, limit_s=20.0):
    end = time.monotonic() + limit_s
    while not (found := read()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.01)
    return found


def test_check_raises_past_the_limit_and_names_everything():
    with waits.waiting("groups of step 4", "server-1", 0.01, lambda: ["e0-r17", "e0-r18"]) as wait:
        time.sleep(0.02)
        with pytest.raises(WaitTimeout) as caught:
            wait.check()
    said = str(caught.value)
    assert "waits for server-1: groups of step 4, since" in said
    assert "limit 0.01 s" in said and "pending: e0-r17, e0-r18" in said
    assert waits.lines() == []


def test_check_is_silent_within_the_limit():
    with waits.waiting("x", "y", 60.0) as wait:
        wait.check()
        assert 59 < wait.left_s <= 60 and len(waits.lines()) == 1


def test_a_wait_ends_with_its_block_even_by_an_error():
    with pytest.raises(KeyError), waits.waiting("x", "y", 60.0):
        raise KeyError
    assert waits.lines() == []


@pytest.mark.parametrize("limit_s", [float("inf"), float("nan"), -1.0])
def test_every_wait_has_a_limit(limit_s):
    with pytest.raises(ValueError, match="finite limit"), waits.waiting("x", "y", limit_s):
        pass


def test_long_and_broken_pending_lists():
    with waits.waiting("x", "y", 60.0, [str(i) for i in range(100)]) as wait:
        assert wait.record().pending[-1] == "and 92 more" and len(wait.record().pending) == 9

    def changing():
        raise RuntimeError("dictionary changed size during iteration")

    with waits.waiting("x", "y", 60.0, changing) as wait:
        assert "changed size" in wait.record().pending[0]


def test_bounded_returns_or_raises_or_cancels():
    cancelled = []

    async def slow():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def own_timeout():
        raise TimeoutError("mine")

    async def main():
        assert await waits.bounded(asyncio.sleep(0, "done"), "x", "y", 60.0) == "done"
        with pytest.raises(WaitTimeout, match="server-0: answer"):
            await waits.bounded(slow(), "answer", "server-0", 0.01)
        with pytest.raises(TimeoutError, match="mine"):
            await waits.bounded(own_timeout(), "x", "y", 60.0)

    asyncio.run(main())
    assert cancelled == [True]


def test_heartbeat_shows_waits_and_marks(configured):
    waits.mark("step")
    with waits.waiting("groups", "server-0", 60.0, ["e0-r1"]):
        beat = until(lambda: (b := Heartbeat.read(configured.waits_dir / "trainer-0.json")) and b.waits and b)
    assert beat.pid == os.getpid() and beat.process == "trainer-0"
    assert (beat.waits[0].name, beat.waits[0].owner, beat.waits[0].pending) == ("groups", "server-0", ["e0-r1"])
    assert beat.marks["step"] >= 0
    until(lambda: Heartbeat.read(configured.waits_dir / "trainer-0.json").num_beats > beat.num_beats)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": 1, "waits": [1]}', '{"pid": 1, "waits": [], "odd": 2}'])
def test_a_file_that_is_no_heartbeat_counts_as_none(content, tmp_path):
    (tmp_path / "trainer-0.json").write_text(content)
    assert Heartbeat.read(tmp_path / "trainer-0.json") is None


def test_signal_dumps_stacks_and_shut_down_removes_the_beat(configured):
    def busy_in_a_named_function(stop):
        stop.wait(60)

    stop = threading.Event()
    thread = threading.Thread(target=busy_in_a_named_function, args=(stop,))
    thread.start()
    os.kill(os.getpid(), signal.SIGUSR1)
    until(lambda: "busy_in_a_named_function" in (configured.stacks_dir / "trainer-0.txt").read_text())
    stop.set()
    thread.join()
    waits.shut_down()
    assert not (configured.waits_dir / "trainer-0.json").exists()
    os.kill(os.getpid(), signal.SIGUSR1)  # a late request does not kill


def test_configure_twice_is_an_error(configured):
    with pytest.raises(RuntimeError, match="already"):
        waits.configure(configured.root, "trainer-1", 1.0, 60.0)


def test_configured_from_the_environment_only_under_a_launcher(tmp_path):
    code = "from arealite.observe import waits; waits.configure_from_env(); print(waits._process.name)"
    bare = {k: v for k, v in os.environ.items() if not k.startswith("AREALITE_")}
    ran = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("process ")
    under = bare | {"AREALITE_RUN_DIR": str(tmp_path), "AREALITE_PROCESS": "server-3"}
    ran = subprocess.run([sys.executable, "-c", code], env=under, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "server-3"
