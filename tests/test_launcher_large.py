"""1,024 processes on 128 nodes: their plan, their coming together over real sockets, and their supervision in virtual
time, since no machine of a test could run them."""

import heapq
import itertools
import signal
import socket
import threading
import time as real_time
from dataclasses import asdict

import pytest

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import ConfigError
from arealite.launcher import head as head_module
from arealite.launcher import keeper as keeper_module
from arealite.launcher import supervisor as supervisor_module
from arealite.launcher.agent import ADDRESS_VARIABLE
from arealite.launcher.head import RunHead
from arealite.launcher.machine import Machine, versions
from arealite.launcher.plan import make_plan
from arealite.launcher.rendezvous import AgentLine
from arealite.launcher.supervisor import RunFailed, Supervisor
from arealite.observe import processes, waits, watchdog
from arealite.observe.processes import Heartbeat
from arealite.observe.run_folder import RunFolder

NUM_NODES, NUM_GPUS, NUM_SERVERS, NUM_RANKS = 128, 8, 512, 512
MACHINE = Machine(tuple(range(64)), tuple(map(str, range(NUM_GPUS))))


def large_config():
    config = GRPOConfig(allocation_mode=f"native:d{NUM_SERVERS}+fsdp:d{NUM_RANKS}", weight_update="distributed")
    config.cluster.num_nodes, config.watchdog.heartbeat_s = NUM_NODES, 5.0
    return config


def plan_on(machines, config=None):
    return make_plan(config or large_config(), machines, "model", ("train.py",))


