"""Episodes of several turns: the model answers, an environment says what comes of it, until one of them ends it.

Scripts bring an Environment of their own (docs/environments.md), foreign_environments.py those of other packages;
multi_turn.py and tool_use.py have environments, too. All of them run in the one loop of EnvironmentWorkflow.
"""

from __future__ import annotations

import inspect
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters
from arealite.api.errors import ArealiteError, ConfigError, RequestError, RewardError
from arealite.api.protocols import InferenceEngine
from arealite.api.types import Status, Task, Trajectory
from arealite.dataset.prompts import Message, chat_messages
from arealite.gateway.asks import Answer, Ask
from arealite.gateway.prompting import Prompter
from arealite.gateway.session import LimitReached, Session, SessionLimits, Turn
from arealite.observe.waits import bounded, in_thread
from arealite.rollout.episodes import all_members

End = Literal["done", "truncated"]  # said by the environment: it is over, or its own limit is reached
StopReason = Literal["done", "truncated", "turns", "tokens", "time", "tool_calls", "context"]  # or by a limit
STOP_REASONS: tuple[StopReason, ...] = get_args(StopReason)


class EnvironmentFailed(ArealiteError):
    """An environment raised, passed its time limit, or said what nobody understands; with its traceback."""


@dataclass(frozen=True)
class Observation:
    """What an environment says after an answer, or at the beginning.

    `messages` come next in the conversation: a text is what a user says, or, where the task is raw text, what the text
    goes on with. `reward` is for the answer that led here, with named `parts`. `end`: the episode is over, and there is
    no further answer. `statistics` are added up over the episode, and their means over a step are logged as
    workflow_<name>.
    """

    messages: str | list[Message] = ""
    reward: float = 0.0
    end: End | None = None
    parts: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)


Said = Observation | str | list[Message]


class Environment(ABC):
    """One attempt at a task: made for it, reset once, closed once.

    Methods are `def`, and then run in a thread of their own with a time limit, or `async def`, and then share the event
    loop with all other episodes, so that they must not block. Calls of one environment never overlap. What a method
    raises makes this attempt "failed", which is counted and is not a reward of 0.
    """

    tools: Sequence[dict[str, Any]] = ()  # offered to the model with the next answer, in the chat form

    @abstractmethod
    def reset(self, task: Task) -> Said | Awaitable[Said]:
        """Begin; returns what the model is told first. All attempts at one task must begin alike."""

    @abstractmethod
    def step(self, answer: Answer) -> Said | Awaitable[Said]:
        """What comes of the model's answer; `answer.text` is what it said."""

    def close(self) -> Awaitable[None] | None:
        """Release what the attempt holds; called also after a failure."""
        return None


