"""Answers with a verifiable reward, and another try after a wrong one: self-correction. Created by scripts."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters, InferenceEngineConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Task
from arealite.dataset.prompts import Message, encode, prompt_of
from arealite.gateway.asks import Answer
from arealite.reward.pool import RewardFunction, RewardPool, Score
from arealite.workflow.environment import Environment, EnvironmentWorkflow, Observation


class Question:
    """A task's question, and what answers to it are worth; for environments that ask one.

    Raises:
        ConfigError: the task is raw text, or the reward function does not take what it has.
    """

    def __init__(self, pool: RewardPool, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
        pool.named_arguments(task.answer, task.extras)
        if task.messages is None:
            raise ConfigError(
                f"task {task.id} is raw text; a conversation of several turns begins with messages: name the column"
                " question or messages in place of text"
            )
        self.messages = task.messages
        self._pool, self._tokenizer, self._task = pool, tokenizer, task
        self._prompt, self._prompt_ids = prompt_of(tokenizer, task)

    async def score(self, answer: Answer) -> Score:
        """Of what the answer says, without what was thought; `completion_ids` are the tokens of that text. Raises
        RewardError."""
        ids = encode(self._tokenizer, answer.text)
        return await self._pool.score(
            self._prompt, answer.text, self._prompt_ids, ids, self._task.answer, self._task.extras
        )


FEEDBACK = "That is not right. Think again, and answer once more."


class MultiTurnWorkflow(EnvironmentWorkflow):
    """A task's question, and after each answer whose reward is below `solved` the feedback and another try.

    The last answer's reward counts, times `turn_discount` for each try before it: the tokens of a turn are trained on
    reward * turn_discount^(turns until the last), so that an answer that is right at once is worth more than one that
    comes after a hint, and an answer that was wrong has its share in what it led to.

    Args:
        reward_fn: as in workflow/rlvr.py; `completion` is the answer of that turn, and the prompt is the task's.
        max_turns: tries at most.
        turn_discount: above 0, at most 1.
        solved: the reward from which on there is no further try.
        feedback: what the model is told, or a function of the answer's score (reward and parts) that says it.
        config: number of reward workers and their time limit; the defaults if not given.
    """

    def __init__(
        self,
        reward_fn: RewardFunction,
        gconfig: GenerationHyperparameters,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_turns: int = 2,
        turn_discount: float = 0.9,
        solved: float = 1.0,
        feedback: str | Callable[[Score], str] = FEEDBACK,
        config: InferenceEngineConfig | None = None,
    ) -> None:
        if max_turns < 1 or not 0 < turn_discount <= 1:
            raise ConfigError(
                f"MultiTurnWorkflow has max_turns {max_turns} and turn_discount {turn_discount}; expected at least 1,"
                " and a number above 0, at most 1"
            )
        super().__init__(lambda: _Tries(self), gconfig, tokenizer, step_limit_s=None, turn_discount=turn_discount)
        self.max_turns, self.solved, self.feedback = max_turns, solved, feedback
        config = config or InferenceEngineConfig()
        self.pool = RewardPool(reward_fn, config.num_reward_workers, config.reward_timeout_s, config.reward_retries)

    def close(self) -> None:
        """End the reward workers."""
        self.pool.close()


class _Tries(Environment):
    """Rewards each answer, and asks again while it is not solved."""

    def __init__(self, workflow: MultiTurnWorkflow) -> None:
        self._workflow, self._num_tries = workflow, 0

    async def reset(self, task: Task) -> list[Message]:
        self._question = Question(self._workflow.pool, self._workflow.tokenizer, task)
        return self._question.messages

    async def step(self, answer: Answer) -> Observation:
        workflow = self._workflow
        score = await self._question.score(answer)
        self._num_tries += 1
        is_solved = score.reward >= workflow.solved
        counts = {"first_reward": score.reward} if self._num_tries == 1 else {}
        if is_solved or self._num_tries == workflow.max_turns:
            return Observation(reward=score.reward, end="done", parts=score.parts, statistics=counts)
        feedback = workflow.feedback if isinstance(workflow.feedback, str) else workflow.feedback(score)
        return Observation(feedback, statistics=counts)
