"""Runs on the nodes of a real Ray cluster, two raylets of this machine: what they are given, who is lost, and that
nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from support.dummies import is_alive
from support.ray_nodes import OnRay, RayNodes
from support.runs import TINY, Run

from arealite.api.cli_args import ClusterSpecConfig
from arealite.api.errors import ConfigError
from arealite.launcher.ray_cluster import bundle_of
from arealite.observe.processes import processes_of_run


def node(address, cpus, gpus=0, is_alive=True):
    resources = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    return {"Alive": is_alive, "NodeManagerAddress": address, "Resources": resources}


NODES = [node("10.0.0.1", 4.0), node("10.0.0.2", 64.0, 8.0), node("10.0.0.3", 32.0, 8.0), node("10.0.0.4", 96.0, 4.0)]


@pytest.mark.parametrize(
    "cluster, bundle",
    [
        ({"num_nodes": 1}, {"CPU": 64, "GPU": 8}),
        ({"num_nodes": 2}, {"CPU": 32, "GPU": 8}),
        ({"num_nodes": 3}, {"CPU": 32, "GPU": 4}),
        ({"num_nodes": 4}, {"CPU": 4}),
        ({"num_nodes": 3, "num_gpus_per_node": 2, "num_cores_per_node": 16}, {"CPU": 16, "GPU": 2}),
        ({"num_nodes": 4, "num_gpus_per_node": 0, "num_cores_per_node": 4}, {"CPU": 4}),
    ],
)
def test_each_node_gives_what_the_smallest_of_the_largest_has(cluster, bundle):
    assert bundle_of(ClusterSpecConfig(**cluster), NODES) == bundle


@pytest.mark.parametrize(
    "cluster, num_missing",
    [
        ({"num_nodes": 3, "num_gpus_per_node": 8}, 1),
        ({"num_nodes": 2, "num_cores_per_node": 80, "num_gpus_per_node": 8}, 2),
        ({"num_nodes": 6, "num_gpus_per_node": 0, "num_cores_per_node": 1}, 2),
        ({"num_nodes": 9}, 5),
    ],
)
def test_too_few_or_too_small_nodes_are_refused_by_number(cluster, num_missing):
    with pytest.raises(ConfigError, match=f"and {num_missing} of these are missing .*10.0.0.2 with 64 CPUs and 8 GPUs"):
        bundle_of(ClusterSpecConfig(**cluster), NODES)


def test_a_cluster_without_living_nodes_is_refused():
    with pytest.raises(ConfigError, match="and 1 of these are missing"):
        bundle_of(ClusterSpecConfig(), [node("10.0.0.1", 4.0, is_alive=False)])


@pytest.fixture(scope="module")
def ray_nodes():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'arealite[ray]'")
    with RayNodes() as nodes:
        yield nodes


@pytest.fixture
def on_ray(ray_nodes, tmp_path):
    """on_ray(trainers, servers, **overrides) -> a run of dummies; afterwards nothing of it is left."""
    env = {**ray_nodes.env, **{f"MANY_{i}": f'a "b" $(c)\n{i}' for i in range(200)}}
    folder = tmp_path / "a run"
    for index in (0, 1):
        if not ray_nodes.is_alive(index):
            ray_nodes.start(index)
    yield lambda trainers, servers, **overrides: OnRay(folder, trainers, servers, env, **overrides)
    end = time.monotonic() + 30
    while processes_of_run(folder.resolve()) and time.monotonic() < end:
        time.sleep(0.1)
    assert processes_of_run(folder.resolve()) == {}


def test_processes_of_all_nodes_run_with_the_whole_environment(on_ray):
    with on_ray(["step", "environment@1"], ["ok", "ok@1"]) as run:
        assert run.wait() == 0, run.text()
    env = json.loads((run.folder.root / "trainer-1.env").read_text())
    assert all(env[f"MANY_{i}"] == f'a "b" $(c)\n{i}' for i in range(200))
    assert env["AREALITE_SLOT"] == "1" and env["AREALITE_ADDRESS"] == "127.0.0.3" and "AREALITE_RUN_KEY" not in env
    hosts = [address.split(":")[0] for address in env["AREAL_LLM_SERVER_ADDRS"].split(",")]
    assert hosts == ["127.0.0.2", "127.0.0.3"]
    assert "step 1" in run.text() and "nodes: 0" in run.text()  # what the head shows


def test_a_failure_is_the_exit_code_and_its_error_is_shown(on_ray):
    with on_ray(["wait", "raise@1"], ["ok"]) as run:
        assert run.wait() == 1 and "ValueError: first real error" in run.text()


def test_a_signal_to_the_driver_stops_the_run(on_ray):
    with on_ray(["wait", "wait@1"], ["ok@1"]) as run:
        pids = run.pids("server-0", "trainer-0", "trainer-1")
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 143, run.text()
        assert not any(map(is_alive, pids)) and " is lost" not in run.text()


def test_all_ends_with_a_driver_that_is_killed(on_ray):
    with on_ray(["wait", "wait@1"], ["ok", "ok@1"]) as run:
        pids = run.pids("server-0", "server-1", "trainer-0", "trainer-1")
        run.process.kill()
        end = time.monotonic() + 30
        while any(map(is_alive, pids)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(map(is_alive, pids))


def test_a_node_that_is_lost_is_named_and_another_takes_its_place(on_ray, ray_nodes):
    with on_ray(["wait"], ["ok", "ok@1"]) as run:
        first, trainer = run.pids("server-1", "trainer-0")
        ray_nodes.kill(1)
        began = time.monotonic()
        run.until(lambda: "(127.0.0.3), slot 1, is lost: " in run.text(), "name of the lost node")
        run.until(lambda: "slot 1 waits for a node of Ray, in place of " in run.text(), "word of what is waited for")
        assert time.monotonic() - began < 20
        ray_nodes.start(1)
        run.pid("server-1", old=(first,))
        assert is_alive(trainer) and not is_alive(first)
        (run.folder.root / "go").touch()
        assert run.wait() == 0, run.text()


def test_an_agent_that_is_killed_is_named_and_started_again(on_ray):
    with on_ray(["wait"], ["ok", "ok@1"]) as run:
        first, trainer = run.pids("server-1", "trainer-0")
        psutil.Process(first).parent().kill()
        run.pid("server-1", old=(first,))
        assert "slot 1, is lost: its agent was killed by SIGKILL" in run.text() and is_alive(trainer)
        (run.folder.root / "go").touch()
        assert run.wait() == 0, run.text()


def test_two_runs_on_the_same_nodes_do_not_touch_each_other(on_ray, ray_nodes, tmp_path):
    one_core = {"cluster.num_cores_per_node": 1}
    with (
        on_ray(["wait"], ["ok@1"], **one_core) as first,
        OnRay(tmp_path / "another", ["wait"], ["ok@1"], ray_nodes.env, **one_core) as second,
    ):
        pids = [run.pids("server-0", "trainer-0") for run in (first, second)]
        first.process.send_signal(signal.SIGTERM)
        assert first.wait() == 143 and not any(map(is_alive, pids[0])), first.text()
        assert all(map(is_alive, pids[1])) and " is lost" not in second.text()
        (second.folder.root / "go").touch()
        assert second.wait() == 0, second.text()
    assert processes_of_run((tmp_path / "another").resolve()) == {}


def test_the_run_ends_with_the_node_of_its_head(on_ray):
    with on_ray(["wait", "wait@1"], ["ok@1"]) as run:
        pids = run.pids("launcher", "server-0", "trainer-0", "trainer-1")
        psutil.Process(pids[0]).parent().kill()  # the actor
        assert run.wait() == 1 and "(127.0.0.2), slot 0, is lost: " in run.text()
        end = time.monotonic() + 30
        while any(map(is_alive, pids)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(map(is_alive, pids))


def test_a_cluster_that_is_not_there_is_refused(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'arealite[ray]'")
    env = {**os.environ, "RAY_ADDRESS": "nowhere"}
    path = "examples/arealite/quickstart"
    command = [sys.executable, "-m", "arealite.cli", "run", f"{path}.py", "--config", f"{path}.yaml"]
    command += ["launcher.type=ray", f"cluster.fileroot={tmp_path}"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 2 and "cannot join the Ray cluster 'nowhere'" in ran.stderr, ran.stderr


class Quickstart(Run):
    tiny = (
        *TINY, "actor.path={model}", "rollout.max_head_offpolicyness=0", "server.deterministic=true",
        "evaluator.freq_steps=null", "total_train_steps=3", "weight_update=distributed",
    )  # fmt: skip


def test_the_quickstart_makes_the_same_steps_on_ray_as_on_one_machine(tmp_path, tiny_llama, ray_nodes, monkeypatch):
    with Quickstart(tmp_path / "one", tiny_llama) as one:
        one.succeed()
    for name, value in ray_nodes.env.items():
        monkeypatch.setenv(name, value)
    with Quickstart(tmp_path / "two", tiny_llama, "launcher.type=ray", "cluster.num_nodes=2") as two:
        two.succeed()
    losses = [[line["loss"] for line in run.steps()] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[1]) == 3
    assert [s["reward_mean"] for s in two.steps()] == [s["reward_mean"] for s in one.steps()]
