"""Whole runs over two nodes of this machine, each with an address of its own: the same steps as on one node."""

import json
import os
import signal

import pytest
from support.nodes import HEAD_ENV, Agent
from support.runs import TINY, Run
from test_run_supervised import SFTRun

NODES = ("cluster.num_nodes=2", "launcher.node_silence_s=15")
# Prompts in the order of the data set, and answers that do not depend on what else runs.
SYNCHRONOUS = ("rollout.max_head_offpolicyness=0", "server.deterministic=true", "evaluator.freq_steps=null")
# A random model earns nothing: it learns from its entropy.
SYNCHRONOUS += ("actor.entropy_weight=0.1", "evaluator.at_start=false")


@pytest.fixture
def several(monkeypatch):
    monkeypatch.setenv(*next(iter(HEAD_ENV.items())))


class Quickstart(Run):
    tiny = (*TINY, "actor.path={model}", *SYNCHRONOUS, "total_train_steps=3")


def losses(run):
    return [line["loss"] for line in run.steps()]


def answers(run):
    files = sorted((run.folder / "rollouts").iterdir())
    return [json.loads(line)["completion"] for file in files for line in file.read_text().splitlines()]


def test_the_server_on_another_node_changes_no_step(tmp_path, tiny_llama, several):
    with Quickstart(tmp_path / "one", tiny_llama, "weight_update=distributed") as one:
        one.succeed()
    with Quickstart(tmp_path / "two", tiny_llama, *NODES) as two, Agent(two.folder, 1) as agent:
        two.succeed()
        assert agent.process.wait(20) == 0
    assert "server-0 on " in two.text() and "weight_update: distributed" in (two.folder / "config.yaml").read_text()
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len(losses(two)) == 3
    assert all(losses(one)) and answers(two) == answers(one) and len(set(answers(one))) > 8


def test_ranks_on_two_nodes_change_no_step_and_survive_the_loss_of_one(tmp_path, tiny_llama, several):
    with SFTRun(tmp_path / "one", tiny_llama, "allocation_mode=fsdp:d2") as one:
        one.succeed()
    with SFTRun(tmp_path / "two", tiny_llama, "allocation_mode=fsdp:d2", *NODES) as two, Agent(two.folder, 1) as agent:
        two.until(lambda: len(two.metrics()) >= 3, "three steps")
        os.kill(agent.process.pid, signal.SIGKILL)
        agent.process.wait(20)
        agent.start()
        assert two.succeed()["num_restarts"] == 1
        assert "trainer-1 (pid" in two.text() and "is lost: node" in two.text()
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len(losses(two)) == 8
