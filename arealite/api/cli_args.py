"""Every configuration field, with its default and its documentation. Loaded by api/load_config.py.

What concerns the life of any run stands in run_args.py. Seconds end in `_s`, counts start with `num_` or `max_`. The
doc line of a field is shown by `arealite check --explain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from arealite.api.run_args import (
    ClusterSpecConfig,
    EvaluatorConfig,
    LauncherConfig,
    RayConfig,
    RecoverConfig,
    SaverConfig,
    StatsLoggerConfig,
    WatchdogConfig,
)
from arealite.api.sections import Section, derived, setting


@dataclass
class GenerationHyperparameters(Section):
    """How answers are sampled."""

    n_samples: int = setting(8, "answers per prompt: the group size", low=1)
    max_new_tokens: int = setting(512, "tokens per answer at most", low=1)
    min_new_tokens: int = setting(0, "tokens before a stop token or string may end an answer (SGLang: a token)", low=0)
    temperature: float = setting(1.0, "sampling temperature; 0 is greedy", low=0)
    top_p: float = setting(1.0, "nucleus mass; see top_k", low=1e-6, high=1)
    top_k: int = setting(
        -1,
        "sample among the k likeliest tokens; -1 is all. With top_k, top_p, min_p the recorded logprobs stay those of"
        " the full vocabulary (vLLM: of what is left); the metric cut_mass_mean is the probability cut",
        low=-1,
    )
    min_p: float = setting(0.0, "drop tokens less likely than this share of the likeliest; see top_k", low=0, high=1)
    stop: list[str] = setting(list, "strings that end an answer")
    stop_token_ids: list[int] = setting(list, "token ids that end an answer, besides the model's own")


@dataclass
class DatasetConfig(Section):
    """Where tasks come from."""

    path: str = setting(
        "", "a JSONL / Parquet file, a folder, a name of the catalog, a hub id, or reasoning_gym:TASK", is_path=True
    )
    columns: dict[str, str] = setting(dict, "which column is what, such as question: problem; else by usual names")
    malformed_rows: Literal["refuse", "skip"] = setting(
        "refuse", "refuse a bad row, or leave it out, counted and shown"
    )
    split: str = setting("train", "split of a hub data set")
    subset: str | None = setting(None, "configuration name of a hub data set (GSM8K: main)")
    params: dict[str, Any] = setting(dict, "parameters of a reasoning_gym task")
    curriculum: float | None = setting(
        None,
        "reasoning_gym: begin at the first level of the curriculum, num_rows tasks a level; the next is due when the"
        " mean reward of the last batch_size groups reaches this",
    )
    mixture: dict[str, DatasetConfig] = setting(dict, "in place of path: name -> data set, all of them drawn as one")
    weight: float | None = setting(
        None,
        "in a mixture: the share of the draws beside the others' weights; the number of rows if not given",
        low=1e-6,
    )
    num_rows: int | None = setting(None, "use the first rows only; the number of rows for reasoning_gym", low=1)
    batch_size: int = setting(16, "prompts per step", low=1)
    shuffle: bool = setting(True, "a new order every epoch, from the seed")
    rest_epochs: int = setting(
        0, "epochs that a prompt rests whose answers were all rewarded alike, solved always or never", low=0
    )
    prompt_template: str = setting("{prompt}", "what the user says, with the row's question in place of {prompt}")
    system_prompt: str | None = setting(None, "system message put before every chat prompt")
    chat_template_kwargs: dict[str, Any] = setting(
        dict, "variables of the chat template, such as enable_thinking: false; a row's column `tools` is one more"
    )
    max_prompt_tokens: int | None = setting(None, "rows with longer prompts are left out, counted and reported", low=1)
    max_length: int | None = setting(
        None, "supervised: longer rows, in tokens, are left out, counted and reported", low=2
    )


@dataclass
class InferenceEngineConfig(Section):
    """The rollout head: client, executor, staleness."""

    max_head_offpolicyness: int = setting(
        1, "eta: weight versions that a trained token may be behind; 0 is synchronous", low=0
    )
    consumer_batch_size: int | None = derived("groups per step: train_dataset.batch_size")
    max_concurrent_rollouts: int | None = setting(
        None, "groups in flight at most; those of eta + 1 steps if not given", low=1
    )
    stale_policy: Literal["correct", "requeue", "drop"] = setting("correct", "what is done to a group older than eta")
    request_timeout_s: float = setting(600.0, "longest time one request may take before it is sent again", low=0.1)
    request_retries: int = setting(3, "times a request is sent again after a connection error", low=0)
    setup_timeout_s: float = setting(300.0, "longest wait for healthy servers, at start and when all are out", low=0.1)
    server_silence_s: float = setting(
        20.0, "a server silent for so long is taken out; its requests go on elsewhere", low=0.1
    )
    workflow_retries: int = setting(2, "times a failed episode is run again before it is counted and dropped", low=0)
    max_failed_groups: int = setting(8, "groups that may fail in a row before the run stops with their error", low=1)
    num_reward_workers: int = setting(1, "processes that run reward functions", low=1)
    reward_timeout_s: float = setting(15.0, "hard limit of one reward call: its process is killed", low=0.1)
    reward_retries: int = setting(0, "times a reward that failed is computed again", low=0)
    reward_failure: Literal["answer", "group", "stop"] = setting(
        "answer", "what a failed reward costs: the answer, its whole group, or the run"
    )
    pause_mode: Literal["abort", "retract", "in_place"] = setting("retract", "what updates do to running requests")


@dataclass
class ServerConfig(Section):
    """The inference servers that the launcher starts."""

    dtype: Literal["bfloat16", "float32", "float16"] = setting("bfloat16", "compute type of the served model")
    context_length: int | None = setting(
        None, "tokens of prompt and answer at most; the model's limit if not given", low=2
    )
    max_running_requests: int | None = setting(None, "sequences decoded together; 64, on GPUs 256, if not given", low=1)
    kv_cache_tokens: int | None = setting(
        None, "tokens in the native KV cache; from max_running_requests if not given", low=1
    )
    deterministic: bool = setting(False, "results that do not depend on what else is in the batch (slower)")
    args: dict[str, Any] = setting(dict, "further flags of the server's own, passed through as --key value")


@dataclass
class GatewayConfig(Section):
    """Where agents reach the model in OpenAI's and Anthropic's formats, and the limits of their sessions."""

    host: str = setting("127.0.0.1", "address to listen on")
    advertised_host: str = setting("", "the address that agents are told, where it is another one than host")
    port: int = setting(0, "port to listen on; 0 takes a free one", low=0, high=65535)
    history: Literal["keep", "template"] = setting(
        "keep", "what was thought in earlier turns stays in the prompt; template: as the chat template has it"
    )
    context_length: int | None = derived("tokens of prompt and answer: server.context_length, or what servers say")
    max_sessions: int = setting(4096, "sessions that are open at a time; one more is refused", low=1)
    max_turns: int = setting(200, "turns of a session", low=1)
    max_session_tokens: int = setting(1_000_000, "tokens that a session samples at most, over all its turns", low=1)
    max_tool_calls: int = setting(500, "calls of tools in a session", low=1)
    session_timeout_s: float = setting(1800.0, "longest life of a session", low=0.1)
    idle_timeout_s: float = setting(300.0, "a session ends when it has asked nothing for so long", low=0.1)


@dataclass
class OptimizerConfig(Section):
    """How gradients become updates, and the schedule."""

    kind: Literal["adamw", "adafactor"] = setting(
        "adamw", "adafactor: next to no memory, and a step of its own size (no beta1, beta2, eps); lr means the same"
    )
    lr: float = setting(1e-6, "peak learning rate", low=0)
    weight_decay: float = setting(0.0, "decoupled weight decay of matrices; norms and biases have none", low=0)
    beta1: float = setting(0.9, "decay of the gradient's running mean", low=0, high=0.99999)
    beta2: float = setting(0.95, "decay of the squared gradient's running mean", low=0, high=0.99999)
    eps: float = setting(1e-8, "added to the root of the second moment", low=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = setting("constant", "learning rate after warm-up")
    warmup_steps: int = setting(0, "steps of linear warm-up; each makes ppo_n_minibatches updates", low=0)
    min_lr_ratio: float = setting(0.0, "learning rate at the end of linear and cosine, as a share of lr", low=0, high=1)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this global norm; inf is off", low=1e-9, high=inf)


@dataclass
class LoRAConfig(Section):
    """Low-rank adapters (LoRA) beside frozen weights, which are held in the compute dtype."""

    rank: int = setting(16, "rank of the adapters", low=1)
    alpha: int = setting(32, "what the adapters add is scaled by alpha / rank", low=1)
    target_modules: list[str] = setting(
        lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "linear layers that get an adapter, by the last part of their names",
    )


@dataclass
class TrainEngineConfig(Section):
    """One model on the trainer ranks."""

    path: str = setting("", "a Hugging Face folder or hub id", is_path=True)
    dtype: Literal["bfloat16", "float32"] = setting("bfloat16", "compute type; master weights are always float32")
    seed: int = setting(1, "seed of the trainer's own random numbers", low=0, high=10**18)
    temperature: float | None = derived("logits are divided by it before logprobs: gconfig.temperature")
    max_tokens_per_mb: int = setting(8192, "packed tokens per micro-batch", low=1)
    logprob_chunk_tokens: int = setting(1024, "tokens whose logits exist at one time", low=1)
    share_prompts: bool = setting(True, "compute what sequences of a micro-batch share once; off: each by itself")
    gradient_checkpointing: Literal["none", "full", "selective", "auto"] = setting(
        "none",
        "what the backward pass computes again to save memory: none; full: all of a layer but its input; selective: all"
        " but the results of matrix products; auto: as little as fits into the memory that is free at the start",
    )
    lora: LoRAConfig | None = setting(None, "train adapters instead of the weights; needs peft (arealite[lora])")
    offload: Literal["none", "optimizer", "all"] = setting(
        "none",
        "what the CPU holds for the accelerator: the optimizer's moments between updates; all: weights and gradients"
        " too, and the update happens there",
    )
    optimizer: OptimizerConfig = setting(OptimizerConfig, "optimiser and schedule")
    deterministic: bool = setting(False, "the same step gives the same bits; what cannot is refused (slower on GPUs)")
    collective_timeout_s: float = setting(600.0, "longest wait of one rank for the others", low=0.1)
    max_bad_steps: int = setting(
        3, "NaN or infinite updates in a row, each skipped and counted, that stop the run", low=1
    )


@dataclass
class NormConfig(Section):
    """y = (x - mean) / (std + eps); a set without spread gives exactly 0."""

    mean: Literal["group", "batch", "none"] = setting("group", "whose mean is subtracted")
    std: Literal["group", "batch", "none"] = setting("group", "whose standard deviation divides")
    leave_one_out: bool = setting(False, "the mean leaves the sample itself out (RLOO)")
    eps: float = setting(1e-6, "added to the standard deviation", low=0)


@dataclass
class PPOActorConfig(TrainEngineConfig):
    """The policy and its loss."""

    ppo_n_minibatches: int = setting(1, "optimiser updates per step, each on its own groups", low=1)
    eps_clip: float = setting(0.2, "the ratio is clipped below at 1 - eps_clip", low=0, high=1)
    eps_clip_higher: float | None = setting(
        None, "clips the ratio above at 1 + it; eps_clip if not given", low=0, high=inf
    )
    c_clip: float | None = setting(None, "dual clip: bound of the loss at negative advantages", low=1)
    max_new_tokens: int | None = derived("tokens per answer at most: gconfig.max_new_tokens")
    loss_aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = setting(
        "token-mean", "what the loss is a mean over"
    )
    importance_sampling_level: Literal["token", "sequence"] = setting("token", "ratio per token or sequence (GSPO)")
    use_decoupled_loss: bool = setting(
        True, "trust region around the recomputed policy, and a weight to the behaviour policy"
    )
    behav_imp_correction: Literal["none", "mask", "truncate"] = setting(
        "truncate", "what is done to weights above the cap"
    )
    behav_imp_weight_cap: float = setting(5.0, "cap of the importance weight", low=1)
    reward_norm: NormConfig = setting(NormConfig, "normalisation of rewards (GRPO: by group)")
    adv_norm: NormConfig | None = setting(None, "normalisation of advantages over tokens, after reward_norm")
    reward_bias: float = setting(0.0, "added to every reward, before scaling")
    reward_scaling: float = setting(1.0, "every reward is multiplied by it")
    reward_clip: float | None = setting(None, "rewards are clipped to +- this after scaling", low=0)
    overlong_tokens: int = setting(0, "DAPO: width of the soft penalty before max_new_tokens; 0 is off", low=0)
    overlong_penalty_factor: float = setting(1.0, "DAPO: penalty at full length", low=0)
    mask_truncated: bool = setting(False, "leave answers cut off at max_new_tokens out of the loss")
    kl_weight: float = setting(0.0, "weight of the KL to the reference; needs `ref`", low=0)
    kl_estimator: Literal["k1", "k2", "k3"] = setting("k2", "as in http://joschu.net/blog/kl-approx.html")
    kl_in: Literal["loss", "reward"] = setting("loss", "KL as a term of the loss, or subtracted from the reward")
    entropy_weight: float = setting(0.0, "weight of the entropy bonus", low=0)
    gamma: float = setting(1.0, "discount per token (of KL in the reward, and with a critic)", low=0, high=1)
    gae_lambda: float = setting(1.0, "with a critic: 1 trusts rewards alone, 0 the critic's next value", low=0, high=1)


@dataclass
class PPOCriticConfig(TrainEngineConfig):
    """The value model of PPO: a language model with a value head, or a folder of such a model."""

    ppo_n_minibatches: int = setting(1, "as the actor's", low=1)
    eps_clip: float = setting(0.5, "values may leave the old ones by this much before the loss is clipped", low=0)


@dataclass
class RunConfig(Section):
    """What every run has, whatever it trains."""

    kind: Literal["grpo", "sft", "rw"] = setting("grpo", "learns from rewards (grpo), answers (sft), preferences (rw)")
    experiment_name: str = setting("experiment", "first folder under cluster.fileroot")
    trial_name: str = setting("trial", "second folder: one run")
    allocation_mode: str = setting("native:d1+fsdp:d1", "who runs where (docs/allocation.md); without servers fsdp:d1")
    seed: int = setting(1, "seed of data order and sampling", low=0, high=10**18)
    total_train_steps: int | None = setting(None, "steps, a batch of prompts each; if not given, of the epochs", low=1)
    total_train_epochs: int = setting(1, "passes over the training data", low=1)
    tokenizer_path: str | None = setting(None, "tokenizer; that of the trained model if not given", is_path=True)
    train_dataset: DatasetConfig = setting(DatasetConfig, "training tasks")
    valid_dataset: DatasetConfig | None = setting(None, "held-out tasks, put into train_dataset's prompts if not given")
    saver: SaverConfig = setting(SaverConfig, "checkpoints")
    evaluator: EvaluatorConfig = setting(EvaluatorConfig, "evaluation")
    recover: RecoverConfig = setting(RecoverConfig, "recovery")
    stats_logger: StatsLoggerConfig = setting(StatsLoggerConfig, "metrics")
    watchdog: WatchdogConfig = setting(WatchdogConfig, "stall detection")
    cluster: ClusterSpecConfig = setting(ClusterSpecConfig, "machines")
    launcher: LauncherConfig = setting(LauncherConfig, "processes")
    ray: RayConfig = setting(RayConfig, "nodes from Ray")

    @property
    def trained(self) -> tuple[str, TrainEngineConfig]:
        """Key and settings of the model that the run is for."""
        raise NotImplementedError


@dataclass
class GRPOConfig(RunConfig):
    """One run of reinforcement learning: GRPO, or PPO where there is a critic."""

    weight_update: Literal["shm", "disk", "distributed"] = setting(
        "shm",
        "how weights reach the servers: memory of this host, a shared folder, broadcast;"
        " SGLang servers and other nodes cannot read shm, and have distributed if not given",
    )
    gconfig: GenerationHyperparameters = setting(GenerationHyperparameters, "sampling of training answers")
    eval_gconfig: GenerationHyperparameters = setting(
        lambda: GenerationHyperparameters(n_samples=1, temperature=0.0),
        "sampling of held-out answers: one, greedy, and for the rest as gconfig, if not given",
    )
    rollout: InferenceEngineConfig = setting(InferenceEngineConfig, "rollout head")
    server: ServerConfig = setting(ServerConfig, "inference servers")
    gateway: GatewayConfig = setting(GatewayConfig, "where agents reach the model, and the limits of their sessions")
    actor: PPOActorConfig = setting(PPOActorConfig, "policy")
    ref: TrainEngineConfig | None = setting(None, "reference policy for the KL; frozen")
    critic: PPOCriticConfig | None = setting(
        None, "value model of PPO; with it actor.reward_norm is off and actor.adv_norm over the batch if not given"
    )

    @property
    def trained(self) -> tuple[str, TrainEngineConfig]:
        return "actor", self.actor


@dataclass
class SFTConfig(RunConfig):
    """One run of supervised fine-tuning."""

    model: TrainEngineConfig = setting(TrainEngineConfig, "the model that is trained")

    @property
    def trained(self) -> tuple[str, TrainEngineConfig]:
        return "model", self.model


@dataclass
class RWConfig(SFTConfig):
    """One run that trains a reward model on pairs of answers."""
