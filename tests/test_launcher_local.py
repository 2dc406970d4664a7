"""The local launcher with real processes and real signals: who died, what is said, and that nothing stays behind."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import replace

import pytest
from support.dummies import Launched, config_with, is_alive, plan_of

from arealite.api.errors import ConfigError, RecoveryError
from arealite.launcher.child import hold_port
from arealite.launcher.local import launch
from arealite.observe.processes import processes_of_run
from arealite.observe.run_folder import RunFolder

WAITING = ["wait"]
OK = ["ok"]


def gone(*pids: int) -> bool:
    end = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(is_alive(pid) for pid in pids)


def test_success_leaves_logs_and_nothing_else(tmp_path, capfd):
    folder = RunFolder(tmp_path / "run")
    plan, core = plan_of(folder.root, ["step", "environment", "orphan"], OK), max(os.sched_getaffinity(0))
    plan = replace(plan, processes=tuple(replace(p, cores=(core,)) for p in plan.processes))
    assert launch(lambda _: plan, config_with({}), folder) == 0
    out = capfd.readouterr().out
    assert out == "hello from step\nstep 0\nstep 1\n"  # trainer-0 only, and nothing after its last line
    logs = folder.log("", "1").parent
    assert {p.name for p in logs.iterdir()} == {f"{process.name}.log" for process in plan.processes}
    assert json.loads(folder.state_json.read_text()) == {"state": "finished", "reason": "", "attempt": 1}
    assert folder.config_yaml.exists() and len(json.loads(folder.plan_json.read_text())["processes"]) == 4
    assert not list(folder.waits_dir.iterdir())
    assert processes_of_run(folder.root) == {} and gone(int((folder.root / "orphan").read_text()))
    env = json.loads((folder.root / "trainer-1.env").read_text())
    host, port = env["AREAL_LLM_SERVER_ADDRS"].split(":")
    assert host == "127.0.0.1" and int(port) > 0 and int(env["MASTER_PORT"]) > 0
    assert env["AREALITE_RUN_DIR"] == str(folder.root) and env["cores"] == [core]
    with socket.socket() as probe:  # the server's port is free again
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, int(port)))


@pytest.mark.parametrize(
    ("trainers", "told", "untold"),
    [
        (
            ["wait", "raise"],
            ("trainer-1 (pid", "ended with exit code 1", "Traceback", "ValueError: first real error"),
            "restart",  # the same error would come again
        ),
        (["refuse"], ("ConfigError: batch_size is 3\n  expected a multiple of 2",), "Traceback"),  # meant for people
    ],
)
def test_first_error_of_the_first_dead_process_is_shown(trainers, told, untold, tmp_path, capfd):
    folder = RunFolder(tmp_path / "run")
    assert launch(lambda _: plan_of(folder.root, trainers, OK), config_with({}), folder) == 1
    said = capfd.readouterr().err
    assert all(text in said for text in told) and untold not in said
    assert processes_of_run(folder.root) == {}


@pytest.mark.parametrize(("behaviour", "said"), [("die", "RuntimeError: no such model"), ("silent", "health at start")])
def test_server_that_does_not_come_up(behaviour, said, tmp_path, capfd):
    folder = RunFolder(tmp_path / "run")
    limit_s = 1.0 if behaviour == "silent" else 20.0
    config = config_with({"launcher.startup_timeout_s": limit_s})
    assert launch(lambda _: plan_of(folder.root, ["step"], ["ok", behaviour]), config, folder) == 1
    err = capfd.readouterr().err
    assert said in err and "server-1" in err
    assert not folder.log("trainer-0", "1").exists()
    assert processes_of_run(folder.root) == {}


@pytest.mark.parametrize(("trainer", "server"), [("step", "port_taken"), ("port_taken", "ok")])
def test_a_taken_port_is_tried_again_on_another(trainer, server, tmp_path, capfd):
    folder = RunFolder(tmp_path / "run")
    assert launch(lambda _: plan_of(folder.root, [trainer], [server]), config_with({}), folder) == 0
    said = capfd.readouterr().err
    assert "Address already in use" in said and "restart 1 of at most 3" in said


@pytest.mark.parametrize(
    ("number", "code", "point"),
    [
        (signal.SIGINT, 130, ""),
        (signal.SIGTERM, 143, ""),
        (signal.SIGUSR2, 1, ""),
        (signal.SIGUSR2, 85, "point_000002"),
    ],
)
def test_stop_signals_end_everything_though_the_terminal_takes_nothing(number, code, point, tmp_path):
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, bytes(4096))
    os.set_blocking(write_end, True)
    with Launched(tmp_path / "run", WAITING, ["deaf"], stdout=write_end, **{"launcher.stop_grace_s": 0.5}) as run:
        pids = run.pids("server-0", "trainer-0")
        assert json.loads(run.folder.state_json.read_text())["state"] == "running"
        (run.folder.recover_dir / point).mkdir(parents=True, exist_ok=True)
        run.process.send_signal(number)
        assert run.wait() == code
        assert not any(map(is_alive, pids))
        state = json.loads(run.folder.state_json.read_text())
        assert state["state"] == "failed" and state["attempt"] == 1
        assert state["reason"].startswith(f"stopped by {number.name}")
        assert ("before a recovery point was written" in state["reason"]) == (code == 1)
        assert f"goes on from {'recovery point' if point else 'the start'}" in run.text()
    os.close(write_end)
    os.close(read_end)


def test_second_ctrl_c_does_not_wait_for_the_grace(tmp_path):
    with Launched(tmp_path / "run", WAITING, ["deaf"], **{"launcher.stop_grace_s": 600.0}) as run:
        pids = run.pids("server-0", "trainer-0")
        run.process.send_signal(signal.SIGINT)
        run.until(lambda: not is_alive(pids[1]), "end of the trainer")
        assert is_alive(pids[0])  # it ignores SIGTERM
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 130 and not is_alive(pids[0])


def test_killed_launcher_takes_all_with_it_and_the_next_one_cleans_up(tmp_path):
    """By whatever path the folder is given."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with Launched(tmp_path / "link" / "run", ["orphan", "wait"], OK) as run:
        pids = run.pids("server-0", "trainer-1")
        trainer = run.pid("trainer-0")
        run.until(lambda: not is_alive(trainer) and (run.folder.root / "orphan").exists(), "the orphan")
        run.process.kill()
        run.wait()
        assert gone(*pids)
    orphan = int((run.folder.root / "orphan").read_text())
    assert processes_of_run(run.folder.root.resolve()) == {orphan: "trainer-0"}  # in a session of its own
    with Launched(tmp_path / "real" / "run", ["step"], OK) as run:
        assert run.wait() == 0 and f"left behind: trainer-0 (pid {orphan})" in run.text()
    assert gone(orphan)