def test_every_process_has_a_device_of_its_own():
    plan = plan_on([MACHINE] * NUM_NODES)
    assert len(plan.processes) == len({p.name for p in plan.processes}) == 1024
    places = [(p.node, device) for p in plan.processes for device in p.devices]
    assert len(places) == len(set(places)) == NUM_NODES * NUM_GPUS
    ranks = [p.env for p in plan.trainers]
    assert [env["RANK"] for env in ranks] == [str(i) for i in range(NUM_RANKS)]
    assert [p.node for p in plan.trainers] == [i // NUM_GPUS for i in range(NUM_RANKS)]
    assert all(env["LOCAL_RANK"] == str(i % NUM_GPUS) and env["WORLD_SIZE"] == "512" for i, env in enumerate(ranks))
    assert {p.node for p in plan.servers} == set(range(NUM_RANKS // NUM_GPUS, NUM_NODES))


class VirtualTime:
    """In place of the module `time`: sleeping costs nothing but what is due meanwhile."""

    def __init__(self):
        self.now, self._due, self._numbers = 1000.0, [], itertools.count()

    def monotonic(self):
        return self.now

    time = monotonic

    def __getattr__(self, name):
        return getattr(real_time, name)

    def after(self, delay_s, act):
        heapq.heappush(self._due, (self.now + delay_s, next(self._numbers), act))

    def sleep(self, seconds):
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            self.now, _, act = heapq.heappop(self._due)
            act()
        self.now = end


@pytest.fixture
def clock(monkeypatch):
    made = VirtualTime()
    for module in (supervisor_module, keeper_module, head_module, processes, waits, watchdog):
        monkeypatch.setattr(module, "time", made)
    return made


class Process:
    """What a StartedProcess shows of a process that exists in virtual time only."""

    status, log = "running", "its log"

    def __init__(self, plan, pid):
        self.plan, self.pid, self.port = plan, pid, 0
        self.exit_code, self.text = None, ""

    @property
    def name(self):
        return self.plan.name

    def end(self, code, text=""):
        if self.exit_code is None:
            self.exit_code, self.text = code, text

    def send(self, number, is_alone=False):
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.end(-number)

    def kill(self):
        self.end(-signal.SIGKILL)

    def output(self):
        return self.text

    def obituary(self, brief=False):
        return f"{self.name} (pid {self.pid}) ended with {self.exit_code}"

    def echo(self, limit_s=0.0): ...

    def close(self): ...


class Node:
    """Of the cluster's; `loss` as in Hands."""

    machine, loss = MACHINE, ""

    def __init__(self, cluster, number):
        self.cluster, self.name, self.address = cluster, f"node-{number}", f"127.0.0.{number + 1}"
        self.started = []

    def start(self, plan, head, env):
        made = Process(plan, next(self.cluster.pids))
        self.started.append(made)
        self.cluster.start(self, made)
        return made

    def clean(self):
        return []

    def lose(self):
        self.loss = f"node {self.name} is lost"
        for process in self.started:
            process.kill()


class Cluster:
    """Nodes whose servers answer `start_s(slot)` after their start, and whose trainers work for `work_s`."""

    def __init__(self, clock, folder, start_s, work_s):
        self.clock, self.folder, self.start_s, self.work_s = clock, RunFolder(folder).create(), start_s, work_s
        self.pids, self.by_place, self.frozen = itertools.count(1), {}, set()
        self.nodes = [Node(self, number) for number in range(NUM_NODES)]
        self.all_up_s = self.last_trainer_s = 0.0

    def start(self, node, made):
        if made.plan.role == "trainer":
            self.last_trainer_s = self.clock.now
            self.clock.after(self.work_s, lambda: made.end(0))
            if made.plan.slot == 0:
                Heartbeat(made.pid, made.name, 1, [], {}).write(self.folder.waits_dir / "trainer-0.json")
            return

        def listen():
            made.port = 20000 + made.pid
            self.by_place[node.address, made.port] = made

        self.clock.after(self.start_s(made.plan.slot), listen)

    def answers(self, host, port, path, limit_s):
        made = self.by_place.get((host, port))
        if made is not None and made.name in self.frozen:
            self.clock.sleep(limit_s)
            return False
        self.clock.sleep(0.001)
        return made is not None and made.exit_code is None

    def run(self, monkeypatch, config):
        monkeypatch.setattr(keeper_module, "answers", self.answers)
        plan = plan_on([node.machine for node in self.nodes], config)
        Supervisor(plan, config, self.folder, self.nodes, []).run()

    def addresses(self):
        return self.folder.servers.read_text().split()


def test_a_thousand_processes_start_lose_a_node_and_end(clock, tmp_path, monkeypatch, capfd):
    """Servers are seen soon after they are up; eight that are lost with their node come back with it, alone."""
    config = large_config()
    config.launcher.node_timeout_s = 60.0
    cluster = Cluster(clock, tmp_path / "run", lambda slot: 20 + slot % 40, 120.0)
    began, lost = clock.now, cluster.nodes[100]
    told = []

    def lose():
        told.append(len(cluster.addresses()))
        lost.lose()

    def come_back():
        told.append(len(lost.started))
        lost.loss = ""

    clock.after(90, lose)
    clock.after(120, come_back)
    cluster.run(monkeypatch, config)
    # The slowest server is up after 59 s.
    assert cluster.last_trainer_s - began < 59 + 5
    assert told == [NUM_SERVERS, 8] and [p.name for p in lost.started[8:]] == [p.name for p in lost.started[:8]]
    assert len(set(cluster.addresses())) == NUM_SERVERS
    assert {p.exit_code is None for node in cluster.nodes for p in node.started} == {False}
    assert sum(len(node.started) for node in cluster.nodes) == 1024 + 8
    told = capfd.readouterr().err
    assert all(f"{p.name} alone: restart 1 of at most 3" in told for p in lost.started)


def test_frozen_servers_do_not_hide_the_others(clock, tmp_path, monkeypatch):
    """One that takes connections and says nothing costs its own limit, and the start ends with its name."""
    config = large_config()
    cluster = Cluster(clock, tmp_path / "run", lambda slot: 5.0, 10.0)
    cluster.frozen = {"server-7", "server-8"}
    config.launcher.startup_timeout_s = 60.0
    began = clock.now
    with pytest.raises(RunFailed, match="server-7, server-8.* see launcher.startup_timeout_s"):
        cluster.run(monkeypatch, config)
    assert clock.now - began < 60 + 15


def test_the_first_of_512_ranks_to_die_is_named(clock, tmp_path, monkeypatch):
    cluster = Cluster(clock, tmp_path / "run", lambda slot: 1.0, 200.0)
    lost = "arealite.api.errors.ArealiteError: Connection closed by peer"

    def all_end():
        ranks = [p for node in cluster.nodes for p in node.started if p.plan.role == "trainer"]
        for rank in ranks:
            clock.after(0.01 * (rank.plan.slot + 1), lambda rank=rank: rank.end(1, lost))
        ranks[300].end(-signal.SIGKILL)

    clock.after(50.0, all_end)
    with pytest.raises(RunFailed) as failed:
        cluster.run(monkeypatch, large_config())
    assert str(failed.value).startswith("trainer-300 (pid") and failed.value.may_restart
    assert {p.exit_code is None for node in cluster.nodes for p in node.started} == {False}


def test_agents_of_all_nodes_come_together_and_some_are_lost(tmp_path, monkeypatch, clock, capfd):
    """Handshakes over real sockets; a bad node is left out, and the nodes that are left get a plan of their own."""
    monkeypatch.setenv(ADDRESS_VARIABLE, "127.0.0.1")
    monkeypatch.setattr(clock, "sleep", lambda s, sleep=clock.sleep: (real_time.sleep(0.001), sleep(s)))
    config = large_config()
    config.allocation_mode = f"native:d{NUM_SERVERS - 3 * NUM_GPUS}+fsdp:d{NUM_RANKS}"
    monkeypatch.setattr(Machine, "local", lambda cluster: MACHINE)
    head = RunHead(config, RunFolder(tmp_path).create(), [])
    agents, packages = [], versions()
    for slot in range(1, NUM_NODES):
        plain = socket.create_connection((head.meeting.host, head.meeting.port))
        line = AgentLine(plain, head.meeting.key, is_head=False)
        line.send(slot=slot, epoch=0, name=f"node-{slot}", pid=slot)
        assert line.receive(10.0)["epoch"] == head.meeting.epoch
        machine = asdict(MACHINE) | {"name": f"node-{slot}"}
        own = packages | {"torch": "9.9"} if slot == 7 else packages
        told = {"machine": machine, "versions": own, "clock": clock.time() + slot, "shares": True, "ended": []}
        line.send(address=f"10.0.0.{slot}", **told)
        agents.append(line)

    def needs_all(machines):
        raise ConfigError(f"it needs {NUM_NODES} nodes, and there are {len(machines)}")

    with pytest.raises(
        ConfigError, match="^node node-7 has torch 9.9, .*: install the same on both\nit needs 128 .* 127"
    ):
        head.gather(needs_all)
    plan, nodes = head.gather(lambda machines: plan_on(machines, config))
    assert [node.name for node in nodes[1:]] == [f"node-{slot}" for slot in range(1, NUM_NODES) if slot != 7]
    assert plan.num_nodes == NUM_NODES - 1 and len(plan.processes) == 1000
    table = [line.split() for line in capfd.readouterr().err.splitlines() if line.startswith("  ")]
    assert len(table) == 1 + NUM_NODES and table[8][1:] == ["node-7", "10.0.0.7", "64", "8", "unknown", "unknown"] + [
        "shared", "+7.0", "s", "LEFT", "OUT:", *str(head.far[6].unfit).split()
    ]  # fmt: skip
    for line in agents[10:12]:
        line.close()
    while sum(bool(node.loss) for node in head.far) < 2:
        real_time.sleep(0.001)
    plan, nodes = head.gather(lambda machines: plan_on(machines, config))
    said = capfd.readouterr().err.splitlines()
    assert all(f"arealite: node node-{slot} is lost: the connection was closed" in said for slot in (11, 12))
    assert len(nodes) == NUM_NODES - 3 and {p.node for p in plan.processes} == set(range(NUM_NODES - 3))
    closing = threading.Thread(target=head.close, args=(0,), daemon=True)
    closing.start()
    for line in [*agents[:10], *agents[12:]]:
        assert line.receive(10.0) == {"leave": 0}
        line.send(of=1, code=0, tail="")  # what an agent tells while it is let go resets no connection
        line.send()
        line.close()
    closing.join(20)
    assert not closing.is_alive()
