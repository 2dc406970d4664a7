"""What runs an agent for one session: a coroutine, a command line, or a service elsewhere. Each is given the gateway's
address and the session's key, and leaves a reward, or nothing but its trace and its folder, to be judged by others.

Made by scripts, for workflow/agents.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import secrets
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import aiohttp

from arealite.api.errors import ArealiteError, ConfigError, RewardError, WaitTimeout
from arealite.api.types import Task
from arealite.observe.loop_thread import LoopBlocked, SideLoop
from arealite.observe.processes import SLOT_VARIABLE
from arealite.observe.reasons import reasons
from arealite.observe.run_folder import RUN_DIR_VARIABLE, RunFolder
from arealite.observe.waits import bounded
from arealite.reward.pool import Score
from arealite.reward.sandbox import SandboxError, best_kind, bubblewrap, readable
from arealite.reward.worker import told_result
from arealite.workflow import warden

STOP_LIMIT_S = 10.0  # for a warden to end all that its program started
TAIL_BYTES = 64 << 10  # of what a program writes that are kept
ERROR_CHARACTERS = 2000
MAX_REPLY_BYTES = 1 << 20  # of a service
HOUSE = Path("/agent")  # where a locked-up program sees its folder
FIRST_UID = 3_000_000_000  # of locked-up programs, where root starts them; those of rewards are below
LOCKED_FILE_BYTES = 1 << 30
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "TZ")
# By these the launcher finds what a run has left on a machine, and kills it.
RUN_VARIABLES = (RUN_DIR_VARIABLE, SLOT_VARIABLE, "AREALITE_PROCESS")


WARDEN = [sys.executable, "-I", "-S", warden.__file__]


class AgentFailed(ArealiteError):
    """The agent crashed, passed a limit or could not be started: says nothing about what it has done."""


@dataclass(frozen=True)
class Assignment:
    """What one agent is to do, and how it reaches the model: Anthropic's clients by `base_url`, OpenAI's by
    `base_url`/v1, both with `api_key`, which is the session."""

    task: Task
    base_url: str
    api_key: str
    model: str
    session_id: str
    limit_s: float

    @property
    def prompt(self) -> str:
        """The task's text, or what its last message says."""
        return self.task.prompt or str((self.task.messages or [{}])[-1].get("content", ""))


@dataclass(frozen=True)
class AgentEnd:
    """What an agent leaves: its own word on its reward, if it has one, and its folder, which is there as long as the
    runner's context is open."""

    score: Score | None = None
    workspace: Path | None = None


class AgentRunner(Protocol):
    """Runs one agent; many at the same time. The context ends with all that the agent started."""

    def run(self, assignment: Assignment) -> AbstractAsyncContextManager[AgentEnd]:
        """Raises AgentFailed; RewardError: it ended well, and its own reward cannot be read."""

    def close(self) -> None: ...


class AgentCoroutine:
    """`async def agent(task, base_url, api_key)`, whose result is the reward: a number, a dict with "reward" and named
    parts, or None where it comes from elsewhere. `base_url` is OpenAI's or, without its /v1, Anthropic's.

    Coroutines run in a loop of their own, so that one that blocks holds up its like only.
    """

    def __init__(self, agent: Callable[..., Awaitable[Any]]) -> None:
        if not iscoroutinefunction(agent):
            raise ConfigError(
                f"the agent is {agent!r}; expected `async def agent(task, base_url, api_key)`. A program that blocks"
                " belongs into a process: AgentCommand"
            )
        self._agent = agent
        self._loop = SideLoop("the event loop of the agents")

    @asynccontextmanager
    async def run(self, assignment: Assignment) -> AsyncIterator[AgentEnd]:
        """As AgentRunner.run. Waits for: the coroutine, to its limit, and a little longer for its loop to turn."""
        a = assignment
        work = self._told(self._agent(a.task, f"{a.base_url}/v1", a.api_key))
        try:
            result = await self._loop.run(work, "agent.coroutine", a.limit_s)
        except LoopBlocked as error:
            raise AgentFailed(f"{too_long(a.limit_s)}, and {error}: await what it waits for") from error
        except WaitTimeout as error:
            raise AgentFailed(too_long(a.limit_s)) from error
        yield AgentEnd(_score_of(result))

    async def _told(self, work: Awaitable[Any]) -> Any:
        try:
            return await work
        except RewardError:
            raise
        except Exception as error:  # user code: whatever it raises is a failed session, told and counted
            raise AgentFailed(traceback.format_exc()) from error

    def close(self) -> None:
        self._loop.close()