def test_starting_again_after_everything_was_killed(tmp_path):
    with Launched(tmp_path / "run", WAITING, OK) as run:
        pids = run.pids("server-0", "trainer-0")
        run.process.kill()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    waits_dir = run.folder.waits_dir
    assert {p.name for p in waits_dir.iterdir()} >= {"launcher.json", "server-0.json", "trainer-0.json"}
    (waits_dir / "trainer-7.json").write_text(f'{{"pid": {os.getpid()}, "process": "trainer-7"}}')  # ours by now
    (run.folder.root / "go").touch()
    with Launched(tmp_path / "run", WAITING, OK) as run:  # at once: the first may not have given back its lock yet
        assert run.wait() == 0, run.text()
    assert not list(waits_dir.glob("*.json"))


def test_a_terminal_and_a_log_that_are_gone_do_not_end_the_run(tmp_path):
    read_end, write_end = os.pipe()
    with Launched(tmp_path / "run", ["wait"], OK, stdout=write_end) as run:
        os.close(write_end)
        os.close(read_end)
        run.pid("trainer-0")
        run.folder.log("trainer-0", "1").unlink()
        os.kill(run.pid("server-0"), signal.SIGKILL)
        run.until(lambda: "restart 1 of at most 3" in run.text(), "restart")
        (run.folder.root / "go").touch()
        assert run.wait() == 0, run.text()


def test_a_full_disk_of_logs_ends_nothing(tmp_path):
    """What is lost is counted; also what starts meanwhile starts."""
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(logs)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        with Launched(tmp_path / "run", ["chatter"], OK) as run:
            run.until(lambda: f"the disk of {logs} was full: the run goes on" in run.text(), "word of the full disk")
            os.kill(pid := run.pid("server-0"), signal.SIGKILL)
            run.pid("server-0", old=(pid,))
            (run.folder.root / "quiet").touch()
            log = run.folder.log("trainer-0", "1")
            run.until(lambda: (run.folder.root / "is_quiet").exists(), "end of the chatter")
            os.truncate(log, 0)
            run.until(lambda: "there is room again" in run.text(), "word of the room")
            (run.folder.root / "go").touch()
            assert run.wait() == 0, run.text()
            assert re.fullmatch(
                r"\narealite: \d{4,} bytes are missing here: the log's disk was full\nit goes on\n", log.read_text()
            )
    finally:
        subprocess.run(["umount", str(logs)], check=True)


