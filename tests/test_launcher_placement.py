"""A plan over several nodes: where servers and ranks lie, with which devices and cores, and what does not fit."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_launcher_plan import GRPO, SCRIPT, file_of, gpu_machine, plan_for

from arealite.api.cli_args import GRPOConfig, PPOCriticConfig, SFTConfig, TrainEngineConfig
from arealite.api.errors import ConfigError
from arealite.api.load_config import load_run_config
from arealite.inference.serve import parse_arguments
from arealite.launcher.machine import Machine
from arealite.launcher.plan import make_plan

SPREAD = [  # (allocation, nodes, GPUs of each or 0, nodes of the servers, nodes of the ranks)
    ("native:d1+fsdp:d1", 2, 0, [1], [0]),
    ("native:d2+fsdp:d2", 2, 0, [1, 1], [0, 0]),
    ("native:d1+fsdp:d2", 3, 0, [2], [0, 1]),
    ("native:d4+fsdp:d2", 3, 0, [1, 2, 1, 2], [0, 0]),
    ("native:d2|fsdp:d2", 2, 0, [0, 1], [0, 1]),
    ("fsdp:d4", 2, 0, [], [0, 0, 1, 1]),
    ("sglang:d4t2+fsdp:d8", 2, 8, [1, 1, 1, 1], [0] * 8),
    ("sglang:d4+fsdp:d8", 3, 8, [1, 2, 1, 2], [0] * 8),
    ("sglang:d2t4+fsdp:d8", 4, 4, [2, 3], [0] * 4 + [1] * 4),
    ("sglang:d2+fsdp:d2", 1, 4, [0, 0], [0, 0]),
    ("fsdp:d8+sglang:d1t4", 2, 6, [1], [0] * 6 + [1] * 2),
]


@pytest.mark.parametrize(("allocation", "num_nodes", "num_gpus", "of_servers", "of_ranks"), SPREAD)
def test_processes_are_spread_over_nodes(allocation, num_nodes, num_gpus, of_servers, of_ranks):
    settings = {"cls": SFTConfig, "kind": "sft"} if allocation == "fsdp:d4" else {"weight_update": "distributed"}
    machine = gpu_machine(num_gpus) if num_gpus else Machine((0, 1))
    plan = plan_for(allocation, machine, cluster__num_nodes=num_nodes, **settings)
    assert [p.node for p in plan.servers] == of_servers and [p.node for p in plan.trainers] == of_ranks
    assert all(p.why for p in plan.processes) and plan.num_nodes == num_nodes


@given(
    st.integers(1, 5), st.integers(1, 8), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.integers(1, 20),
    st.sampled_from("+|")
)  # fmt: skip
def test_any_plan_over_nodes_is_whole_or_refused_with_a_number(nodes, gpus, num_servers, width, num_ranks, sign):
    num_ranks = num_servers * width if sign == "|" else num_ranks
    mode = f"sglang:d{num_servers}t{width}{sign}fsdp:d{num_ranks}"
    try:
        plan = plan_for(mode, gpu_machine(gpus), weight_update="disk", cluster__num_nodes=nodes)
    except ConfigError as error:
        assert re.search(r"there are \d+|\d+ too few|lie on two nodes of \d+", str(error))
        return
    for role in (plan.servers, plan.trainers):
        used = [(p.node, gpu) for p in role for gpu in p.devices]
        assert len(used) == len(set(used))
        assert sign == "|" or not {*used} & {(p.node, g) for q in ("server", "trainer") for p in plan.processes
                                             if p.role == q and p not in role for g in p.devices}  # fmt: skip
    of_ranks = [p.node for p in plan.trainers]
    assert of_ranks == sorted(of_ranks) and of_ranks[0] == 0 and len(of_ranks) == num_ranks
    for node in set(of_ranks):
        envs = [p.env for p in plan.trainers if p.node == node]
        assert [env["LOCAL_RANK"] for env in envs] == [str(i) for i in range(len(envs))]
        visible = envs[0]["CUDA_VISIBLE_DEVICES"].split(",")
        for p, env in zip([p for p in plan.trainers if p.node == node], envs, strict=True):
            assert p.devices == (visible[int(env["LOCAL_RANK"])],) and env["LOCAL_WORLD_SIZE"] == str(len(envs))


def test_roles_with_ranks_of_their_own_follow_the_policys_over_the_nodes():
    settings = {"critic": PPOCriticConfig(), "ref": TrainEngineConfig(), "weight_update": "disk"}
    mode = "sglang:d2+fsdp[ref]:d1+fsdp[critic]:d2+fsdp:d3"
    plan = plan_for(mode, gpu_machine(4), cluster__num_nodes=2, **settings)
    told = [(p.models, p.node, p.env["LOCAL_RANK"], p.env["LOCAL_WORLD_SIZE"]) for p in plan.trainers]
    of_actor = [(("actor",), 0, str(i), "4") for i in range(3)]
    roles = [(("critic",), 0, "3", "4"), (("critic",), 1, "0", "2"), (("ref",), 1, "1", "2")]
    assert told == of_actor + roles and [p.node for p in plan.servers] == [1, 1]
    assert len({(p.node, p.devices) for p in plan.processes}) == 8
    for p in plan.trainers:
        assert p.devices == (p.env["CUDA_VISIBLE_DEVICES"].split(",")[int(p.env["LOCAL_RANK"])],)


def test_nodes_have_cores_and_addresses_of_their_own():
    machines = [Machine((0, 1)), Machine((4, 5, 6, 7))]
    config = GRPOConfig(allocation_mode="native:d3+fsdp:d1", weight_update="distributed")
    plan = make_plan(config, machines, "model", SCRIPT)
    assert {p.name: (p.node, p.cores) for p in plan.processes} == {
        "server-0": (1, (4, 5)), "server-1": (0, (0,)), "server-2": (1, (6, 7)), "trainer-0": (0, (1,))
    }  # fmt: skip
    server, trainer = (
        plan.servers[0].on_port(31000, "10.0.0.2", "10.0.0.1"),
        plan.trainers[0].on_port(0, "h", "10.0.0.1"),
    )
    assert parse_arguments(list(server.command[3:])).host == "10.0.0.2"
    assert trainer.env["MASTER_ADDR"] == "10.0.0.1" and plan.trainers[0].on_port(0).env["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"node b has 1: nodes of a run are alike; cluster.num_gpus_per_node=1"):
        make_plan(config, [gpu_machine(2), replace(gpu_machine(1), name="b")], "model", SCRIPT)


def test_weights_go_to_other_nodes_by_broadcast_if_nothing_is_said(tmp_path):
    config = load_run_config(file_of(tmp_path, GRPO), ["cluster.num_nodes=2"])
    assert config.weight_update == "distributed"