@dataclass
class AgentService:
    """A service that runs agents elsewhere: it is sent {task, base_url, api_key, model, session_id} and answers with
    {"reward": ...} when the agent has ended, or at once with status 202, where the reward comes by the gateway's
    control call. `headers` go with each request."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @asynccontextmanager
    async def run(self, assignment: Assignment) -> AsyncIterator[AgentEnd]:
        """As AgentRunner.run. Waits for: the answer, to the session's limit."""
        a = assignment
        body = {"task": asdict(a.task), "base_url": a.base_url, "api_key": a.api_key, "model": a.model}
        try:
            status, reply = await bounded(
                self._post(body | {"session_id": a.session_id}), "agent.service", self.url, a.limit_s
            )
        except (aiohttp.ClientError, OSError, WaitTimeout) as error:
            raise AgentFailed(f"{self.url}: {type(error).__name__}: {error}") from error
        if not 200 <= status < 300:
            raise AgentFailed(f"{self.url} answered {status}: {reply[:ERROR_CHARACTERS].decode(errors='replace')}")
        yield AgentEnd(None if status == 202 else _score_of(_read_json(reply, f"the answer of {self.url}")))

    async def _post(self, body: dict[str, Any]) -> tuple[int, bytes]:
        no_limit = aiohttp.ClientTimeout(total=None)  # the session's is around it
        async with (
            aiohttp.ClientSession(timeout=no_limit) as client,
            client.post(self.url, json=body, headers=self.headers) as response,
        ):
            reply = bytearray()
            async for piece in response.content.iter_chunked(1 << 16):
                reply += piece
                if len(reply) > MAX_REPLY_BYTES:
                    raise AgentFailed(f"{self.url} answered more than {MAX_REPLY_BYTES} bytes")
            return response.status, bytes(reply)

    def close(self) -> None:
        pass


