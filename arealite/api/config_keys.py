"""The keys of a configuration: which there are, of which types, and what one that is not there may mean.

Called by load_config.py, for what the user wrote, for messages and for `--explain`; by observe/, which compares runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeGuard

NUM_SUGGESTIONS = 3
MIN_LETTERS = 5  # names this short resemble others by chance: type and dtype, model and mode
TYPE_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}

# Our key, or a sentence about it, and the names of others, with the section where the last word is not enough.
OTHERS = {
    "gconfig.n_samples": "group_size rollout.n gconfig.n num_generations",
    "gconfig.max_new_tokens": "gconfig.max_tokens max_response_length max_completion_length generate_max_len"
    " actor.max_new_tokens",
    "gconfig.temperature: 0 is greedy": "greedy",
    "gconfig.temperature, which is the trainer's too": "actor.temperature ref.temperature critic.temperature",
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
    "allocation_mode, such as sglang:d4+fsdp:d4": "use_vllm vllm_mode tensor_model_parallel_size"
    " ulysses_sequence_parallel_size data_parallel_size backend",
    "weight_update": "weight_update_mode",
    "train_dataset.path": "train_files dataset_name",
    "valid_dataset.path": "val_files",
    "train_dataset.batch_size, in prompts per step": "train_batch_size per_device_train_batch_size"
    " rollout_batch_size num_prompts_per_step consumer_batch_size",
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
OURS = {name: pointer for pointer, names in OTHERS.items() for name in names.split()}


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted key, value, field) of every value that a file can give; sections are entered, an absent section is one
    value None."""
    for f in dataclasses.fields(config):
        value = vars(config)[f.name]
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{f.name}.")
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            for name, section in value.items():
                yield from walk(section, f"{prefix}{f.name}.{name}.")
        elif "is_derived" not in f.metadata:
            yield f"{prefix}{f.name}", value, f


def section_of(config: Any, key: str) -> tuple[Any, str]:
    """The section that a dotted key leads to, None where one on the way is absent, and the name of the field in it."""
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section and (section if isinstance(section, dict) else vars(section)).get(part)
    return section, name


def is_section(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def field_types(cls: type) -> dict[str, Any]:
    """Name -> type of the fields that a file can give, None removed from optional ones."""
    hints = typing.get_type_hints(cls)
    return {f.name: without_none(hints[f.name]) for f in dataclasses.fields(cls) if "is_derived" not in f.metadata}


def without_none(hint: Any) -> Any:
    """`X | None` -> X; every other type as it is."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        others = [a for a in typing.get_args(hint) if a is not type(None)]
        return others[0] if len(others) == 1 else hint
    return hint


def type_at(cls: type, path: Iterable[str | int]) -> Any:
    """The type (None removed) at the end of `path`: fields of sections, entries of lists and dicts. Raises KeyError."""
    hint: Any = cls
    for name in path:
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        elif typing.get_origin(hint) is list and isinstance(name, int):
            hint = typing.get_args(hint)[0]
        elif hint is not Any:
            if not is_section(hint):
                raise KeyError(name)
            hint = field_types(hint)[str(name)]
    return hint


def type_name(hint: Any) -> str:
    """How a type is called in an error message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is list:
        return f"a list, each entry {type_name(args[0])}"
    if is_section(hint):
        return f"a mapping of {', '.join(field_types(hint))}"
    return "a mapping" if origin is dict else TYPE_NAMES.get(hint, str(hint))


def explain(config: Any) -> list[tuple[str, Any, str]]:
    """(dotted key, value, documentation with what is allowed) of every value, in declaration order."""
    return [
        (key, value, f.metadata.get("description", "") + allowed(type(config), key, f))
        for key, value, f in walk(config)
    ]


def allowed(cls: type, key: str, f: dataclasses.Field) -> str:
    """The words that a field may hold, or its smallest and largest number."""
    hint = type_at(cls, key.split("."))
    if typing.get_origin(hint) is Literal:
        return f"; {type_name(hint)}"
    limits = {word: f.metadata.get(name) for word, name in (("least", "ge"), ("most", "le"))}
    bounds = [f"at {word} {limit:g}" for word, limit in limits.items() if limit is not None]
    return f"; {', '.join(bounds)}" if bounds else ""


def all_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key that leads to a value or a section."""
    keys = []
    for name, hint in field_types(cls).items():
        keys += [prefix + name, *(all_keys(hint, f"{prefix}{name}.") if is_section(hint) else ())]
    return keys


def ours(key: str, keys: Sequence[str]) -> str:
    """What the setting that others call `key` is here; empty when the name is none of theirs, or when there is no such
    thing in the configuration, whose dotted keys are `keys`. One without `actor` has `model` in its place."""
    words = key.split(".")
    pointer = OURS.get(".".join(words[-2:])) or OURS.get(words[-1]) or ""
    if "actor" not in keys:
        pointer = pointer.replace("actor.", "model.")
    named = re.findall(r"\b[a-z_]+[.]\w[\w.]*\b", pointer)
    return pointer if all(name in keys for name in named) else ""


def meant_by(key: str, cls: type) -> str:
    """What the user may have meant by a dotted key that configurations of `cls` do not have, in words."""
    keys = all_keys(cls)
    if pointer := ours(key, keys):
        return f"here it is {pointer}"
    if key in keys:
        return "in a file each part stands on a line of its own, below the one before"
    if nearest := nearest_keys(key, keys):
        return f"did you mean {' or '.join(nearest)}?"
    parent = key.rpartition(".")[0]
    while parent and parent not in keys:
        parent = parent.rpartition(".")[0]
    section = type_at(cls, parent.split(".")) if parent else cls
    has = f"has {', '.join(field_types(section))}" if is_section(section) else f"is {type_name(section)}"
    return f"{parent or 'the top level'} {has}"


def nearest_keys(key: str, keys: list[str]) -> list[str]:
    """Some of the dotted `keys` that resemble `key`: similar siblings, the same or a similar name elsewhere."""
    parent, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == parent}
    nearest = [siblings[n] for n in difflib.get_close_matches(name, siblings, NUM_SUGGESTIONS, 0.6)]
    names = {k.rpartition(".")[2] for k in keys} if len(name) > MIN_LETTERS else set()
    for similar in (name, *difflib.get_close_matches(name, sorted(names), NUM_SUGGESTIONS, 0.85)):
        nearest += [k for k in keys if k.rpartition(".")[2] == similar]
    return list(dict.fromkeys(nearest))[:NUM_SUGGESTIONS]
