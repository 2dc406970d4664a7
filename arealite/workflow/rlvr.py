"""One prompt, several answers, a verifiable reward for each: the workflow of GRPO on single-turn tasks.

Created by scripts; run by the rollout head (and by evaluation/) for many tasks at the same time.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters, InferenceEngineConfig
from arealite.api.errors import RequestError, RewardError
from arealite.api.protocols import InferenceEngine
from arealite.api.types import Completion, GenerationRequest, Task, Trajectory
from arealite.dataset.prompts import prompt_of, turn_end
from arealite.reward.pool import RewardFunction, RewardPool
from arealite.rollout.episodes import all_members


class RLVRWorkflow:
    """Chat template -> `n_samples` answers -> rewards -> trajectories.

    The reward function sees what was written: special tokens (a tokenizer may have `<answer>` as one) and stop strings
    stay in the text, only the token that ended the answer is left out.

    Args:
        reward_fn: `reward_fn(prompt, completion, prompt_ids, completion_ids, answer=..., **task.extras)` gives a
            number, or a dict with "reward" and named parts. It runs in worker processes; see reward/pool.py.
        gconfig: sampling; `n_samples` is the group size.
        tokenizer: the policy's, with its chat template; what the template is given beside the messages, such as
            enable_thinking, comes with the task (`train_dataset.chat_template_kwargs`).
        config: number of reward workers and their time limit; the defaults if not given.
        context_length: tokens of prompt and answer together at most; unchecked if not given (the server refuses then).
    """

    def __init__(
        self,
        reward_fn: RewardFunction,
        gconfig: GenerationHyperparameters,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: InferenceEngineConfig | None = None,
        context_length: int | None = None,
    ) -> None:
        config = config or InferenceEngineConfig()
        self.gconfig = gconfig
        self.tokenizer = tokenizer
        self.context_length = context_length
        eos = tokenizer.eos_token_id
        # The server may be of another folder, whose end tokens are others.
        self._stop_token_ids = tuple(dict.fromkeys([*gconfig.stop_token_ids, *([] if eos is None else [eos])]))
        turn = [] if tokenizer.chat_template is None else turn_end(tokenizer)
        # Of tokens that were asked to stop at, those that end any turn are no part of the answer.
        self._shown = set(gconfig.stop_token_ids) - {eos, *turn[:1]}
        self.pool = RewardPool(reward_fn, config.num_reward_workers, config.reward_timeout_s, config.reward_retries)

    async def arun_episode(self, engine: InferenceEngine, task: Task) -> list[Trajectory]:
        """One trajectory per member; a member whose reward failed has status "reward_error".

        Raises:
            ConfigError: the reward function does not take what the task has.
            RequestError: prompt and answer do not fit into the context, or the server refused the request.
        """
        self.pool.named_arguments(task.answer, task.extras)  # a wrong signature is told before anything is generated
        text, ids = self._prompt(task)
        return await all_members(self.gconfig.n_samples, lambda i: self._run_member(engine, task, i, text, ids))

    def close(self) -> None:
        """End the reward workers."""
        self.pool.close()

    def _prompt(self, task: Task) -> tuple[str, list[int]]:
        text, ids = prompt_of(self.tokenizer, task)
        num_tokens = len(ids) + self.gconfig.max_new_tokens
        if self.context_length is not None and num_tokens > self.context_length:
            raise RequestError(
                f"the prompt of task {task.id} has {len(ids)} tokens; with {self.gconfig.max_new_tokens} new ones that"
                f" is more than the context of {self.context_length}. Set train_dataset.max_prompt_tokens, lower"
                " gconfig.max_new_tokens, or raise server.context_length"
            )
        return text, ids

    def _written(self, completion: Completion) -> str:
        ids = completion.token_ids
        is_ended = completion.finish_reason == "stop" and not isinstance(completion.matched, str)
        if is_ended and ids and ids[-1] not in self._shown:
            ids = ids[:-1]
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

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
                stop_token_ids=self._stop_token_ids,
                group_id=task.id,
            )
        )
        generated = time.monotonic()
        ids, num_prompt = completion.token_ids, len(prompt_ids)
        text = self._written(completion)
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