def test_a_list_of_servers_that_cannot_be_written_is_tried_again(tmp_path):
    (tmp_path / "run" / "servers").mkdir(parents=True)  # in its place
    with Launched(tmp_path / "run", WAITING, OK) as run:
        run.until(lambda: "servers cannot be written, which is tried again" in run.text(), "word of it")
        run.folder.servers.rmdir()
        run.until(run.folder.servers.is_file, "list of servers")
        (run.folder.root / "go").touch()
        assert run.wait() == 0, run.text()


def test_drained_servers_are_ended_and_nobody_is_missed(tmp_path):
    """Also the last one: others, which the launcher has not started, may serve."""
    with Launched(tmp_path / "run", WAITING, ["ok", "ok"]) as run:
        pids, trainer = run.pids("server-0", "server-1"), run.pid("trainer-0")
        run.until(run.folder.servers.is_file, "list of servers")
        places = run.folder.servers.read_text().split()
        for num in (1, 2):
            left = {f"http://{place}": "drained: it has ended its last request" for place in places[:num]}
            run.folder.servers_json.write_text(json.dumps({"followed": num, "servers": [], "left": left}))
            run.until(lambda num=num: run.folder.servers.read_text().split() == places[num:], "shorter list")
            assert [is_alive(pid) for pid in pids] == [False] * num + [True] * (2 - num) and is_alive(trainer)
        (run.folder.root / "go").touch()
        assert run.wait() == 0, run.text()
        assert f"server-1 ({places[1]}) is ended: drained: it has ended" in run.text() and "restart" not in run.text()


def test_the_last_server_beside_drained_ones_is_missed(tmp_path):
    with Launched(tmp_path / "run", WAITING, ["ok", "ok"], **{"recover.mode": "off"}) as run:
        run.pids("server-1", "trainer-0")
        run.until(run.folder.servers.is_file, "list of servers")
        places = run.folder.servers.read_text().split()
        run.folder.servers_json.write_text(json.dumps({"left": {f"http://{places[1]}": "drained"}}))
        run.until(lambda: run.folder.servers.read_text().split() == places[:1], "shorter list")
        os.kill(run.pid("server-0"), signal.SIGKILL)
        assert run.wait() == 1 and "the run stopped: server-0 (pid" in run.text()


def test_a_port_is_held_for_the_process_that_is_to_listen():
    with hold_port() as held:
        host, port = held.getsockname()
        with pytest.raises(OSError, match="in use"), socket.socket() as other:  # who has not been told to
            other.bind((host, port))
        with contextlib.ExitStack() as others:
            given = [others.enter_context(socket.create_server((host, 0))).getsockname()[1] for _ in range(300)]
        assert port not in given
        with socket.create_server((host, port)), socket.create_connection((host, port)):
            pass
    with pytest.raises(OSError, match="no port can be bound at 192.0.2.1, see AREALITE_ADDRESS"):
        hold_port("192.0.2.1")


def test_two_launchers_never_share_a_folder(tmp_path):
    with Launched(tmp_path / "run", WAITING, OK) as run:
        run.pids("trainer-0")
        with pytest.raises(ConfigError, match=f"in use by the launcher with pid {run.process.pid}"):
            launch(lambda _: plan_of(run.folder.root, ["step"], OK), config_with({}), run.folder)
        (run.folder.root / "go").touch()
        assert run.wait() == 0


