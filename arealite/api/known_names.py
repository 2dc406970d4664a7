"""Settings by the names that they have in AReaL, verl and TRL, and what they are here. Called by config_source.py."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Our key, or a sentence about it, and the names of others, with the section where the last word is not enough.
OTHERS = {
    "gconfig.n_samples": "group_size rollout.n gconfig.n num_generations",
    "gconfig.max_new_tokens": "gconfig.max_tokens max_response_length max_completion_length generate_max_len",
    "gconfig.temperature: 0 is greedy": "greedy",
    "gconfig.stop": "stop_strings stop_sequences",
    "valid_dataset.num_rows": "max_tasks",
    "actor.reward_norm.mean and actor.reward_norm.std: group is the default": "group_reward_norm",
    "actor.adv_norm.mean and actor.adv_norm.std": "group_adv_norm adv_norm_level",
    "mean, one of group, batch, none": "mean_level",
    "std, one of group, batch, none": "std_level",
    "leave_one_out": "mean_leave1out",
    "actor.reward_norm.std: none is off": "norm_adv_by_std_in_grpo scale_rewards",
    "actor.path": "model_name_or_path model model.path model_path model_name pretrain",
    "actor.dtype: bfloat16 is the default": "bf16 model_dtype",
    "actor.max_tokens_per_mb, in tokens": "mb_spec n_mbs max_tokens_per_gpu ppo_max_token_len_per_gpu"
    " micro_train_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu log_prob_micro_batch_size_per_gpu"
    " gradient_accumulation_steps",
    "actor.ppo_n_minibatches; every sample is trained on once": "ppo_mini_batch_size ppo_epochs num_iterations",
    "actor.eps_clip": "clip_ratio clip_ratio_low clip_range cliprange epsilon",
    "actor.eps_clip_higher": "clip_ratio_high epsilon_high",
    "actor.c_clip": "clip_ratio_c delta",
    "actor.loss_aggregation": "loss_agg_mode loss_type",
    "actor.behav_imp_weight_cap": "behave_imp_weight_cap",
    "actor.behav_imp_correction": "behave_imp_weight_mode",
    "actor.use_decoupled_loss": "recompute_logprob",
    "actor.overlong_tokens: 0 is off": "overlong_reward_penalty",
    "actor.mask_truncated": "mask_truncated_completions",
    "actor.kl_weight, which needs ref.path": "kl_ctl kl_coef init_kl_coef kl_loss_coef beta",
    "actor.kl_weight above 0, with ref.path and actor.kl_in": "use_kl_loss use_kl_in_reward",
    "actor.kl_estimator": "kl_loss_type",
    "actor.entropy_weight": "entropy_coeff",
    "actor.gamma": "discount",
    "actor.gae_lambda": "lam",
    "actor.offload": "param_offload optimizer_offload enable_offload",
    "actor.gradient_checkpointing: full": "enable_gradient_checkpointing",
    "actor.lora, such as actor.lora.rank=16": "use_lora use_peft",
    "actor.lora.rank": "lora_rank lora_r",
    "actor.lora.alpha": "lora_alpha",
    "actor.lora.target_modules": "lora_target_modules",
    "actor.optimizer.kind": "optimizer.type optim",
    "actor.optimizer.lr": "learning_rate",
    "actor.optimizer.beta1 and actor.optimizer.beta2": "betas optimizer.beta",
    "actor.optimizer.eps": "optimizer.epsilon",
    "actor.optimizer.lr_scheduler": "lr_scheduler_type",
    "actor.optimizer.warmup_steps": "warmup_ratio warmup_steps_proportion lr_warmup_steps",
    "actor.optimizer.max_grad_norm": "gradient_clipping grad_clip",
    "critic.eps_clip": "cliprange_value",
    "critic.path for PPO; without it the run is GRPO": "adv_estimator advantage_estimator",
    "rollout.max_head_offpolicyness: 0 is synchronous": "async_training max_staleness staleness_threshold",
    "server, and its own flags in server.args": "sglang vllm gpu_memory_utilization mem_fraction_static engine_kwargs",
    "allocation_mode, such as sglang:d4+fsdp:d4": "launcher.type use_vllm vllm_mode tensor_model_parallel_size"
    " ulysses_sequence_parallel_size data_parallel_size backend",
    "weight_update": "weight_update_mode",
    "train_dataset.path": "train_files dataset_name",
    "valid_dataset.path": "val_files",
    "train_dataset.batch_size, in prompts per step": "train_batch_size per_device_train_batch_size"
    " rollout_batch_size num_prompts_per_step",
    "train_dataset.max_prompt_tokens": "max_prompt_length prompt_max_len",
    "train_dataset.max_length": "max_seq_length max_seq_len",
    "total_train_steps": "max_steps total_training_steps",
    "total_train_epochs": "num_train_epochs total_epochs num_epochs epochs",
    "saver.freq_steps": "save_freq save_steps",
    "saver.num_kept": "save_total_limit",
    "evaluator.freq_steps": "test_freq eval_steps",
    "evaluator.at_start": "val_before_train",
    "recover.mode": "resume_mode resume_from_checkpoint",
    "recover.max_restarts": "recover.retries",
    "freq_s": "freq_secs",
    "server.context_length": "max_model_len",
    "stats_logger": "report_to logger wandb.mode swanlab.mode",
    "experiment_name": "project_name",
    "cluster.fileroot": "output_dir default_local_dir",
    "cluster.num_nodes": "n_nodes nnodes",
    "cluster.num_gpus_per_node": "n_gpus_per_node",
    "nothing: kind says what is trained, and rows are read by their columns": "train_dataset.type valid_dataset.type",
    "nothing: the command starts all processes, as allocation_mode says": "scheduler.type name_resolve.type",
    "an argument of the script's trainer, PPOTrainer(..., should_accept=...)": "dynamic_sampling",
}
OURS = {name: told for told, names in OTHERS.items() for name in names.split()}


def ours(key: str, keys: Sequence[str]) -> str:
    """What the setting that others call `key` is here; empty when the name is none of theirs, or when there is no such
    thing in the configuration, whose dotted keys are `keys`. One without `actor` has `model` in its place."""
    words = key.split(".")
    found = OURS.get(".".join(words[-2:])) or OURS.get(words[-1]) or ""
    if "actor" not in keys:
        found = found.replace("actor.", "model.")
    named = re.findall(r"\b[a-z_]+[.]\w[\w.]*\b", found)
    return found if all(name in keys for name in named) else ""
