"""The process plan: cores, devices, environments and commands, and what is refused before anything starts."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.api.cli_args import GRPOConfig, LoRAConfig, PPOActorConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Dims
from arealite.launcher import check
from arealite.launcher import machine as machine_module
from arealite.launcher.machine import Machine
from arealite.launcher.memory import ModelShape, server_parts, trainer_parts
from arealite.launcher.plan import make_plan, share_cores
from arealite.launcher.servers import PORT, flags

SCRIPT = ("train.py", "--config", "run.yaml", "seed=2")


def plan_for(allocation, machine=None, eta=1, **settings):
    config = GRPOConfig(allocation_mode=allocation, **settings)
    config.rollout.max_head_offpolicyness = eta
    return make_plan(config, machine or Machine((0, 1)), "model", SCRIPT)


def gpu_machine(num_gpus):
    return Machine(tuple(range(16)), tuple(map(str, range(num_gpus))))


def test_side_by_side_gets_a_core_each():
    server, trainer = plan_for("native:d1+fsdp:d1").processes
    assert (server.cores, trainer.cores) == ((0,), (1,))
    for process in (server, trainer):
        assert process.env["OMP_NUM_THREADS"] == "1" and process.env["OMP_WAIT_POLICY"] == "PASSIVE"
        assert int(process.env["GOMP_SPINCOUNT"]) > 0
        assert process.env["CUDA_VISIBLE_DEVICES"] == "" and "AREALITE_COLOCATED" not in process.env


@pytest.mark.parametrize(("allocation", "eta"), [("native:d1|fsdp:d1", 1), ("native:d1+fsdp:d1", 0)])
def test_taking_turns_gives_everybody_everything(allocation, eta):
    plan = plan_for(allocation, eta=eta)
    assert plan.colocated == ("|" in allocation)
    for process in plan.processes:
        assert process.cores == (0, 1) and process.env["OMP_NUM_THREADS"] == "2"
        assert (process.env.get("AREALITE_COLOCATED") == "1") == plan.colocated


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_cores_are_shared_fairly(num_cores, num_servers, num_trainers, takes_turns):
    cores = list(range(100, 100 + num_cores))
    shares = share_cores(cores, num_servers, num_trainers, takes_turns)
    assert len(shares) == num_servers + num_trainers and all(shares)
    sides = [shares[:num_servers], shares[num_servers:]] if takes_turns else [shares]
    for side in sides:
        load = {core: sum(core in share for share in side) for core in cores}
        if len(side) <= num_cores:
            assert set(load.values()) == {1}  # disjoint, and no core idle
            assert max(map(len, side)) - min(map(len, side)) <= 1
        else:
            assert all(len(share) == 1 for share in side)
            assert max(load.values()) - min(load.values()) <= 1


def test_gpus_of_servers_and_ranks():
    plan = plan_for("sglang:d2t2+fsdp:d4", gpu_machine(8), weight_update="disk")
    assert [p.devices for p in plan.servers] == [("0", "1"), ("2", "3")]
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in plan.servers] == ["0,1", "2,3"]
    assert [p.devices for p in plan.trainers] == [("4",), ("5",), ("6",), ("7",)]
    for rank, p in enumerate(plan.trainers):  # torchrun's convention: LOCAL_RANK picks from what all ranks see
        assert p.env["CUDA_VISIBLE_DEVICES"] == "4,5,6,7" and p.env["LOCAL_RANK"] == p.env["RANK"] == str(rank)
        assert p.env["WORLD_SIZE"] == p.env["LOCAL_WORLD_SIZE"] == "4"
        assert p.cores == ()  # pinning is for CPU-only machines
        assert p.env["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    colocated = plan_for("native:d2|fsdp:d2", gpu_machine(2))
    assert [p.devices for p in colocated.processes] == [("0",), ("1",), ("0",), ("1",)]


def test_one_gpu_for_two_is_refused_with_what_works():
    with pytest.raises(ConfigError, match="needs 2 GPUs.* allocation_mode='(.+)'$") as refused:
        plan_for("native:d1+fsdp:d1", gpu_machine(1))
    plan = plan_for(str(refused.value).split("'")[-2], gpu_machine(1))
    assert plan.colocated and [p.devices for p in plan.processes] == [("0",), ("0",)]


@pytest.mark.parametrize(
    ("backend", "flag"), [("native", "--tokenizer-path"), ("vllm", "--tokenizer"), ("sglang", "--tokenizer-path")]
)
def test_servers_get_the_tokenizer_of_the_run(backend, flag):
    settings = {"weight_update": "disk", "actor": PPOActorConfig(path="model")}
    machine = Machine((0, 1), ("0", "1"), vllm_python="python")
    for tokenizer, words in ((None, []), ("model", []), ("other/chat", [flag, "other/chat"])):
        command = plan_for(f"{backend}:d1+fsdp:d1", machine, tokenizer_path=tokenizer, **settings).servers[0].command
        found = [w for w in command if w.startswith("--tokenizer")]
        assert found == words[:1] and (not words or command[command.index(flag) + 1] == words[1])


def test_no_device_is_given_twice_unless_shared():
    plan = plan_for("fsdp:d3+native:d2", gpu_machine(5))
    assert sorted(d for p in plan.processes for d in p.devices) == ["0", "1", "2", "3", "4"]
    assert [p.devices for p in plan.trainers] == [("0",), ("1",), ("2",)]


def test_native_command():
    config = GRPOConfig(seed=7)
    config.server.context_length = 256
    config.server.kv_cache_tokens = 4096
    config.server.deterministic = True
    config.server.args = {"hold_limit_s": 5}
    plan = make_plan(config, Machine((0, 1)), "folder", SCRIPT)
    server, trainer = plan.processes
    words = list(server.command[1:])
    assert words[:2] == ["-m", "arealite.inference.serve"]
    for pair in (
        "--model folder",
        "--port " + PORT,
        "--dtype bfloat16",
        "--context-length 256",
        "--kv-cache-tokens 4096",
        "--seed 7",
    ):
        assert pair in " ".join(words)
    assert "--deterministic" in words and words[-2:] == ["--hold-limit-s", "5"]
    assert server.on_port(31000).command[words.index("--port") + 2] == "31000"
    assert trainer.command[1:] == SCRIPT


def test_native_command_is_one_the_server_understands():
    from arealite.inference.serve import parse_arguments

    config = GRPOConfig()
    config.server.context_length, config.server.kv_cache_tokens, config.server.deterministic = 128, 1024, True
    server = make_plan(config, Machine((0,)), "folder", SCRIPT).servers[0].on_port(31000)
    arguments = parse_arguments(list(server.command[3:]))
    assert (arguments.port, arguments.context_length, arguments.kv_cache_tokens) == (31000, 128, 1024)
    assert arguments.model == "folder" and arguments.deterministic and arguments.weight_version == "0"


def test_sglang_command_passes_flags_through():
    config = GRPOConfig(allocation_mode="sglang:d1t2+fsdp:d2", weight_update="disk")
    config.server.args = {"mem_fraction_static": 0.8, "trust_remote_code": True, "off": False, "ports": [1, 2]}
    server = make_plan(config, gpu_machine(4), "hub/model", SCRIPT).servers[0]
    words = " ".join(server.command)
    assert "-m sglang.launch_server" in words and "--model-path hub/model" in words and "--tp-size 2" in words
    assert words.endswith("--mem-fraction-static 0.8 --trust-remote-code --ports 1 2")
    assert flags({"json": {"a": 1}, "none": None}) == ["--json", '{"a": 1}']


def test_vllm_command_and_environment(tiny_llama):
    config = GRPOConfig(allocation_mode="vllm:d1+fsdp:d1")
    config.server.context_length, config.server.kv_cache_tokens = 256, 1000
    plan = make_plan(config, Machine((4, 5), vllm_python="other/python"), tiny_llama, SCRIPT)
    server = plan.servers[0]
    assert server.command[:3] == ("other/python", "-m", "vllm.entrypoints.openai.api_server")
    words = " ".join(server.command)
    for pair in ("--max-model-len 256", "--logprobs-mode processed_logprobs", "--enable-scale-out", "--enforce-eager"):
        assert pair in words
    assert f"--kv-cache-memory-bytes {1000 * 2 * 2 * 32 * 2}" in words  # tokens x (K and V) x layers x width x bfloat16
    assert server.env["VLLM_CPU_OMP_THREADS_BIND"] == "4" and server.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert (Path(server.env["PYTHONPATH"]) / "arealite" / "weights" / "vllm_worker.py").exists()
    assert "PYTHONPATH" not in plan.trainers[0].env
    config.server.args = {"enforce-eager": False}
    on_gpus = make_plan(config, Machine((0,), ("0", "1"), vllm_python="other/python"), "hub/model", SCRIPT)
    assert "--enforce-eager" not in on_gpus.servers[0].command
    assert "VLLM_CPU_OMP_THREADS_BIND" not in on_gpus.servers[0].env


def test_servers_make_room_for_the_adapter():
    lora = LoRAConfig(rank=24, target_modules=["q_proj", "v_proj"])
    for backend, told in (
        ("sglang", "--enable-lora --max-lora-rank 24 --lora-target-modules q_proj v_proj"),
        ("vllm", "--enable-lora --max-lora-rank 32"),
    ):
        config = GRPOConfig(allocation_mode=f"{backend}:d1+fsdp:d1", weight_update="disk")
        config.actor.lora = lora
        machine = Machine((0,), ("0", "1"), vllm_python="other/python")
        assert told in " ".join(make_plan(config, machine, "hub/model", SCRIPT).servers[0].command)
    config.allocation_mode = "native:d1+fsdp:d1"
    assert "lora" not in " ".join(make_plan(config, Machine((0,)), "folder", SCRIPT).servers[0].command)


def test_vllm_is_refused_what_would_falsify_its_logprobs():
    config = GRPOConfig(allocation_mode="vllm:d1+fsdp:d1")
    config.gconfig.top_p = 0.9
    with pytest.raises(ConfigError, match="after top_p"):
        make_plan(config, Machine((0,), vllm_python="python"), "m", SCRIPT)


def test_environment_of_the_user_comes_last():
    config = GRPOConfig()
    config.launcher.env = {"OMP_WAIT_POLICY": "ACTIVE"}
    assert all(p.env["OMP_WAIT_POLICY"] == "ACTIVE" for p in make_plan(config, Machine((0,)), "m", SCRIPT).processes)
    config.launcher.pin_cores = False
    assert all(p.cores == () for p in make_plan(config, Machine((0,)), "m", SCRIPT).processes)


def test_trainers_keep_their_memory_on_cpus_only_and_the_user_has_the_last_word():
    names = {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"}
    server, trainer = plan_for("native:d1+fsdp:d1").processes
    assert names <= trainer.env.keys() and not names & server.env.keys()
    assert (trainer.env["MALLOC_TRIM_THRESHOLD_"], trainer.env["MALLOC_TOP_PAD_"]) == ("68719476736", "67108864")
    assert not any(names & p.env.keys() for p in plan_for("native:d1|fsdp:d1", gpu_machine(1)).processes)
    config = GRPOConfig()
    config.launcher.env = {"GLIBC_TUNABLES": ""}
    assert make_plan(config, Machine((0,)), "m", SCRIPT).trainers[0].env["GLIBC_TUNABLES"] == ""


@pytest.mark.parametrize(
    ("allocation", "machine", "said"),
    [
        ("fsdp:d1", None, "no inference servers"),
        ("native:d1", None, "has no trainer"),
        ("native:d1+megatron:d2", None, "cannot run megatron; for train it has fsdp"),
        ("vllm:d1+fsdp:d1", None, "no vLLM was found on this machine: `make vllm-cpu`"),
        ("vllm:t2+fsdp:d1", Machine((0, 1), vllm_python="python"), "needs GPUs"),
        ("vllm:p2+fsdp:d1", gpu_machine(3), "no pipeline parallelism"),
        ("native:d1t2+fsdp:d1", None, r"native has no tensor parallelism \(t2\)"),
        ("native:d1+fsdp:(attn:d2t2|ffn:d1t2e2)", None, r"stay whole.* such as fsdp:\(attn:d2t2\|ffn:d2e2\)"),
        ("native:d1+fsdp[actor]:d1|fsdp[critic]:d1", None, r"nothing would run on fsdp\[critic\]:d1; roles"),
        ("sglang:d1+fsdp:d1", None, "need GPUs"),
        ("native:d4+fsdp:d8", gpu_machine(8), "needs 12 GPUs .*there are 8"),
    ],
)
def test_refusals(allocation, machine, said):
    with pytest.raises(ConfigError, match=said):
        plan_for(allocation, machine, weight_update="disk")


def test_weight_updates_and_several_nodes_are_refused_where_they_cannot_work():
    with pytest.raises(ConfigError, match="set weight_update=disk"):
        plan_for("sglang:d1+fsdp:d1", gpu_machine(2))
    for allocation, kind in (("vllm:d1+fsdp:d1", "tensor"), ("sglang:p2+fsdp:d1", "distributed")):
        with pytest.raises(ConfigError, match=f"weight_update is {kind}, which"):
            plan_for(allocation, gpu_machine(3), weight_update=kind)
    config = GRPOConfig()
    config.cluster.num_nodes = 2
    with pytest.raises(ConfigError, match="num_nodes is 2"):
        make_plan(config, Machine((0,)), "m", SCRIPT)


def test_machine_is_cut_to_the_configuration(monkeypatch):
    config = GRPOConfig().cluster
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    config.num_gpus_per_node, config.num_cores_per_node = 2, 1
    machine = Machine.local(config)
    assert machine.gpus == ("3", "5") and len(machine.cores) == 1 and machine.memory_bytes > 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(ConfigError, match="num_gpus_per_node is 2, and this machine has 0 GPUs: leave it out"):
        Machine.local(config)


def test_a_cluster_that_is_described_is_planned_for(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(machine_module, "find_vllm", lambda: "")
    cluster = GRPOConfig().cluster
    here = Machine.described(cluster)
    assert here == Machine.local(cluster) and here.gpus == ()
    cluster.num_gpus_per_node, cluster.num_cores_per_node = 8, 4096
    machine = Machine.described(cluster)
    assert (len(machine.gpus), len(machine.cores), machine.memory_bytes) == (8, 4096, 0)
    assert plan_for("sglang:d4+fsdp:d4", machine, weight_update="disk").trainers[3].devices == ("7",)
    assert len(plan_for("vllm:d2t2+fsdp:d4", machine, weight_update="disk").servers) == 2


def test_the_shape_of_a_model_is_read_from_its_folder(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    shape = ModelShape.read(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())  # tied parameters come once
    assert (shape.kv_width, shape.num_layers, shape.hidden) == (32, 2, 64)
    assert ModelShape.read(tmp_path / "absent") is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vision"}))
    assert ModelShape.read(tmp_path) is None


def test_memory_grows_with_what_is_said_to_drive_it(tiny_llama):
    shape = ModelShape.read(tiny_llama)
    config = GRPOConfig()
    config.server.kv_cache_tokens = 1000
    kv = {p.name: p.num_bytes for p in server_parts(config, shape, 1)}["KV cache"]
    assert kv == 1000 * 2 * 2 * 32 * 2  # tokens x (K and V) x layers x width x bfloat16

    def of(dims, ref=None):
        return {p.name: p.num_bytes for p in trainer_parts(config, shape, dims, ref, on_gpu=True)}

    count, ends = shape.num_parameters, shape.vocabulary * shape.hidden
    alone, parts = of(Dims()), of(Dims(d=2), shape)
    assert parts["optimizer"] == 8 * count / 2 and parts["reference"] == 2 * count / 2
    assert alone["working copy"] == 2 * count and of(Dims(d=2))["working copy"] == 2 * count  # both layers are gathered
    for dims in (Dims(d=2), Dims(t=2), Dims(c=2)):
        assert of(dims)["weights"] == 4 * count / 2 and of(dims)["activations"] < alone["activations"]
    assert of(Dims(p=2))["weights"] == 4 * ((count - ends) / 2 + ends)  # each stage has the tied embedding
    sizes = []
    for config.actor.gradient_checkpointing in ("none", "selective", "full"):
        sizes.append(of(Dims())["activations"])
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < sizes[0]
    config.actor.optimizer.kind = "adafactor"
    assert of(Dims())["optimizer"] < 0.05 * alone["optimizer"]
    config.actor.optimizer.kind, config.actor.lora = "adamw", LoRAConfig(rank=4)
    adapters = 4 * shape.num_layers * (7 * 64 + 2 * 64 + 2 * 32 + 3 * 128)  # rank x (inputs + outputs)
    assert of(Dims())["gradients"] == 4 * adapters and of(Dims())["weights"] == 2 * count + 4 * adapters


def test_the_memory_of_gpus(monkeypatch, tiny_llama, tmp_path):
    """Of the fullest one; what two processes need there is added up, and warned of where it is too much."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '81000\\n8000\\n'")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    machine = Machine.local(GRPOConfig().cluster)
    assert machine.gpu_bytes == 8000 << 20
    config = GRPOConfig(allocation_mode="native:d1|fsdp:d1", actor=PPOActorConfig(path=tiny_llama))
    told = {}
    for config.server.kv_cache_tokens in (1000, 10**9):
        plan = make_plan(config, machine, tiny_llama, SCRIPT)
        told[config.server.kv_cache_tokens] = check.memory(plan, config, machine, 120)
    assert "of 7.81 GiB free" in told[1000][-1]
    assert "of 7.81 GiB free" in told[10**9][-2] and "does not fit" in told[10**9][-1]
    config.server.kv_cache_tokens = None  # less than half of what is free
    kv = next(p for p in server_parts(config, ModelShape.read(tiny_llama), 1, gpu_share=1e6) if p.name == "KV cache")
    assert kv.num_bytes == 1e6


def test_tokens_of_a_step_follow_the_prompts(tiny_llama, tmp_path):
    shape = ModelShape.read(tiny_llama)
    config = GRPOConfig()
    config.gconfig.n_samples, config.gconfig.max_new_tokens, config.train_dataset.batch_size = 4, 10, 2
    (tmp_path / "rows.jsonl").write_text('{"question": "' + 300 * "x" + '", "answer": "1"}\n')

    def tokens():
        (part,) = (p for p in trainer_parts(config, shape, Dims(), None) if p.name == "activations")
        return int(part.assumption.partition(" ")[0])

    assert tokens() == 2 * (2048 - 10 + 4 * 9)  # the context holds prompt and answer
    config.train_dataset.path = str(tmp_path / "rows.jsonl")
    assert tokens() == 2 * (100 + 16 + 4 * 9)
    config.actor.share_prompts = False
    assert tokens() == 2 * 4 * (100 + 16 + 9)
    config.train_dataset.max_prompt_tokens = 50
    assert tokens() == 2 * 4 * (50 + 9)
    config.actor.max_tokens_per_mb = 100  # evenly cut
    assert tokens() == -(-2 * 4 * 59 // 5)
