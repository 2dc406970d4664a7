"""The watchdog on real processes: whoever is frozen, deadlocked or late is named, the others show their stacks."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import pytest
from support.dummies import Launched, is_alive

from arealite.observe.processes import process_status
from arealite.observe.run_folder import RunFolder
from arealite.observe.watchdog import Watchdog

STALL_S = 1.0
PROGRAM = """
import sys, threading, time
from arealite.observe import waits
folder, name, owner, limit_s, marking = sys.argv[1:]
waits.configure(folder, name, heartbeat_s=0.05, stall_s=60)
def also_waits():
    with waits.waiting("groups of step 3", owner, float(limit_s), ["e0-r18 on server-0"]):
        time.sleep(600)
for _ in range(9):
    threading.Thread(target=also_waits, daemon=True).start()
def named_function_of_the_test():
    with waits.waiting("groups of step 3", owner, float(limit_s), ["e0-r17 on server-0"]):
        while True:
            if marking == "marking":
                waits.mark("token")
            time.sleep(0.02)
named_function_of_the_test()
"""


@dataclass(frozen=True)
class Process:
    """As the watchdog sees one."""

    pid: int

    @property
    def status(self):
        return process_status(self.pid)

    def send(self, number, is_alone=False):
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Processes:
    """Real waiting processes under one run folder, ended by id."""

    def __init__(self, folder):
        self.folder = RunFolder(folder)
        self.started: dict[str, subprocess.Popen] = {}

    def start(self, name, owner, limit_s=600.0, marking="silent"):
        command = [sys.executable, "-c", PROGRAM, str(self.folder.root), name, owner, str(limit_s), marking]
        self.started[name] = subprocess.Popen(command)
        path = self.folder.waits_dir / f"{name}.json"
        end = time.monotonic() + 20
        while not (path.exists() and '"pending"' in path.read_text()):
            assert time.monotonic() < end
            time.sleep(0.02)

    def watched(self):
        return {name: Process(process.pid) for name, process in self.started.items()}

    def look_until_report(self, watchdog, limit_s=20.0):
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if report := watchdog.look(self.watched()):
                return report
            time.sleep(0.05)
        return None


@pytest.fixture
def processes(tmp_path):
    made = Processes(tmp_path)
    yield made
    for process in made.started.values():
        process.kill()
        process.wait(20)


def test_silence_names_the_frozen_process_and_the_others_show_stacks(processes):
    processes.start("server-0", "clients")
    processes.start("trainer-0", "server-0")
    watchdog = Watchdog(processes.folder, 0.05, stall_s=3 * STALL_S)  # the first waits while the second starts
    watchdog.look(processes.watched())
    processes.started["server-0"].send_signal(signal.SIGSTOP)
    report = processes.look_until_report(watchdog)
    assert report.culprit == "server-0"
    assert "STALL: server-0" in report.headline and "frozen (state T" in report.headline
    assert report.text.count("trainer-0 waits for server-0: groups of step 3") == 1  # ten waits in one line
    assert "and 2 more [10 such waits]" in report.text and "e0-r18 on server-0" in report.text
    where = report.text[report.text.index("where they are") :]
    assert "server-0: cannot say, it is frozen" in where
    first, second = where.index("named_function_of_the_test"), where.index("also_waits")
    assert 0 < first < second  # the main thread comes first
    assert where.count("also_waits") == 1 and "[9 threads]" in where  # like threads once
    assert "threading.py" not in where and "waits.py" not in where  # no thread without code of ours or the script's
    [kept] = processes.folder.stalls_dir.iterdir()
    assert kept.read_text().startswith(report.text)
    assert kept.read_text().count("also_waits") == 10 and "threading.py" in kept.read_text()


def test_a_frozen_process_explains_an_older_wait_of_another(processes):
    processes.start("trainer-0", "server-0")
    processes.start("server-0", "clients")
    watchdog = Watchdog(processes.folder, 0.05, stall_s=6 * STALL_S)
    end = time.monotonic() + STALL_S
    while time.monotonic() < end:
        assert watchdog.look(processes.watched()) is None
        time.sleep(0.05)
    processes.started["server-0"].send_signal(signal.SIGSTOP)  # the trainer's wait is the first to grow too old
    report = processes.look_until_report(watchdog)
    assert report.headline.startswith("STALL: server-0 (pid") and report.culprit == "server-0"
    assert "trainer-0 waits for server-0" in report.text


def test_a_deadlock_names_who_has_to_act(processes):
    processes.start("server-0", "clients", limit_s=30)
    processes.start("trainer-0", "server-0")
    report = processes.look_until_report(Watchdog(processes.folder, 0.05, stall_s=STALL_S))
    assert "older than watchdog.stall_s" in report.headline
    assert report.culprit in ("server-0", "trainer-0")
    assert report.text.count("named_function_of_the_test") >= 2


def test_marked_progress_anywhere_is_no_stall(processes):
    processes.start("server-0", "clients", marking="marking")
    processes.start("trainer-0", "server-0")
    watchdog = Watchdog(processes.folder, 0.05, stall_s=STALL_S)
    assert processes.look_until_report(watchdog, limit_s=3 * STALL_S) is None
    processes.started["server-0"].send_signal(signal.SIGSTOP)
    report = processes.look_until_report(watchdog)
    assert report.culprit == "server-0" and "server-0: token" in report.text


def test_a_wait_past_its_own_limit_is_a_stall_whatever_goes_on(processes):
    processes.start("server-0", "clients", marking="marking")
    processes.start("trainer-0", "reward worker 1", limit_s=0.5)
    report = processes.look_until_report(Watchdog(processes.folder, 0.05, stall_s=60.0, grace_s=0.5))
    assert report.culprit == "trainer-0"  # the owner is no process that we know
    assert "past its limit of 0.5 s" in report.headline


def test_a_process_whose_heartbeat_file_vanished_is_not_forgotten(processes):
    processes.start("trainer-0", "server-0")
    watchdog = Watchdog(processes.folder, 0.05, stall_s=STALL_S)
    time.sleep(0.1)
    assert watchdog.look(processes.watched()) is None
    processes.started["trainer-0"].kill()
    processes.started["trainer-0"].wait(20)  # its number stands for a process that hangs after its last beat
    (processes.folder.waits_dir / "trainer-0.json").unlink()
    report = processes.look_until_report(watchdog)
    assert "trainer-0" in report.headline and "silent" in report.headline


def test_a_watchdog_that_slept_itself_blames_nobody(processes):
    processes.start("trainer-0", "server-0")
    watchdog = Watchdog(processes.folder, 0.05, stall_s=STALL_S)
    time.sleep(0.1)
    assert watchdog.look(processes.watched()) is None
    processes.started["trainer-0"].send_signal(signal.SIGSTOP)
    time.sleep(1.5 * STALL_S)  # everything stood still, the watchdog too
    assert watchdog.look(processes.watched()) is None


@pytest.mark.parametrize("victim", ["server-0", "trainer-0", "trainer-1"])
def test_frozen_process_stops_the_run_under_its_name(victim, tmp_path):
    overrides = {"watchdog.stall_s": 2.0}
    with Launched(tmp_path / "run", ["wait", "wait"], ["ok"], **overrides) as run:
        names = ["server-0", "trainer-0", "trainer-1"]
        pids = run.pids(*names)
        pid = pids[names.index(victim)]
        os.kill(pid, signal.SIGSTOP)
        assert run.wait() == 1
        assert f"STALL: {victim} (pid {pid})" in run.text() and "frozen (state T" in run.text()
        assert "where they are" in run.text() and list(run.folder.stalls_dir.glob(f"stall_*{victim}.txt"))
        assert not any(map(is_alive, pids))


def test_restart_action_kills_the_frozen_process_and_goes_on(tmp_path):
    overrides = {"watchdog.stall_s": 2.0, "watchdog.action": "restart"}
    with Launched(tmp_path / "run", ["wait"], ["ok"], **overrides) as run:
        first = run.pids("server-0", "trainer-0")
        os.kill(first[0], signal.SIGSTOP)
        run.until(lambda: "restart 1 of at most 3" in run.text(), "restart")
        run.pids("server-0", "trainer-0", old=tuple(first))
        (run.folder.root / "go").touch()
        assert run.wait() == 0
        assert not any(map(is_alive, first))


def test_frozen_launcher_is_named_by_the_others(tmp_path):
    with Launched(tmp_path / "run", ["wait"], ["ok"]) as run:
        run.pids("server-0", "trainer-0")
        os.kill(run.process.pid, signal.SIGSTOP)
        line = f"STALL: the launcher (pid {run.process.pid}) has been silent"
        run.until(lambda: line in run.text(), "line of the frozen launcher in its own terminal")
        assert "frozen (state T" in run.text()
        run.until(lambda: line in run.folder.log("trainer-0", "1").read_text(), "line in the trainer's log")
        assert len(list(run.folder.stalls_dir.glob("launcher_*.txt"))) == 1
        os.kill(run.process.pid, signal.SIGCONT)
        (run.folder.root / "go").touch()
        assert run.wait() == 0  # it blames nobody for its own absence
