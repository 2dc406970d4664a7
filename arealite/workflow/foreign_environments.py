"""Environments of other packages, as workflow/environment.py has them: gymnasium, textarena, OpenEnv, verifiers.

Made by scripts: EnvironmentWorkflow(lambda: TextArena("Wordle-v0"), ...). A package is imported when its environment is
made. Tasks of reasoning-gym are rows of a data set with a reward, and need no environment (docs/environments.md).
"""

from __future__ import annotations

import inspect
import random
import re
import threading
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from arealite.api.errors import ConfigError
from arealite.api.types import Task
from arealite.dataset.prompts import Message
from arealite.gateway.asks import Answer
from arealite.workflow.environment import Environment, Observation

if TYPE_CHECKING:
    import gymnasium
    import verifiers.v1 as vf

INTEGER = re.compile(r"-?\d+")
PLAYER = 0
_global_random = threading.Lock()  # textarena seeds the random numbers of the whole process


def seed_of(task: Task) -> int:
    """What an environment is reset with, so that all attempts at a task begin alike: the row's column `seed`, or a
    number of the task's id."""
    return int(task.extras.get("seed", zlib.crc32(task.id.encode())))


def _missing(package: str, extra: str, error: ImportError) -> ConfigError:
    return ConfigError(f"this environment needs {package} ({error}): pip install 'arealite[{extra}]'")


class Gymnasium(Environment):
    """An environment of gymnasium that speaks text: by its observations, or by what it renders as text.

    Args:
        make: makes it, such as `lambda: gymnasium.make("FrozenLake-v1", render_mode="ansi")`.
        rules: said at the beginning: what the game is, and how an action is written.
        read_action: the action that a text names, None if it names none. By default the text, where actions are text,
            or the last integer in it, where they are numbers.
    """

    def __init__(
        self, make: Callable[[], gymnasium.Env[Any, Any]], rules: str, read_action: Callable[[str], Any] | None = None
    ) -> None:
        self._env, self._rules, self._read_action = make(), rules, read_action or self._plain_action

    def reset(self, task: Task) -> str:
        seen, _ = self._env.reset(seed=seed_of(task))
        return f"{self._rules}\n{self._shown(seen)}"

    def step(self, answer: Answer) -> Observation:
        action = self._read_action(answer.text)
        if action is None or not self._env.action_space.contains(action):
            return Observation(
                f"That is no action; expected one of {self._env.action_space}.", statistics={"num_invalid_actions": 1}
            )
        seen, reward, is_over, is_cut, _ = self._env.step(action)
        return Observation(self._shown(seen), float(reward), "done" if is_over else "truncated" if is_cut else None)

    def close(self) -> None:
        self._env.close()

    def _shown(self, seen: Any) -> str:
        text = seen if isinstance(seen, str) else self._env.render()
        if not isinstance(text, str):
            raise ConfigError(
                f"{self._env} observes {type(seen).__name__} and renders {type(text).__name__}; expected text of one of"
                ' them: make it with render_mode="ansi", or wrap its observations'
            )
        return text

    def _plain_action(self, text: str) -> Any:
        import gymnasium

        if isinstance(self._env.action_space, gymnasium.spaces.Text):
            return text.strip()
        numbers = INTEGER.findall(text)
        return int(numbers[-1]) if numbers else None


