"""A head and agents, all real processes: what they start, who is lost, who is fenced, and that nothing stays behind."""

import json
import os
import re
import signal
import socket
import subprocess
import time

import pytest
from support.dummies import Launched, is_alive
from support.nodes import HEAD_ENV, Agent

from arealite.launcher.rendezvous import FILE, AgentLine, read
from arealite.observe.processes import processes_of_run

SILENCE_S = 6.0
HALF_WAY = ("restart 1 of at most 3, from", "restart of the run")


def over_two_nodes(folder, trainers, servers, **overrides):
    settings = {"cluster.num_nodes": 2, "launcher.node_silence_s": SILENCE_S, **overrides}
    return Launched(folder, trainers, servers, env=HEAD_ENV, **settings)


def gone(pids):
    end = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


@pytest.fixture
def folder(tmp_path):
    yield tmp_path / "run"
    assert processes_of_run((tmp_path / "run").resolve()) == {}


def test_processes_of_all_nodes_run_and_everybody_leaves(folder):
    with over_two_nodes(folder, ["step", "environment@1"], ["ok", "ok@1"]) as run, Agent(folder, 1) as agent:
        assert run.wait() == 0, run.text() + agent.text()
        assert agent.process.wait(20) == 0, agent.text()
        env = json.loads((folder / "trainer-1.env").read_text())
        hosts = [address.split(":")[0] for address in env["AREAL_LLM_SERVER_ADDRS"].split(",")]
        assert hosts == ["127.0.0.2", "127.0.0.3"] and env["AREALITE_SLOT"] == "1"
        assert env["GLOO_SOCKET_IFNAME"] == "lo" and "AREALITE_RUN_KEY" not in env
        assert (folder / FILE).stat().st_mode & 0o777 == 0o600
        meeting = read(folder)
        for port in (meeting.port, int(env["AREAL_LLM_SERVER_ADDRS"].rpartition(":")[2])):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((meeting.host if port == meeting.port else "127.0.0.3", port))
        keys = {env["AREALITE_API_KEY"], env["AREALITE_ADMIN_API_KEY"]}
        shown = [p.read_text() for p in folder.rglob("*") if p.suffix in (".json", ".log", ".yaml")] + [agent.text()]
        assert len(keys) == 2 and not any(key in text for key in keys for text in shown)
        plan = json.loads((folder / "plan.json").read_text())
        assert [p["node"] for p in plan["processes"]] == [0, 1, 0, 1]


def test_the_first_error_of_another_node_is_shown(folder):
    with over_two_nodes(folder, ["wait", "raise@1"], ["ok"]) as run, Agent(folder, 1) as agent:
        assert run.wait() == 1
        assert "trainer-1 (pid" in run.text() and "ValueError: first real error" in run.text()
        assert "trainer-1.log on node" in run.text() and agent.process.wait(20) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_trainer_of_another_node_is_named_and_all_start_again(folder, number):
    settings = {"watchdog.stall_s": 6.0, "watchdog.action": "restart"}
    with over_two_nodes(folder, ["wait", "wait@1"], ["ok"], **settings) as run, Agent(folder, 1):
        first = run.pids("trainer-0", "trainer-1")
        os.kill(first[1], number)
        run.until(lambda: HALF_WAY[0] in run.text(), HALF_WAY[1])
        how = "was killed by SIGKILL" if number == signal.SIGKILL else "has been silent for"
        assert f"trainer-1 (pid {first[1]}) {how}" in run.text() and gone(first)
        run.pids("trainer-0", "trainer-1", old=tuple(first))
        (folder / "go").touch()
        assert run.wait() == 0, run.text()


def test_a_server_of_a_lost_node_comes_back_with_it(folder):
    with over_two_nodes(folder, ["wait"], ["ok", "ok@1"]) as run, Agent(folder, 1) as agent:
        first, trainer = run.pids("server-1", "trainer-0")
        agent.process.kill()
        began = time.monotonic()
        run.until(lambda: "server-1 (pid" in run.text() and "is lost: node" in run.text(), "name of the lost one")
        assert time.monotonic() - began < 10 and gone([first])
        agent.process.wait(20)
        agent.start()
        run.pid("server-1", old=(first,))
        assert is_alive(trainer)
        (folder / "go").touch()
        assert run.wait() == 0, run.text()


def test_a_lost_trainer_is_a_restart_on_the_nodes_that_are_left(folder):
    with over_two_nodes(folder, ["wait", "wait@1"], ["ok@1"]) as run, Agent(folder, 1) as agent:
        first = run.pids("server-0", "trainer-0", "trainer-1")
        agent.process.kill()
        run.until(lambda: HALF_WAY[0] in run.text(), HALF_WAY[1])
        assert gone(first)
        run.pids("server-0", "trainer-0", "trainer-1", old=tuple(first))
        (folder / "go").touch()
        assert run.wait() == 0, run.text()
        assert "the connection was closed" in run.text()


def test_a_frozen_agent_is_fenced(folder):
    with over_two_nodes(folder, ["wait", "wait@1"], ["ok"]) as run, Agent(folder, 1) as agent:
        old = run.pid("trainer-1")
        agent.process.send_signal(signal.SIGSTOP)
        run.until(lambda: HALF_WAY[0] in run.text(), HALF_WAY[1])
        assert "nothing was heard for" in run.text()
        run.pid("trainer-1", old=(old,))  # on the first node, which is left
        agent.process.send_signal(signal.SIGCONT)
        assert gone([old])
        run.until(lambda: agent.text().count("joined as slot 1") == 2, "new life of the agent")
        (folder / "go").touch()
        assert run.wait() == 0 and agent.process.wait(20) == 0, run.text() + agent.text()


