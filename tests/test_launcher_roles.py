"""Kinds of runs and roles in the launcher: which configuration class, which processes, and what is refused."""

import pytest

from arealite.api.cli_args import GRPOConfig, PPOCriticConfig, RWConfig, SFTConfig, TrainEngineConfig
from arealite.api.errors import ConfigError
from arealite.api.load_config import load_config_file, load_run_config
from arealite.api.types import Dims
from arealite.launcher.allocation import trainer_dims
from arealite.launcher.check import check
from arealite.launcher.machine import Machine
from arealite.launcher.plan import make_plan

GRPO = "actor: {path: m}\ntrain_dataset: {path: d.jsonl}\n"
SFT = "kind: sft\nmodel: {path: m}\ntrain_dataset: {path: d.jsonl}\n"
ROLES = "native:d1+fsdp:d2|fsdp[critic]:d1t2|fsdp[ref]:t2"


def file_of(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def plan_of(config, machine=None):
    return make_plan(config, machine or Machine((0, 1, 2)), "model", ["train.py"])


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
    plan = plan_of(SFTConfig(kind="sft", allocation_mode=allocation))
    assert not plan.servers and [p.name for p in plan.trainers] == [f"trainer-{i}" for i in range(num_ranks)]
    assert plan.trainers[0].env["WORLD_SIZE"] == str(num_ranks)
    used = [core for p in plan.trainers for core in p.cores]
    assert set(used) == {0, 1, 2}  # nothing is kept for servers
    gpus = plan_of(SFTConfig(kind="sft", allocation_mode="d2"), Machine((0, 1), ("0", "1")))
    assert [p.devices for p in gpus.trainers] == [("0",), ("1",)]


def test_experts_of_the_moe_form_are_spread_over_the_ranks_of_attention():
    for allocation, dims in (
        ("fsdp:(attn:d4t2|ffn:d4e2)", Dims(d=4, t=2, e=2)),
        ("fsdp:(attn:d2c2p2|ffn:p2e4)", Dims(d=2, c=2, p=2, e=4)),
        ("fsdp:(attn:d2t2|ffn:d4)", Dims(d=2, t=2)),
        ("fsdp:d4e2", Dims(d=4, e=2)),
    ):
        config = GRPOConfig(allocation_mode=f"native:d1+{allocation}", weight_update="disk")
        assert trainer_dims(config) == dims
        num_ranks = dims.d * dims.t * dims.c * dims.p
        assert len(plan_of(config).trainers) == num_ranks


def test_roles_share_the_policys_ranks():
    config = GRPOConfig(allocation_mode=ROLES, critic=PPOCriticConfig(), ref=TrainEngineConfig())
    plan = plan_of(config)
    assert [p.name for p in plan.processes] == ["server-0", "trainer-0", "trainer-1"]
    assert trainer_dims(config) == Dims(d=2)
    assert trainer_dims(config, "critic") == trainer_dims(config, "ref") == Dims(t=2)
    config.allocation_mode = "native:d1+fsdp:d2"
    assert trainer_dims(config, "critic") == Dims(d=2)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SFTConfig(kind="sft", allocation_mode="native:d1+fsdp:d1"), "has inference servers, which kind: sft does not"),
        (SFTConfig(kind="sft", allocation_mode="fsdp:d1|fsdp[critic]:d1"), r"nothing would run on fsdp\[critic\]:d1$"),
        (
            GRPOConfig(allocation_mode=ROLES, ref=TrainEngineConfig()),
            r"nothing would run on fsdp\[critic\]:d1t2; roles",
        ),
        (
            GRPOConfig(allocation_mode="native:d1+fsdp:d1+fsdp[critic]:d1", critic=PPOCriticConfig()),
            r"devices of its own(.|\n)*fsdp:d1\|fsdp\[critic\]:d1",
        ),
        (GRPOConfig(allocation_mode="native:d1+sglang[b]:d1+d1"), "nothing would run on sglang"),
    ],
)
def test_what_nothing_would_run_on_is_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        plan_of(config)


def test_check_describes_training_alone(tmp_path, tiny_llama):
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n' * 5)
    rows = f"train_dataset.path={tmp_path / 'd.jsonl'}"
    told = check(str(file_of(tmp_path, SFT)), [f"model.path={tiny_llama}", rows, "train_dataset.batch_size=2"], False)
    assert "training alone" in told and "3 (1 x 3); each 2 rows; rows: 5" in told
    assert "trainer-0" in told and "each trainer (1)" in told and "server" not in told.partition("RUN\n")[2]
