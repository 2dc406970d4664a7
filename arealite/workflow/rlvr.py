"""One prompt, several answers, a verifiable reward for each: the workflow of GRPO on single-turn tasks.

Created by scripts; run by the rollout head (and by evaluation/) for many tasks at the same time.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters, InferenceEngineConfig
from arealite.api.engine import InferenceEngine
from arealite.api.errors import ConfigError, RequestError, RewardError
from arealite.api.types import GenerationRequest, Task, Trajectory
from arealite.reward.pool import RewardFunction, RewardPool


class RLVRWorkflow:
    """Chat template -> `n_samples` answers -> rewards -> trajectories.

    Args:
        reward_fn: `reward_fn(prompt, completion, prompt_ids, completion_ids, answer=..., **task.extras)` gives a
            number, or a dict with "reward" and named parts. It runs in worker processes; see reward/pool.py.
        gconfig: sampling; `n_samples` is the group size.
        tokenizer: the policy's, with its chat template.
        config: number of reward workers and their time limit; the defaults if not given.
        context_length: tokens of prompt and answer together at most; unchecked if not given (the server refuses then).
        enable_thinking: passed to the chat template of models that know it.
    """

    def __init__(
        self,
        reward_fn: RewardFunction,
        gconfig: GenerationHyperparameters,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: InferenceEngineConfig | None = None,
        context_length: int | None = None,
        enable_thinking: bool | None = None,
    ) -> None:
        config = config or InferenceEngineConfig()
        self.gconfig = gconfig
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.template_options: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.pool = RewardPool(reward_fn, config.num_reward_workers, config.reward_timeout_s)

    async def arun_episode(self, engine: InferenceEngine, task: Task) -> list[Trajectory]:
        """One trajectory per member; a member whose reward failed has status "reward_error".

        Raises:
            ConfigError: the reward function does not take what the task has.
            RequestError: prompt and answer do not fit into the context, or the server refused the request.
        """
        self.pool.named_arguments(task.answer, task.extras)  # a wrong signature is told before anything is generated
        text, ids = self._prompt(task)
        members = [
            asyncio.ensure_future(self._run_member(engine, task, i, text, ids)) for i in range(self.gconfig.n_samples)
        ]
        try:
            return await asyncio.gather(*members)
        finally:
            for member in members:
                member.cancel()  # one has failed, or the episode is cancelled: the others' answers are of no use

    def close(self) -> None:
        """End the reward workers."""
        self.pool.close()

    def _prompt(self, task: Task) -> tuple[str, list[int]]:
        if task.messages is not None:
            text = self.tokenizer.apply_chat_template(
                task.messages, tokenize=False, add_generation_prompt=True, **self.template_options
            )
        elif task.prompt is not None:
            text = task.prompt
        else:
            raise ConfigError(f"task {task.id} has neither messages nor a prompt")
        # A chat template writes the special tokens itself; a raw prompt gets what the tokenizer adds.
        ids = self.tokenizer.encode(text, add_special_tokens=task.messages is None)
        num_tokens = len(ids) + self.gconfig.max_new_tokens
        if self.context_length is not None and num_tokens > self.context_length:
            raise RequestError(
                f"the prompt of task {task.id} has {len(ids)} tokens; with {self.gconfig.max_new_tokens} new ones that"
                f" is more than the context of {self.context_length}. Set train_dataset.max_prompt_tokens, lower"
                " gconfig.max_new_tokens, or raise server.context_length"
            )
        return text, ids

    async def _run_member(
        self, engine: InferenceEngine, task: Task, member: int, prompt_text: str, prompt_ids: list[int]
    ) -> Trajectory:
        g = self.gconfig
        started = time.monotonic()
        completion = await engine.agenerate(
            GenerationRequest(
                rid=f"{task.id}.{member}",
                input_ids=prompt_ids,
                max_new_tokens=g.max_new_tokens,
                min_new_tokens=g.min_new_tokens,
                temperature=g.temperature,
                top_p=g.top_p,
                top_k=g.top_k,
                min_p=g.min_p,
                stop=tuple(g.stop),
                stop_token_ids=tuple(g.stop_token_ids),
                group_id=task.id,
            )
        )
        generated = time.monotonic()
        ids, num_prompt = completion.token_ids, len(prompt_ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        outcome: dict[str, Any] = {"status": "failed", "error": f"{completion.server_id} sampled no token"}
        if ids:
            try:
                score = await self.pool.score(prompt_text, text, prompt_ids, ids, task.answer, task.extras)
                outcome = {"reward": score.reward, "reward_parts": score.parts}
            except RewardError as error:
                outcome = {"status": "reward_error", "error": str(error)}
        return Trajectory(
            task_id=task.id,
            member=member,
            tokens=[*prompt_ids, *ids],
            loss_mask=[False] * num_prompt + [True] * len(ids),
            logprobs=[0.0] * num_prompt + completion.logprobs,
            versions=[-1] * num_prompt + completion.versions,
            finish_reason=completion.finish_reason,
            prompt_text=prompt_text,
            completion_text=text,
            generate_s=generated - started,
            reward_s=time.monotonic() - generated,
            **{"reward": None, **outcome},
        )