class TextArena(Environment):
    """A game of textarena, which the model plays as the first player.

    Args:
        name: such as "GuessTheNumber-v0"; made without the package's wrappers, which say the whole history each time.
        opponent: what the other players answer to what they are told; needed for games of several players.
        num_players: of the game.
        options: of the game, in place of those that it is registered with.
    """

    def __init__(
        self, name: str, opponent: Callable[[str], str] | None = None, num_players: int = 1, **options: Any
    ) -> None:
        try:
            import textarena
        except ImportError as error:
            raise _missing("textarena", "textarena", error) from None
        if num_players > 1 and opponent is None:
            raise ConfigError(f"{name} has {num_players} players: give an opponent, which answers for the others")
        self._env = textarena.make(f"{name}-raw", **options)
        self._opponent, self._num_players = opponent, num_players

    def reset(self, task: Task) -> Observation:
        with _global_random:
            state = random.getstate()
            try:
                self._env.reset(num_players=self._num_players, seed=seed_of(task))
            finally:
                random.setstate(state)
        return self._until_asked()

    def step(self, answer: Answer) -> Observation:
        self._is_over, _ = self._env.step(answer.text)
        return self._until_asked()

    def _until_asked(self) -> Observation:
        """The others play until it is the model's turn, or the game is over."""
        is_over = self._env.state.done
        while not is_over:
            player, told = self._env.get_observation()
            text = "\n".join(said for speaker, said, _ in told if speaker != player)
            if player == PLAYER:
                return Observation(text)
            assert self._opponent is not None, "the constructor refuses games of several players without one"
            is_over, _ = self._env.step(self._opponent(text))
        rewards, told = self._env.close()
        invalid = {"num_invalid_actions": float(bool(told[PLAYER].get("invalid_move")))}
        return Observation(reward=float((rewards or {}).get(PLAYER, 0)), end="done", statistics=invalid)


class OpenEnv(Environment):
    """A session with a server of OpenEnv.

    Args:
        url: of the server; it must allow as many sessions as there are attempts at a time.
        act: the action, a JSON object as that environment has it, of what the model said.
        tell: what the model is told of an observation, a JSON object.
    """

    def __init__(self, url: str, act: Callable[[str], dict[str, Any]], tell: Callable[[dict[str, Any]], str]) -> None:
        try:
            from openenv.core import GenericEnvClient
        except ImportError as error:
            raise _missing("openenv", "openenv", error) from None
        self._client, self._act, self._tell = GenericEnvClient(base_url=url), act, tell

    async def reset(self, task: Task) -> Observation:
        return self._observed(await self._client.reset(seed=seed_of(task)))

    async def step(self, answer: Answer) -> Observation:
        return self._observed(await self._client.step(self._act(answer.text)))

    async def close(self) -> None:
        await self._client.close()

    def _observed(self, result: Any) -> Observation:
        return Observation(self._tell(result.observation), float(result.reward or 0), "done" if result.done else None)


class Verifiers(Environment):
    """A question of a task set of verifiers, with that task's own rewards and metrics.

    Args:
        tasks: the task set, as a list; a row's column `index` says which of them it is.

    Tasks that work on files or call tools of their own are for agents (docs/agents.md), and are refused.
    """

    def __init__(self, tasks: list[vf.Task[Any, Any, Any]]) -> None:
        self._tasks = tasks

    def reset(self, task: Task) -> list[Message]:
        import verifiers.v1 as vf

        self._task = self._tasks[int(task.extras["index"])]
        asked, rewards = self._task.data, self._task.hooks("reward")
        needy = [reward.__name__ for reward in rewards if "runtime" in inspect.signature(reward).parameters]
        if needy or self._task.NEEDS_CONTAINER or asked.prompt is None or not rewards:
            raise ConfigError(
                f"{type(self._task).__name__} is no question with rewards of its own (prompt {asked.prompt!r}, rewards"
                f" that need a runtime {needy}, in a container {self._task.NEEDS_CONTAINER}): run it with an agent"
            )
        system = [] if asked.system_prompt is None else [vf.SystemMessage(content=asked.system_prompt)]
        prompt = [vf.UserMessage(content=asked.prompt)] if isinstance(asked.prompt, str) else asked.prompt
        self._messages: list[Any] = [*system, *prompt]
        return [message.model_dump(exclude_none=True) for message in self._messages]

    async def step(self, answer: Answer) -> Observation:
        import verifiers.v1 as vf

        said = vf.AssistantMessage(content=answer.text, reasoning_content=answer.reasoning or None)
        trace = vf.Trace(
            task=vf.TraceTask(type=type(self._task).__name__, data=self._task.data),
            agent=vf.AgentInfo(config=vf.AgentConfig()),
            nodes=[
                vf.MessageNode(parent=i - 1 if i else None, message=message, sampled=message is said)
                for i, message in enumerate([*self._messages, said])
            ],
        )
        await self._task.score(trace)
        parts = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        return Observation(reward=trace.reward, end="done", parts=parts, statistics=metrics)