def test_a_silence_is_told_before_it_is_the_end(folder):
    silence = {"launcher.node_silence_s": 60.0}
    with over_two_nodes(folder, ["wait", "wait@1"], ["ok"], **silence) as run, Agent(folder, 1) as agent:
        old = run.pids("server-0", "trainer-0", "trainer-1")
        agent.process.send_signal(signal.SIGSTOP)
        run.until(lambda: "says nothing for 6 s" in run.text(), "word of the silence")
        agent.process.send_signal(signal.SIGCONT)
        run.until(lambda: "speaks again" in run.text(), "word of the node")
        assert run.pids("server-0", "trainer-0", "trainer-1") == old
        (folder / "go").touch()
        assert run.wait() == 0, run.text()


def test_agents_end_all_when_the_head_is_killed_and_wait_for_the_next(folder):
    with Agent(folder, 1) as agent:
        with over_two_nodes(folder, ["wait", "wait@1"], ["ok@1"]) as run:
            first = run.pids("server-0", "trainer-0", "trainer-1")
            run.process.kill()
            run.wait()
            assert gone(first)
        epoch = read(folder).epoch
        (folder / "go").touch()
        with over_two_nodes(folder, ["wait", "wait@1"], ["ok@1"]) as run:
            assert run.wait() == 0, run.text() + agent.text()
            assert read(folder).epoch == epoch + 1 and agent.process.wait(20) == 0


def test_a_head_that_was_frozen_starts_again(folder):
    with over_two_nodes(folder, ["wait", "wait@1"], ["ok"]) as run, Agent(folder, 1) as agent:
        first = run.pid("trainer-1")
        run.process.send_signal(signal.SIGSTOP)
        assert gone([first])
        run.process.send_signal(signal.SIGCONT)
        run.pid("trainer-1", old=(first,))
        (folder / "go").touch()
        assert run.wait() == 0, run.text() + agent.text()


def test_strangers_wrong_slots_and_twins_are_sent_away(folder):
    with over_two_nodes(folder, ["wait", "wait@1"], ["ok"]) as run, Agent(folder, 1):
        run.pid("trainer-1")
        meeting = read(folder)
        with pytest.raises(ConnectionError, match="no handshake"):
            AgentLine(socket.create_connection((meeting.host, meeting.port)), "00" * 32, is_head=False)
        run.until(lambda: "sent away: no handshake" in run.text(), "word of the stranger")
        with socket.create_connection((meeting.host, meeting.port)), Agent(folder, 7) as third:  # says nothing
            assert third.process.wait(20) == 2 and "slot 7, expected 1 to 1" in third.text()
        with Agent(folder, 1, "--limit-s", "2") as twin:
            twin.log.write_text("")
            assert twin.process.wait(20) == 86 and "slot 1 is taken by node" in twin.text()
        (folder / "go").touch()
        assert run.wait() == 0


def test_nodes_that_do_not_come_are_named_and_bad_ones_are_left_out(folder, tmp_path):
    with over_two_nodes(folder, ["step"], ["ok@1"], **{"launcher.node_timeout_s": 1.5}) as run:
        assert run.wait() == 1
        assert "node of slot 1 has not come yet" in run.text() and "launcher.node_timeout_s" in run.text()
    other = tmp_path / "packages" / "torch-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    path = os.pathsep.join([str(other.parent), os.environ.get("PYTHONPATH", "")])
    # The other one sees all of the folder, and can write nothing into it.
    bound = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"']
    with (
        over_two_nodes(folder, ["step"], ["ok@1"], **{"cluster.num_nodes": 3}) as run,
        Agent(folder, 1, PYTHONPATH=path) as one,
        Agent(folder, 2, under=[*bound, str(folder)]) as two,
    ):
        assert run.wait() == 0 and [agent.process.wait(20) for agent in (one, two)] == [0, 0], run.text() + two.text()
        assert re.search(r"\n +1 .* LEFT OUT: node .* has torch 9\.9, \S+ on node", run.text()), run.text()
        assert re.search(r"\n +2 .* LEFT OUT: node .* Read-only file system", run.text())


def test_a_node_that_is_asked_to_stop_stops_the_run(folder):
    with over_two_nodes(folder, ["wait"], ["ok@1"]) as run, Agent(folder, 1) as agent:
        run.pids("server-0", "trainer-0")
        agent.process.send_signal(signal.SIGTERM)
        assert run.wait() == 143 and agent.process.wait(20) == 143
        assert "was asked to stop" in run.text()


def test_nodes_without_a_shared_folder(folder, tmp_path):
    """The agent's view of the run folder is an empty file system of its own."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        place = f"127.0.0.2:{probe.getsockname()[1]}"
    env = {"AREALITE_HEAD": place, "AREALITE_RUN_KEY": "5a" * 32}
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder)]
    if subprocess.run([*mounted, "true"], check=False, capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    settings = {"cluster.num_nodes": 2, "launcher.node_silence_s": SILENCE_S, "watchdog.stall_s": 6.0}
    with (
        Launched(folder, ["wait"], ["ok", "ok@1"], env=HEAD_ENV | env, **settings) as run,
        Agent(folder, 1, under=mounted, **env),
    ):
        pid = run.pid("server-1")  # its heartbeat has come over the connection
        assert not (folder / "logs" / "attempt_1" / "server-1.log").exists()
        os.kill(pid, signal.SIGSTOP)
        run.pid("server-1", old=(pid,))
        assert f"server-1 (pid {pid}) has been silent" in run.text() and "frozen" in run.text()
        (folder / "go").touch()
        assert run.wait() == 0, run.text()
