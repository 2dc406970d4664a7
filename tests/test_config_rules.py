"""Contradictory fields are refused, and the fix that the message names is one."""

from __future__ import annotations

import re

import pytest

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import ConfigError
from arealite.api.load_config import load_config_file

BASE = ["actor.path=model", "train_dataset.path=rows.jsonl"]
GYM = "; ".join(f"{d}_dataset.path=reasoning_gym:chain_sum; {d}_dataset.num_rows=9" for d in ("train", "valid"))

# (overrides, complaint, fix): with the fix appended, the configuration loads.
CASES = [
    ("actor.path=", "actor.path is missing", "actor.path=m"),
    ("train_dataset.path=", "train_dataset.path is missing", "train_dataset.path=d"),
    ("valid_dataset.batch_size=2", "valid_dataset.path is missing", "valid_dataset=null"),
    ("ref.dtype=float32", "ref.path is missing", "ref.path=${actor.path}"),
    ("actor.lora.rank=8; weight_update=shm", "weight_update is shm, but the adapters", "weight_update=disk"),
    ("actor.lora.rank=8; allocation_mode=vllm:d1+fsdp:d1; rollout.pause_mode=retract",
     "rollout.pause_mode is retract, but SGLang and vLLM replace an adapter only while no request uses it",
     "rollout.pause_mode=abort"),
    ("actor.lora.target_modules=[]", "target_modules is empty", "actor.lora.target_modules=[q_proj]"),
    ("ref.path=m; ref.lora.rank=8", "ref.lora is given, but the reference is not trained", "ref.lora=null"),
    ("server.dtype=float32", "server.dtype is float32 and actor.dtype bfloat16", "actor.dtype=float32"),
    ("trial_name=a/b", "trial_name is 'a/b'", "trial_name=b"),
    ("trial_name= a", "trial_name is ' a'", "trial_name=a"),
    ("trial_name=" + "a" * 100, "trial_name is 'aaa", "trial_name=a"),
    ("train_dataset.chat_template_kwargs.enable_thinking=no",
     "any text counts as true in a template: write enable_thinking: false",
     "train_dataset.chat_template_kwargs.enable_thinking=false"),
    ("experiment_name=", "experiment_name is ''", "experiment_name=e"),
    ("gconfig.min_new_tokens=9; gconfig.max_new_tokens=8",
     "gconfig.min_new_tokens (9) is above gconfig.max_new_tokens (8)", "gconfig.min_new_tokens=8"),
    ("gconfig.top_p=0", "gconfig.top_p is 0", "gconfig.top_p=1"),
    ("gconfig.top_p=1.5", "gconfig.top_p is 1.5", "gconfig.top_p=1"),
    ("eval_gconfig.min_p=2", "eval_gconfig.min_p is 2", "eval_gconfig.min_p=0"),
    ("gconfig.top_k=0", "gconfig.top_k is 0", "gconfig.top_k=-1"),
    ("gconfig.stop=['']", "gconfig.stop holds an empty string", "gconfig.stop=[]"),
    ("gconfig.temperature=0", "gconfig.temperature is 0 and gconfig.n_samples is 8: all answers",
     "gconfig.temperature=1"),
    ("eval_gconfig.n_samples=4", "eval_gconfig.temperature is 0 and", "eval_gconfig.temperature=1"),
    ("train_dataset.prompt_template=Solve this:", "must hold {prompt}",
     "train_dataset.prompt_template=Solve this: {prompt}"),
    ("train_dataset.path=reasoning_gym:chain_sum", "train_dataset.num_rows is missing", "train_dataset.num_rows=1000"),
    ("train_dataset.params.x=1", "train_dataset.params are for reasoning_gym", "train_dataset.params={}"),
    (GYM, "the held-out tasks would be training tasks", "valid_dataset.split=test"),
    (GYM + "; train_dataset.params.seed=3; valid_dataset.params.seed=3; valid_dataset.split=test",  # before the split
     "the held-out tasks would be training tasks", "valid_dataset.params.seed=4"),
    ("server.context_length=512; eval_gconfig.max_new_tokens=100",
     "server.context_length (512) leaves no room for a prompt beside gconfig.max_new_tokens (512)",
     "gconfig.max_new_tokens=400"),
    ("server.context_length=600; train_dataset.max_prompt_tokens=100",
     "set train_dataset.max_prompt_tokens=88 or server.context_length=612", "train_dataset.max_prompt_tokens=88"),
    ("actor.ppo_n_minibatches=3", "set train_dataset.batch_size=18 or another number", "train_dataset.batch_size=18"),
    ("gconfig.n_samples=1",
     "actor.reward_norm.mean, actor.reward_norm.std) makes every advantage 0",
     "actor.reward_norm.mean=batch; actor.reward_norm.std=batch"),
    ("gconfig.n_samples=1; actor.reward_norm={mean: batch, std: none, leave_one_out: true}",
     "(actor.reward_norm.leave_one_out) makes every advantage 0", "actor.reward_norm.leave_one_out=false"),
    ("actor.reward_norm={mean: none, std: none, leave_one_out: true}",
     "actor.reward_norm.leave_one_out is about the mean", "actor.reward_norm.mean=group"),
    ("actor.kl_weight=0.1", "there is no reference: add ref.path=${actor.path}", "ref.path=${actor.path}"),
    ("actor.gamma=0.9", "discounts only a KL in the reward", "actor.gamma=1"),
    ("actor.gamma=1.5; actor.kl_in=reward; actor.kl_weight=1; ref.path=m", "actor.gamma is 1.5, expected at most 1",
     "actor.gamma=0.99"),
    ("actor.use_decoupled_loss=false; actor.behav_imp_correction=mask",
     "actor.behav_imp_correction is 'mask' but actor.use_decoupled_loss is false", "actor.use_decoupled_loss=true"),
    ("actor.use_decoupled_loss=false; actor.behav_imp_weight_cap=2", "actor.behav_imp_weight_cap is 2.0 but",
     "actor.behav_imp_weight_cap=5"),
    ("actor.eps_clip=1.1", "actor.eps_clip is 1.1, expected at most 1", "actor.eps_clip=0.2"),
    ("actor.overlong_tokens=513", "actor.overlong_tokens (513) is above", "actor.overlong_tokens=128"),
    ("actor.reward_scaling=0", "makes every reward 0", "actor.reward_scaling=1"),
    ("actor.optimizer.beta2=1", "actor.optimizer.beta2 is 1, expected at most 0.99999", "actor.optimizer.beta2=0.9"),
    ("actor.optimizer.max_grad_norm=0", "max_grad_norm is 0, expected at least 1e-09",
     "actor.optimizer.max_grad_norm=inf"),
    ("actor.optimizer.min_lr_ratio=2", "min_lr_ratio is 2", "actor.optimizer.min_lr_ratio=0.1"),
    ("actor.optimizer.warmup_steps=10; total_train_steps=10", "leaves nothing of the run's 10 steps",
     "actor.optimizer.warmup_steps=5"),
    ("evaluator.freq_steps=5", "there is no valid_dataset", "valid_dataset.path=v.jsonl"),
    ("recover.freq_s=null", "nothing could be resumed", "recover.freq_steps=5"),
    ("recover.freq_s=null", "nothing could be resumed", "recover.mode=off"),
    ("watchdog.action=restart; recover.mode=fresh", "a restart needs recovery points", "recover.mode=auto"),
    ("rollout.reward_timeout_s=0", "rollout.reward_timeout_s is 0, expected at least 0.1",
     "rollout.reward_timeout_s=5"),
    ("watchdog.heartbeat_s=5; watchdog.stall_s=5", "every process would look stalled", "watchdog.heartbeat_s=1"),
    ("cluster.num_nodes=2; weight_update=shm", "cluster.num_nodes is 2: leave it out", "weight_update=disk"),
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(("overrides", "complaint", "fix"), CASES, ids=[overrides for overrides, *_ in CASES])
def test_a_contradiction_is_refused_and_its_fix_works(overrides, complaint, fix, path):
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        load_config_file(path, BASE + overrides.split("; "), GRPOConfig)
    load_config_file(path, BASE + overrides.split("; ") + fix.split("; "), GRPOConfig)


def test_what_is_not_used_is_not_refused(path):
    """Without held-out tasks the length of their answers does not matter; a default frequency is no contradiction."""
    short = ["server.context_length=256", "gconfig.max_new_tokens=64", "eval_gconfig.max_new_tokens=512"]
    assert load_config_file(path, [*BASE, *short, "recover.mode=off"], GRPOConfig).eval_gconfig.max_new_tokens > 256
    with pytest.raises(ConfigError, match="no room for a prompt beside eval_gconfig.max_new_tokens"):
        load_config_file(path, [*BASE, *short, "valid_dataset.path=v.jsonl"], GRPOConfig)


def test_recovery_points_are_written_unless_switched_off(path):
    recover = load_config_file(path, BASE, GRPOConfig).recover
    assert (recover.mode, recover.freq_s) == ("auto", 300.0)