def test_killed_trainer_restarts_the_run(tmp_path):
    with Launched(tmp_path / "run", ["wait", "wait"], OK) as run:
        (run.folder.recover_dir / "point_000008").mkdir(parents=True)
        first = run.pids("server-0", "trainer-0", "trainer-1")
        os.kill(run.pid("trainer-1"), signal.SIGKILL)
        run.until(lambda: "restart 1 of at most 3, from recovery point point_000008" in run.text(), "restart")
        second = run.pids("server-0", "trainer-0", "trainer-1", old=tuple(first))
        assert (
            json.loads(run.folder.state_json.read_text())["attempt"] == 2 and run.folder.log("trainer-1", "2").exists()
        )
        (run.folder.root / "go").touch()
        assert run.wait() == 0
        assert "trainer-1 (pid" in run.text() and "was killed by SIGKILL" in run.text()
        assert not any(map(is_alive, first + second))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_frozen_server_is_replaced_alone(number, tmp_path):
    with Launched(tmp_path / "run", ["wait"], ["ok", "ok"], **{"watchdog.stall_s": 2.0}) as run:
        pid, other, trainer = run.pids("server-1", "server-0", "trainer-0")
        first = run.folder.servers.read_text().splitlines()
        os.kill(pid, number)
        run.pid("server-1", old=(pid,))
        run.until(lambda: run.folder.servers.read_text().splitlines() != first, "new address")
        second = run.folder.servers.read_text().splitlines()
        assert second[0] == first[0] and len(second) == 2
        host, port = second[1].split(":")
        socket.create_connection((host, int(port)), timeout=10).close()
        assert not is_alive(pid) and is_alive(other) and is_alive(trainer)
        (run.folder.root / "go").touch()
        assert run.wait() == 0, run.text()
        assert "server-1 alone: restart 1 of at most 3" in run.text()
        assert number == signal.SIGKILL or f"server-1 (pid {pid}) has been silent" in run.text()


def test_a_server_that_keeps_dying_is_given_up_and_not_blamed_for_what_happens_later(tmp_path):
    with Launched(tmp_path / "run", ["fail later"], ["ok", "worker"], **{"recover.max_restarts": 1}) as run:
        pid, trainer = run.pids("server-1", "trainer-0")
        os.kill(pid, signal.SIGKILL)
        second = run.pid("server-1", old=(pid,))
        worker = run.folder.root / f"worker-{second}"
        run.until(worker.exists, "worker of the server")
        os.kill(second, signal.SIGKILL)
        run.until(lambda: "server-1 is not started again" in run.text(), "end of the restarts")
        run.until(lambda: len(run.folder.servers.read_text().splitlines()) == 1, "shorter list")
        assert is_alive(trainer) and not is_alive(int(worker.read_text()))
        (run.folder.root / "go").touch()
        assert run.wait() == 1
        assert "the run stopped: trainer-0" in run.text() and "of at most 1, from the start" not in run.text()


def test_when_no_server_is_left_the_run_is_restarted(tmp_path):
    with Launched(tmp_path / "run", ["wait"], OK, **{"recover.max_restarts": 1}) as run:
        trainer, pid = run.pids("trainer-0", "server-0")
        os.kill(pid, signal.SIGKILL)
        os.kill(run.pid("server-0", old=(pid,)), signal.SIGKILL)
        run.until(lambda: "restart 1 of at most 1, from the start" in run.text(), "restart of the run")
        run.pid("trainer-0", old=(trainer,))
        (run.folder.root / "go").touch()
        assert run.wait() == 0, run.text()
        assert "the run stopped: server-0 (pid" in run.text()


def test_the_killed_process_is_blamed_not_its_victim(tmp_path):
    with Launched(tmp_path / "run", ["follow"], OK, **{"recover.max_restarts": 0}) as run:
        run.pid("trainer-0")
        os.kill(run.pid("server-0"), signal.SIGKILL)
        assert run.wait() == 1
        assert "the run stopped: server-0 (pid" in run.text() and "trainer-0 ended too (exit code 1)" in run.text()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"recover.max_restarts": 0}, "recover.mode is auto, recover.max_restarts 0"),
        ({"recover.mode": "off"}, "recover.mode is off"),
    ],
)
def test_restarts_end_where_the_configuration_says(overrides, said, tmp_path):
    with Launched(tmp_path / "run", WAITING, OK, **overrides) as run:
        os.kill(run.pid("trainer-0"), signal.SIGKILL)
        assert run.wait() == 1
        assert said in run.text()


def test_fresh_refuses_a_used_folder(tmp_path):
    folder = RunFolder(tmp_path / "run").create()
    folder.ledger.write_text("{}\n")
    with pytest.raises(RecoveryError, match=r"holds an earlier run \(ledger.jsonl\)"):
        launch(lambda _: plan_of(folder.root, ["step"], OK), config_with({"recover.mode": "fresh"}), folder)