class EnvironmentWorkflow:
    """`n_samples` attempts at a task, each a session with an environment of its own.

    Args:
        make_environment: makes an Environment, a class for example.
        gconfig: sampling of each turn; `n_samples` is the group size.
        tokenizer: the policy's, with its chat template.
        limits: of a session: turns, tokens, seconds, calls of tools. An attempt that reaches one has the rewards that
            it has earned so far.
        step_limit_s: of each call of the environment; an attempt whose environment is slower has failed.
            None: for environments whose calls neither block nor hang.
        turn_discount: per turn. An answer's tokens are trained on the sum of the rewards from that turn on, each
            discounted by the turns until it comes; None: on the sum of all rewards of the attempt.
    """

    def __init__(
        self,
        make_environment: Callable[[], Environment],
        gconfig: GenerationHyperparameters,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limits: SessionLimits | None = None,
        step_limit_s: float | None = 60.0,
        turn_discount: float | None = None,
    ) -> None:
        self.make_environment, self.gconfig, self.tokenizer = make_environment, gconfig, tokenizer
        self.limits, self.step_limit_s, self.turn_discount = limits or SessionLimits(), step_limit_s, turn_discount
        self._prompter = Prompter(tokenizer)

    async def arun_episode(self, engine: InferenceEngine, task: Task) -> list[Trajectory]:
        """One trajectory per attempt. Its statistics tell: `num_turns`, `num_tool_calls`, which limit stopped
        it (`stop_<reason>`, 0 or 1), and what the environment counted. "failed": its environment has failed.

        Raises:
            RequestError: the first prompt does not fit into the context, or the server refused a request.
            ConfigError: raised by the environment.
        """
        return await all_members(self.gconfig.n_samples, lambda i: self._run_member(engine, task, i))

    def close(self) -> None:
        """Nothing is owned between episodes."""

    async def _run_member(self, engine: InferenceEngine, task: Task, member: int) -> Trajectory:
        session = Session(f"{task.id}.{member}", engine, self._prompter, self.gconfig, self.limits)
        parts: dict[str, float] = {}
        status: Status = "failed"
        outcome: float | None = 0.0  # what is rewarded are turns
        counts: Counter[str] = Counter({f"stop_{reason}": 0 for reason in STOP_REASONS})
        try:
            stop = await self._play(session, task, parts, counts)
        except RewardError as error:
            status, outcome = "reward_error", None
            session.finish("failed", str(error))
        except (EnvironmentFailed, RequestError) as error:
            if isinstance(error, RequestError) and not any(turn.sampled for turn in session.turns.values()):
                raise  # it is the task's, and the same for all attempts
            outcome = None
            session.finish("failed", str(error))
        else:
            counts[f"stop_{stop}"] = 1  # a mean over sessions needs the zeros, too
        finally:
            session.finish()  # cancelled, it gives up what is being sampled
        trajectory = session.trajectory(task, member, outcome, self.turn_discount, status)
        return replace(trajectory, reward_parts=parts, statistics=trajectory.statistics | counts)

    async def _play(self, session: Session, task: Task, parts: dict[str, float], counts: Counter[str]) -> StopReason:
        """Turn by turn, until the environment or a limit ends it."""
        environment: Environment = await self._call("constructor", self.make_environment)
        try:
            observation = _observed(await self._call("reset", environment.reset, task))
            conversation = Conversation(self.tokenizer, is_raw=task.messages is None)
            while observation.end is None:
                conversation.hear(observation.messages)
                try:
                    turn = await session.ask(conversation.ask(environment.tools, task))
                except LimitReached as limit:
                    if not session.turns:
                        raise RequestError(f"task {task.id} has no room for an answer: {limit}") from limit
                    return limit.reason
                conversation.say(turn)
                observation = _observed(await self._call("step", environment.step, turn.answer))
                session.reward(observation.reward, turn.id)
                parts |= observation.parts
                counts.update(observation.statistics)
            if not session.turns:
                raise EnvironmentFailed("the environment was over before the model was asked")
            return observation.end
        finally:
            await self._call("close", environment.close)

    async def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Of the user's code. Raises EnvironmentFailed; ConfigError and RewardError pass."""
        try:
            if self.step_limit_s is None:
                return await function(*arguments) if inspect.iscoroutinefunction(function) else function(*arguments)
            if inspect.iscoroutinefunction(function):
                return await bounded(function(*arguments), "environment", what, self.step_limit_s)
            return await in_thread(lambda: function(*arguments), "environment", what, self.step_limit_s)
        except (ConfigError, RewardError):
            raise
        except Exception as error:  # the user's code: whatever it raises, this attempt has failed, and no other
            raise EnvironmentFailed(traceback.format_exc()) from error


class Conversation:
    """What was said so far: messages, or one text where the task is raw text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, is_raw: bool) -> None:
        self._tokenizer, self._is_raw = tokenizer, is_raw
        self._messages: list[Message] = []
        self._text = ""

    def hear(self, said: str | list[Message]) -> None:
        """Of the environment. Raises EnvironmentFailed: messages where the task is raw text."""
        if self._is_raw and not isinstance(said, str):
            raise EnvironmentFailed("the task is raw text and the environment said messages; expected a text")
        if isinstance(said, str):
            self._text += said
            self._messages.append({"role": "user", "content": said})
        else:
            self._messages += said

    def say(self, turn: Turn) -> None:
        """Of the model."""
        if self._is_raw:
            self._text += str(self._tokenizer.decode(turn.sampled, clean_up_tokenization_spaces=False))
        else:
            self._messages += chat_messages("answer", [turn.answer.message()])

    def ask(self, tools: Sequence[dict[str, Any]], task: Task) -> Ask:
        """For the next answer."""
        if self._is_raw:
            return Ask(prompt=self._text)
        return Ask(list(self._messages), tools=list(tools), template_options=task.template_options)


def _observed(said: Any) -> Observation:
    if isinstance(said, Observation):
        return said
    if isinstance(said, str | list):
        return Observation(said)
    raise EnvironmentFailed(f"the environment said a {type(said).__name__}; expected text, messages or an Observation")
