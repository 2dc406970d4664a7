"""Environments of other packages: gymnasium, textarena, OpenEnv, verifiers; each against the package itself."""

import asyncio
import subprocess
import sys
import threading

import pytest
from support.episodes import listening

from arealite.api.errors import ConfigError
from arealite.api.types import Task
from arealite.gateway.asks import Answer
from arealite.workflow.foreign_environments import Gymnasium, OpenEnv, TextArena, Verifiers


def test_gymnasium_renders_text_and_refuses_what_is_no_action():
    gymnasium = pytest.importorskip("gymnasium")

    def make():
        return gymnasium.make("FrozenLake-v1", render_mode="ansi", is_slippery=False)

    game = Gymnasium(make, "0 left, 1 down, 2 right, 3 up")
    begin = game.reset(Task("e0-r0"))
    assert begin.startswith("0 left") and "SFFF" in begin.replace("\x1b[41mS\x1b[0m", "S")
    refused = game.step(Answer("I go 7"))
    assert refused.end is None and "Discrete(4)" in refused.messages
    assert refused.statistics == {"num_invalid_actions": 1}
    assert game.step(Answer("hm")).statistics == {"num_invalid_actions": 1}
    steps = [game.step(Answer(f"I go {action}")) for action in (2, 2, 1, 1, 1, 2)]
    assert [s.reward for s in steps] == [0, 0, 0, 0, 0, 1] and steps[-1].end == "done" and steps[-2].end is None
    game.close()


def test_gymnasium_of_texts_and_of_pictures():
    gymnasium = pytest.importorskip("gymnasium")

    class Reversed(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Text(20)

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.word = "".join(self.np_random.choice(list("abcdef"), 5))
            return self.word, {}

        def step(self, action):
            return "over", float(action == self.word[::-1]), False, True, {}

    game = Gymnasium(Reversed, "Say it in reverse.")
    word = game.reset(Task("e0-r1", extras={"seed": 3})).splitlines()[1]
    assert Gymnasium(Reversed, "").reset(Task("e0-r2", extras={"seed": 3})).strip() == word
    last = game.step(Answer(f" {word[::-1]}\n"))
    assert (last.reward, last.end, last.messages) == (1.0, "truncated", "over")
    with pytest.raises(ConfigError, match="ansi"):
        Gymnasium(lambda: gymnasium.make("FrozenLake-v1"), "").reset(Task("e0-r0"))


def test_textarena_alone():
    pytest.importorskip("textarena")

    def game(row):
        made = TextArena("GuessTheNumber-v0", max_turns=30)
        return made, made.reset(Task(row)).messages

    played, told = game("e0-r3")
    assert "Guess The Number" in told
    low, high = 1, 20
    while True:
        guess = (low + high) // 2
        said = played.step(Answer(f"[{guess}]"))
        if said.end:
            break
        low, high = (guess + 1, high) if "higher" in said.messages else (low, guess - 1)
        assert f"[{guess}]" not in said.messages, "the model knows what it said"
    assert (said.reward, said.end) == (1.0, "done")
    # All attempts at a task play the same game, also when they begin at the same time.
    secrets = set()
    threads = [
        threading.Thread(target=lambda: secrets.add(game("e0-r3")[0]._env.state.game_state["game_number"]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert secrets == {guess}
    lost, _ = game("e0-r4")
    assert lost.step(Answer("no number")).end is None
    said = lost.step(Answer("no number"))
    assert said.end == "done" and said.statistics == {"num_invalid_actions": 1}


def test_textarena_with_an_opponent():
    pytest.importorskip("textarena")
    heard = []

    def opponent(text):
        heard.append(text)
        return "[1 1]"

    with pytest.raises(ConfigError, match="opponent"):
        TextArena("Nim-v0", num_players=2)
    game = TextArena("Nim-v0", opponent, 2, piles=[2, 1])
    assert "Nim" in game.reset(Task("e0-r0")).messages
    said = game.step(Answer("[0 1]"))
    assert len(heard) == 1 and "[0 1]" in heard[0] and "[1 1]" in said.messages
    assert game.step(Answer("[0 1]")).reward == 1.0


OPENENV_PROGRAM = """
import sys
import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Say(Action):
    text: str


class Heard(Observation):
    text: str


class Parrot(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **others):
        self.words = [f"word{seed}"]
        return Heard(text=f"Say {self.words[0]}")

    def step(self, action, timeout_s=None, **others):
        if action.text == "fall":
            raise ValueError("it fell")
        done = action.text == self.words[0]
        return Heard(text="right" if done else "again", done=done, reward=float(done))

    @property
    def state(self):
        return State()


uvicorn.run(create_fastapi_app(Parrot, Say, Heard, max_concurrent_envs=4), port=int(sys.argv[1]), log_level="warning")
"""


def test_openenv_sessions_of_one_server(tmp_path, free_port):
    pytest.importorskip("openenv")
    (tmp_path / "parrot.py").write_text(OPENENV_PROGRAM)
    command = [sys.executable, str(tmp_path / "parrot.py"), str(free_port)]

    def parrot():
        return OpenEnv(f"http://127.0.0.1:{free_port}", lambda text: {"text": text}, lambda seen: seen["text"])

    async def two_sessions():
        one, other = parrot(), parrot()
        told = [(await one.reset(Task("a", extras={"seed": 1}))).messages]
        told += [(await other.reset(Task("b", extras={"seed": 2}))).messages]
        wrong, right = await one.step(Answer("word2")), await other.step(Answer("word2"))
        with pytest.raises(RuntimeError, match="it fell"):
            await one.step(Answer("fall"))
        await one.close()
        await other.close()
        return told, wrong, right

    with subprocess.Popen(command) as server:
        try:
            listening(free_port)
            told, wrong, right = asyncio.run(two_sessions())
        finally:
            server.kill()
    assert told == ["Say word1", "Say word2"]
    assert (wrong.messages, wrong.reward, wrong.end) == ("again", 0.0, None)
    assert (right.messages, right.reward, right.end) == ("right", 1.0, "done")


def test_verifiers_questions_have_rewards_of_their_own():
    vf = pytest.importorskip("verifiers.v1")

    class SumTask(vf.Task):
        @vf.reward(weight=0.5)
        async def is_right(self, trace):
            return float(trace.last_reply == self.data.name)

        @vf.reward
        async def is_short(self, trace):
            return float(len(trace.last_reply) < 4)

        @vf.metric
        async def num_messages(self, trace):
            return float(len(trace.messages))

    class FileTask(vf.Task):
        @vf.reward
        async def file_is_there(self, trace, runtime):
            return 1.0

    tasks = [
        SumTask(vf.TaskData(prompt="2 + 3?", name="5", system_prompt="Be short.")),
        FileTask(vf.TaskData(prompt="Write a file.")),
    ]
    question = Verifiers(tasks)
    assert question.reset(Task("e0-r0", extras={"index": 0})) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2 + 3?"},
    ]
    right, long = (asyncio.run(question.step(Answer(text))) for text in ("5", "it is 5"))
    assert (right.reward, right.parts, right.end) == (1.5, {"is_right": 0.5, "is_short": 1.0}, "done")
    assert right.statistics == {"num_messages": 3.0} and long.reward == 0.0
    with pytest.raises(ConfigError, match="file_is_there"):
        Verifiers(tasks).reset(Task("e0-r1", extras={"index": 1}))