@dataclass
class AgentCommand:
    """A command line of any program, in a folder of its own, which is its working folder and removed at the end.

    In `words` and in the values of `env` {prompt}, {base_url}, {api_key}, {model}, {workspace}, {task_id} and the
    names of the row's other columns of text or numbers are filled in. The program's environment is `env`, PATH and the
    language of this process, HOME (a folder beside the workspace), and the base URLs and keys that the SDKs of OpenAI
    and Anthropic read. With its end, or at the session's limit, all that it started ends.

    Args:
        reward: "last_line": JSON, a number or an object with "reward", is the last line of its output; "exit_code":
            0 is worth 1, 1 is worth 0, and any other is a failure; None: others judge, and any code but 0 is a failure.
        files: a folder whose content is copied into the workspace.
        max_output_bytes: of its output, and of its error output; one that writes more is ended, and has failed.
        is_locked_up: it runs in bubblewrap: it reads the system's and this interpreter's libraries, `visible` paths and
            its own folder, reaches the gateway and no other network, sees no other process, and has at most
            `max_processes`. Memory and the sum of its files are not limited.
    """

    words: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    reward: Literal["last_line", "exit_code"] | None = None
    files: Path | None = None
    max_output_bytes: int = 16 << 20
    is_locked_up: bool = False
    visible: Sequence[str] = ()
    max_processes: int = 512

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not self.words or isinstance(self.words, str):
            raise ConfigError(f"words is {self.words!r}; expected a list, the program first")
        if self.files is not None and not self.files.is_dir():
            raise ConfigError(f"files is {self.files}, which is no folder")
        try:
            if self.is_locked_up and best_kind() != "bubblewrap":
                raise ConfigError("agents are locked up by bubblewrap, which cannot make namespaces on this machine")
        except SandboxError as error:
            raise ConfigError(f"agents cannot be locked up: {error}") from error

    @asynccontextmanager
    async def run(self, assignment: Assignment) -> AsyncIterator[AgentEnd]:
        """As AgentRunner.run. Waits for: the program, to the session's limit, and for its warden to end the rest."""
        house = await asyncio.to_thread(_new_house)
        try:
            words, env = await asyncio.to_thread(self._settle, assignment, house)
            code, output, errors = await self._end_of(words, env, house / "work", assignment.limit_s)
            yield AgentEnd(self._score(code, output, errors), house / "work")
        finally:
            await asyncio.to_thread(shutil.rmtree, house, ignore_errors=True)

    def close(self) -> None:
        pass

    async def _end_of(
        self, words: list[str], env: dict[str, str], workspace: Path, limit_s: float
    ) -> tuple[int, bytes, bytes]:
        """Exit code, and the ends of output and error output. Raises AgentFailed."""
        process = await asyncio.create_subprocess_exec(
            *words, env=env, cwd=workspace, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        tails = asyncio.gather(self._tail(process, process.stdout), self._tail(process, process.stderr))
        try:
            code = await bounded(process.wait(), "agent.command", self.words[0], limit_s)
        except WaitTimeout as error:
            raise AgentFailed(too_long(limit_s)) from error
        finally:
            await _end(process)
            (num_output, output), (num_errors, errors) = await tails  # nobody is left to write
        if max(num_output, num_errors) > self.max_output_bytes:
            raise AgentFailed(f"it wrote more than {self.max_output_bytes} bytes (max_output_bytes)")
        return code, output, errors

    async def _tail(self, process: asyncio.subprocess.Process, stream: asyncio.StreamReader) -> tuple[int, bytes]:
        """How many bytes came, and the last of them. With too many the program is ended."""
        num_bytes, tail = 0, b""
        while piece := await stream.read(TAIL_BYTES):
            if num_bytes <= self.max_output_bytes < num_bytes + len(piece):
                process.send_signal(signal.SIGTERM)
            num_bytes, tail = num_bytes + len(piece), (tail + piece)[-TAIL_BYTES:]
        return num_bytes, tail

    def _score(self, code: int, output: bytes, errors: bytes) -> Score | None:
        """Raises AgentFailed, RewardError."""
        if self.reward == "exit_code" and code in (0, 1):
            return Score(1.0 - code)
        if code != 0:
            number = code - warden.BY_SIGNAL
            how = f"was killed by signal {number}" if number > 0 else f"ended with exit code {code}"
            told = (errors.strip() or output.strip())[-ERROR_CHARACTERS:].decode(errors="replace")
            raise AgentFailed(f"{self.words[0]} {how}: {told}")
        if self.reward is None:
            return None
        last = (output.strip().splitlines() or [b""])[-1]
        return _score_of(_read_json(last, "the last line of the agent's output"))

    def _settle(self, assignment: Assignment, house: Path) -> tuple[list[str], dict[str, str]]:
        """Furnish the house; the words that start the warden, and the environment."""
        (house / "home").mkdir()
        shutil.copytree(self.files, house / "work", symlinks=True) if self.files else (house / "work").mkdir()
        a, place, seen, base_url = assignment, urlsplit(assignment.base_url), house, assignment.base_url
        if self.is_locked_up:  # there it is the warden that listens
            seen, base_url = HOUSE, base_url.replace(place.netloc, f"127.0.0.1:{warden.PORT}", 1)
        known = {name: str(value) for name, value in a.task.extras.items() if isinstance(value, str | int | float)}
        known |= {"prompt": a.prompt, "base_url": base_url, "api_key": a.api_key, "model": a.model}
        known |= {"task_id": a.task.id, "workspace": str(seen / "work")}

        def filled(text: str) -> str:
            return re.sub(r"\{(\w+)\}", lambda match: known.get(match[1], match[0]), text)

        env = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        env |= {"HOME": str(seen / "home"), "OPENAI_BASE_URL": f"{base_url}/v1", "ANTHROPIC_BASE_URL": base_url}
        env |= {"OPENAI_API_KEY": a.api_key, "ANTHROPIC_API_KEY": a.api_key}
        env |= {name: filled(value) for name, value in self.env.items()}
        words, gateway = [filled(word) for word in self.words], None
        if self.is_locked_up:
            words, gateway = self._locked_up(words, house), [place.hostname, place.port or 80]
        marks = {name: os.environ[name] for name in RUN_VARIABLES if name in os.environ}
        order = {"parent": os.getpid(), "words": words, "marks": marks, "gateway": gateway}
        return [*WARDEN, json.dumps(order)], env

    def _locked_up(self, words: list[str], house: Path) -> list[str]:
        """The words that run these within namespaces of their own."""
        uid = FIRST_UID + secrets.randbelow(1 << 30) if os.getuid() == 0 else None
        (house / "passwd").write_text(f"agent:x:{os.getuid() if uid is None else uid}:0::{HOUSE / 'home'}:/bin/sh\n")
        if uid is not None:
            for path in (house, *house.rglob("*")):
                os.chown(path, uid, uid, follow_symlinks=False)
        limits = [(resource.RLIMIT_NPROC, self.max_processes), (resource.RLIMIT_FSIZE, LOCKED_FILE_BYTES)]
        order = {"uid": uid, "limits": [*limits, (resource.RLIMIT_CORE, 0)], "words": words}
        inside = bubblewrap([*readable(), *self.visible, warden.__file__], is_root=uid is not None)
        inside += ["--die-with-parent", "--proc", "/proc", "--dev", "/dev", "--bind", str(house), str(HOUSE)]
        inside += ["--ro-bind", str(house / "passwd"), "/etc/passwd", "--chdir", str(HOUSE / "work"), "--"]
        return [*inside, *WARDEN, json.dumps(order)]


def _new_house() -> Path:
    """In the run's folder, if there is one: what a killed trainer leaves there, its next start removes (run.py)."""
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    place = RunFolder(Path(run_dir).absolute()).agents_dir if run_dir else None
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="arealite-agent-", dir=place))


def too_long(limit_s: float) -> str:
    return f"no end within {limit_s:g} s (gateway.session_timeout_s)"


async def _end(process: asyncio.subprocess.Process) -> None:
    """The warden ends its program, and with it all that it started; at last it is killed itself."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await bounded(process.wait(), "agent.end", f"warden {process.pid}", STOP_LIMIT_S)
        except WaitTimeout as error:
            reasons.tell("agents", f"an agent's processes do not end after SIGKILL: {error}")
            process.kill()


def _read_json(raw: bytes, what: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        shown = raw[:ERROR_CHARACTERS].decode(errors="replace")
        raise RewardError(f'{what} is {shown!r}; expected a number, or an object with "reward"') from error


def _score_of(result: Any) -> Score | None:
    """Raises RewardError: it is no reward."""
    if result is None:
        return None
    reward, parts, error = told_result(result)
    if error:
        raise RewardError(error.replace("reward function", "agent"))
    return Score(reward, parts)
