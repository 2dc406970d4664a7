"""What cannot be true of a configuration at the same time, each with its fix; and the values that follow from others.

Called by api/load_config.py after the single values have been checked. `lengths` and `warm_up` are called again where
more is known: by launcher/ and dataset/loader.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from copy import copy
from typing import Any

from arealite.api.cli_args import (
    DatasetConfig,
    GenerationHyperparameters,
    GRPOConfig,
    NormConfig,
    PPOActorConfig,
    RunConfig,
)
from arealite.api.config_keys import section_of
from arealite.api.run_args import FrequencyConfig

REASONING_GYM = "reasoning_gym:"
# What the data sets of a mixture take over from the section around them, unless they say otherwise.
SHARED = (
    "split",
    "malformed_rows",
    "prompt_template",
    "system_prompt",
    "chat_template_kwargs",
    "max_prompt_tokens",
    "max_length",
)
OF_ALL = ("batch_size", "shuffle", "rest_epochs")  # what they cannot have of their own
OF_ONE = ("columns", "subset", "params", "num_rows", "curriculum")  # what the section around them cannot have
FALSE_WORDS = ("false", "no", "off")


def resolve(config: RunConfig, given: Collection[str]) -> None:
    """Set every value that follows from others, but for the keys that are `given` by the user."""
    for key, value in derived_values(config):
        section, name = section_of(config, key)
        if section is not None and key not in given and not any(k.startswith(f"{key}.") for k in given):
            setattr(section, name, copy(value))


def derived_values(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """(key, value) of all that follows from other fields where the user says nothing else; later rows see what earlier
    ones have set. docs/configuration.md has them as a table."""
    role, trained = config.trained
    yield "tokenizer_path", trained.path
    yield f"{role}.seed", config.seed
    for name in ("prompt_template", "system_prompt", "chat_template_kwargs"):
        yield f"valid_dataset.{name}", vars(config.train_dataset)[name]
    for key, dataset in datasets_of(config):
        for part in dataset.mixture:
            for name in SHARED:
                yield f"{key}.mixture.{part}.{name}", vars(dataset)[name]
    if not isinstance(config, GRPOConfig):
        yield "allocation_mode", "fsdp:d1"
        return
    actor, rollout = config.actor, config.rollout
    for name in ("ref", "critic"):
        yield f"{name}.seed", config.seed
    for name in ("server", "ref", "critic"):
        yield f"{name}.dtype", actor.dtype
    for name in ("actor", "ref"):  # the distribution that was sampled from
        yield f"{name}.temperature", config.gconfig.temperature
    yield "actor.max_new_tokens", config.gconfig.max_new_tokens
    for name, value in vars(config.gconfig).items():
        yield f"eval_gconfig.{name}", {"n_samples": 1, "temperature": 0.0}.get(name, value)
    yield "rollout.consumer_batch_size", config.train_dataset.batch_size
    yield "gateway.context_length", config.server.context_length
    yield "rollout.max_concurrent_rollouts", (rollout.max_head_offpolicyness + 1) * config.train_dataset.batch_size
    if config.critic is not None:  # it takes the place of the group's mean
        yield "actor.reward_norm", NormConfig(mean="none", std="none")
        yield "actor.adv_norm", NormConfig(mean="batch", std="batch")
    if actor.lora is not None:  # adapters travel as small folders
        yield "weight_update", "disk"
        if replaces_adapters_only_when_unused(config):
            yield "rollout.pause_mode", "abort"
    elif "sglang" in config.allocation_mode or config.cluster.num_nodes > 1:  # cannot read shm
        yield "weight_update", "distributed"


def datasets_of(config: RunConfig) -> Iterator[tuple[str, DatasetConfig]]:
    """(key, section) of each data set that there is, those of a mixture after the section that holds them."""
    for key, dataset in (("train_dataset", config.train_dataset), ("valid_dataset", config.valid_dataset)):
        if dataset is not None:
            yield key, dataset
            yield from ((f"{key}.mixture.{name}", part) for name, part in dataset.mixture.items())


def contradictions(config: RunConfig) -> Iterator[str]:
    """Every contradiction found; none when the configuration can run."""
    for check in (paths, datasets, schedule):
        yield from check(config)
    if isinstance(config, GRPOConfig):
        for rule in (generation, lengths, batches, normalisation, loss, servers):
            yield from rule(config)


def paths(config: RunConfig) -> Iterator[str]:
    key, trained = config.trained
    if not trained.path:
        yield f"{key}.path is missing: give a Hugging Face folder, a fetched model's name, or a hub id"
    for key, dataset in datasets_of(config):
        if dataset.path and dataset.mixture:
            yield f"{key} has a path ({dataset.path}) and a mixture: move the path into the mixture, or remove one"
        elif not dataset.path and not dataset.mixture:
            otherwise = ", or valid_dataset=null" if key == "valid_dataset" else ""
            yield f"{key}.path is missing: give a JSONL / Parquet file, a hub id, or reasoning_gym:TASK{otherwise}"
    for key, name in (("experiment_name", config.experiment_name), ("trial_name", config.trial_name)):
        if name.strip(" .") == "" or name != name.strip() or "/" in name or not name.isprintable() or len(name) > 99:
            yield (
                f"{key} is {name!r:.100}: it names a folder, so it needs at least one letter and 99 at most, no '/', no"
                " line break, and no blank at its ends"
            )
    if isinstance(config, GRPOConfig):
        if config.ref is not None and not config.ref.path:
            yield "ref.path is missing: the reference is usually the start model, ref.path=${actor.path}"
        if config.critic is not None and not config.critic.path:
            yield "critic.path is missing: usually a reward model or the start model, critic.path=${actor.path}"


def generation(config: GRPOConfig) -> Iterator[str]:
    said = set()
    for key, g in (("gconfig", config.gconfig), ("eval_gconfig", config.eval_gconfig)):
        for problem in sampling(key, g):
            if (of_both := problem.replace("eval_gconfig", "gconfig")) not in said:  # else it only follows gconfig
                said.add(of_both)
                yield problem
    if config.gconfig.temperature == 0:
        yield "gconfig.temperature is 0: greedy answers explore nothing and have no usable logprobs; set it above 0"


def sampling(key: str, g: GenerationHyperparameters) -> Iterator[str]:
    if g.min_new_tokens > g.max_new_tokens:
        yield (
            f"{key}.min_new_tokens ({g.min_new_tokens}) is above {key}.max_new_tokens ({g.max_new_tokens}):"
            " lower the first or raise the second"
        )
    if g.top_k == 0:
        yield f"{key}.top_k is 0, which leaves no token: -1 is off"
    if "" in g.stop:
        yield f"{key}.stop holds an empty string, which ends every answer at once: remove it"
    if g.temperature == 0 and g.n_samples > 1:
        yield (
            f"{key}.temperature is 0 and {key}.n_samples is {g.n_samples}: all answers of a group would be equal;"
            f" set {key}.temperature above 0 or {key}.n_samples=1"
        )


def datasets(config: RunConfig) -> Iterator[str]:
    named = [*datasets_of(config)]
    for key, d in named:
        yield from mixed(key, d)
        if "{prompt}" not in d.prompt_template:
            yield f"{key}.prompt_template is {d.prompt_template!r}: it must hold {{prompt}}, the place of the question"
        for name, value in d.chat_template_kwargs.items():
            if str(value).lower() in FALSE_WORDS and not isinstance(value, bool):
                yield (
                    f"{key}.chat_template_kwargs.{name} is the text {value!r}, and any text counts as true in a"
                    f" template: write {name}: false"
                )
        if d.path.startswith(REASONING_GYM) and d.num_rows is None:
            yield f"{key}.num_rows is missing: {d.path} makes as many tasks as asked for, such as {key}.num_rows=1000"
        if d.curriculum is not None and d.path and not d.path.startswith(REASONING_GYM):
            yield f"{key}.curriculum is for reasoning_gym tasks, but {key}.path is {d.path!r}: leave it out (null)"
        if d.params and not d.path.startswith(REASONING_GYM):
            yield f"{key}.params are for reasoning_gym tasks, but {key}.path is {d.path!r}: remove them"
    # Generated tasks follow from `params.seed`, or else from the split (dataset/sources.py).
    streams = [{(d.path, d.params.get("seed", d.split)) for key, d in named if key.startswith(k)} for k in ("t", "v")]
    for path in sorted({path for path, _ in streams[0] & streams[1] if path.startswith(REASONING_GYM)}):
        yield (
            f"train_dataset and valid_dataset are both {path} from the same seed, so the held-out"
            " tasks would be training tasks: set valid_dataset.split=test and no params.seed, or another params.seed"
        )


def mixed(key: str, dataset: DatasetConfig) -> Iterator[str]:
    """What is wrong with a data set as a mixture, or as a part of one."""
    if dataset.weight is not None and ".mixture." not in key:
        yield f"{key}.weight is for the data sets of a mixture: set {key}.mixture.NAME.weight"
    of_one = [name for name in OF_ONE if dataset.mixture and vars(dataset)[name] != vars(DatasetConfig())[name]]
    yield from (f"{key}.{name} is of one data set of the mixture: set {key}.mixture.NAME.{name}" for name in of_one)
    for name, part in dataset.mixture.items():
        place = f"{key}.mixture.{name}"
        if part.mixture:
            yield f"{place}.mixture: a mixture holds data sets, no mixtures: give its data sets names beside the others"
        if not name or "." in name:
            yield f"{key}.mixture has the name {name!r}: give one with a letter and without a dot"
        for field in OF_ALL:
            if vars(part)[field] != vars(DatasetConfig())[field]:
                yield f"{place}.{field} is of the whole mixture: set {key}.{field}"


def lengths(config: GRPOConfig, limit: int | None = None) -> Iterator[str]:
    """`limit`: tokens that the model can read, where that is known and `server.context_length` is not given."""
    context = config.server.context_length or limit
    if context is None:
        return
    named = f"server.context_length ({context})" if limit is None else f"what the model can read ({context} tokens)"
    for key, g, rows_key, d in (
        ("gconfig", config.gconfig, "train_dataset", config.train_dataset),
        ("eval_gconfig", config.eval_gconfig, "valid_dataset", config.valid_dataset),
    ):
        if d is None:
            continue
        if context <= g.max_new_tokens:
            yield (
                f"{named} leaves no room for a prompt beside {key}.max_new_tokens ({g.max_new_tokens}): lower that"
                f"{', or raise server.context_length' if limit is None else ''}"
            )
        elif d.max_prompt_tokens is not None and d.max_prompt_tokens + g.max_new_tokens > context:
            yield (
                f"{rows_key}.max_prompt_tokens ({d.max_prompt_tokens}) + {key}.max_new_tokens ({g.max_new_tokens}) is"
                f" above {named}: set {rows_key}.max_prompt_tokens={context - g.max_new_tokens}"
                + (f" or server.context_length={d.max_prompt_tokens + g.max_new_tokens}" if limit is None else "")
            )


def batches(config: GRPOConfig) -> Iterator[str]:
    num_prompts = config.train_dataset.batch_size
    for key, role in (("actor", config.actor), ("critic", config.critic)):
        parts = 1 if role is None else role.ppo_n_minibatches
        if num_prompts % parts:
            yield (
                f"train_dataset.batch_size ({num_prompts}) is not divisible by {key}.ppo_n_minibatches ({parts}): set"
                f" train_dataset.batch_size={-(-num_prompts // parts) * parts} or another number of mini-batches"
            )


def normalisation(config: GRPOConfig) -> Iterator[str]:
    n = config.gconfig.n_samples
    for key, norm in (("actor.reward_norm", config.actor.reward_norm), ("actor.adv_norm", config.actor.adv_norm)):
        if norm is None:
            continue
        by_group = [f"{key}.{field}" for field in ("mean", "std") if vars(norm)[field] == "group"]
        if norm.leave_one_out and norm.mean == "none":
            yield f"{key}.leave_one_out is about the mean, but {key}.mean is none: set {key}.mean=group"
        if key == "actor.reward_norm" and n == 1 and (by_group or norm.leave_one_out):
            yield (
                f"gconfig.n_samples is 1, so normalisation by group ({', '.join(by_group) or key + '.leave_one_out'})"
                " makes every advantage 0: raise gconfig.n_samples, or set actor.reward_norm.mean=batch"
                " actor.reward_norm.std=batch actor.reward_norm.leave_one_out=false"
            )


def loss(config: GRPOConfig) -> Iterator[str]:
    actor = config.actor
    if actor.kl_weight > 0 and config.ref is None:
        yield (
            f"actor.kl_weight is {actor.kl_weight} but there is no reference: add ref.path=${{actor.path}}, or set"
            " actor.kl_weight=0"
        )
    if actor.gamma != 1 and config.critic is None and not (actor.kl_in == "reward" and actor.kl_weight > 0):
        yield (
            f"actor.gamma is {actor.gamma} but discounts only a KL in the reward, and with a critic: set"
            " actor.kl_in=reward, critic.path or gamma=1"
        )
    if actor.gae_lambda != 1 and config.critic is None:
        yield f"actor.gae_lambda is {actor.gae_lambda} but there is no critic: add critic.path, or leave it out"
    if not actor.use_decoupled_loss:
        fresh = type(actor)()
        for field in ("behav_imp_correction", "behav_imp_weight_cap"):
            if vars(actor)[field] != vars(fresh)[field]:
                yield (
                    f"actor.{field} is {vars(actor)[field]!r} but actor.use_decoupled_loss is false, so nothing uses"
                    f" it: set actor.use_decoupled_loss=true or leave actor.{field} out"
                )
    if actor.overlong_tokens > config.gconfig.max_new_tokens:
        yield (
            f"actor.overlong_tokens ({actor.overlong_tokens}) is above gconfig.max_new_tokens"
            f" ({config.gconfig.max_new_tokens}): every answer would be punished; lower the first"
        )
    if actor.reward_clip == 0 or actor.reward_scaling == 0:
        yield "actor.reward_clip or actor.reward_scaling is 0, which makes every reward 0: leave it out"


def servers(config: GRPOConfig) -> Iterator[str]:
    lora = config.actor.lora
    if config.weight_update == "shm" and config.cluster.num_nodes > 1:
        yield (
            f"weight_update is shm, which works within one machine, but cluster.num_nodes is"
            f" {config.cluster.num_nodes}: leave it out (then it is distributed), or"
            " set weight_update=disk"
        )
    if config.server.dtype != config.actor.dtype and lora is None:
        yield (
            f"server.dtype is {config.server.dtype} and actor.dtype {config.actor.dtype}: after each update the servers"
            " must hold exactly the trainer's weights, so leave server.dtype out, or set both to the same"
        )
    if config.ref is not None and config.ref.lora is not None:
        yield "ref.lora is given, but the reference is not trained: remove it"
    if lora is not None and config.weight_update != "disk":
        yield (
            f"weight_update is {config.weight_update}, but the adapters of actor.lora reach the servers as small"
            " folders: leave weight_update out, or set weight_update=disk"
        )
    if lora is not None and config.rollout.pause_mode != "abort" and replaces_adapters_only_when_unused(config):
        yield (
            f"rollout.pause_mode is {config.rollout.pause_mode}, but SGLang and vLLM replace an adapter only while no"
            " request uses it: set rollout.pause_mode=abort, with which requests go on from the tokens they have"
        )
    if lora is not None and not lora.target_modules:
        yield "actor.lora.target_modules is empty: name the linear layers that get an adapter, such as [q_proj, v_proj]"


def replaces_adapters_only_when_unused(config: GRPOConfig) -> bool:
    return "sglang" in config.allocation_mode or "vllm" in config.allocation_mode


def schedule(config: RunConfig) -> Iterator[str]:
    if config.total_train_steps is not None:
        yield from warm_up(config, config.total_train_steps)
    if has_frequency(config.evaluator) and config.valid_dataset is None:
        yield "evaluator has a frequency but there is no valid_dataset: add valid_dataset.path, or remove the frequency"
    if config.recover.mode == "auto" and not has_frequency(config.recover):
        yield (
            "recover.mode is auto but no frequency says when to write recovery points, so nothing could be resumed:"
            " set recover.freq_s or recover.freq_steps, or recover.mode=off"
        )
    watchdog = config.watchdog
    if watchdog.action == "restart" and config.recover.mode != "auto":
        yield (
            f"watchdog.action is restart but recover.mode is {config.recover.mode}: a restart needs recovery points;"
            " set recover.mode=auto or watchdog.action=stop"
        )
    if watchdog.heartbeat_s >= watchdog.stall_s:
        yield (
            f"watchdog.heartbeat_s ({watchdog.heartbeat_s}) is not below watchdog.stall_s ({watchdog.stall_s}): every"
            " process would look stalled; lower the first"
        )


def warm_up(config: RunConfig, num_steps: int) -> Iterator[str]:
    """Of a run of `num_steps` steps, which dataset/loader.py knows where they are given as epochs."""
    roles = [config.trained]
    if isinstance(config, GRPOConfig) and config.critic is not None:
        roles.append(("critic", config.critic))
    for key, role in roles:
        if role.optimizer.warmup_steps >= num_steps:
            yield (
                f"{key}.optimizer.warmup_steps ({role.optimizer.warmup_steps}) leaves nothing of the run's {num_steps}"
                " steps: lower it, or raise total_train_steps or total_train_epochs"
            )


def needs_prox_logp(actor: PPOActorConfig) -> bool:
    """Whether the proximal policy's logprobs must be known before the update. With one update per step it is the very
    policy that the update's forward pass computes."""
    later = actor.ppo_n_minibatches > 1 and actor.use_decoupled_loss
    return later or (actor.kl_in == "reward" and actor.kl_weight != 0)


def has_frequency(frequency: FrequencyConfig) -> bool:
    return any(f is not None for f in (frequency.freq_steps, frequency.freq_epochs, frequency.freq_s))
