"""Questions that are answered with tools: plain Python functions, and those of MCP servers. Created by scripts.

What a tool says, its errors among them, is told to the model as text; only a tool that cannot be reached at all makes
the attempt fail.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import shlex
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError, validate_call
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters, InferenceEngineConfig
from arealite.api.errors import ArealiteError, ConfigError, WaitTimeout
from arealite.api.types import Task
from arealite.dataset.prompts import Message
from arealite.gateway.asks import Answer, CallOfTool
from arealite.gateway.session import SessionLimits
from arealite.observe.waits import bounded, in_background, in_thread
from arealite.reward.pool import RewardFunction, RewardPool
from arealite.workflow.environment import Environment, EnvironmentWorkflow, Observation
from arealite.workflow.multi_turn import Question

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from mcp import Client

Tool = Callable[..., Any] | str

MAX_LATE = 64  # calls of functions that have passed their limit and still run, before no more are made
END_LIMIT_S = 10.0


class ToolUnreachable(ArealiteError):
    """An MCP server has ended or does not answer: the attempt has failed, and is not the model's fault."""


@dataclass(frozen=True)
class ToolResult:
    """What the model is told."""

    text: str
    is_error: bool = False


class _PlainSchema(GenerateJsonSchema):
    """Without a title for each argument, which says its name again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class FunctionTool:
    """A function as a tool: its name, its docstring, and its arguments by their types.

    Raises:
        ConfigError: it has no docstring, or a type that JSON cannot carry.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name, self.is_async = function.__name__, inspect.iscoroutinefunction(function)
        described = inspect.getdoc(function)
        if not described:
            raise ConfigError(f"the tool {self.name} has no docstring: say there what it does, for the model to know")
        try:
            arguments: TypeAdapter[Any] = TypeAdapter(function)  # type: ignore[arg-type]  # pydantic reads its signature
            parameters = arguments.json_schema(schema_generator=_PlainSchema)
            self.run = validate_call(function)
        except (PydanticUserError, TypeError, NameError) as error:
            raise ConfigError(f"the arguments of the tool {self.name} cannot be described: {error}") from error
        self.schema = _schema(self.name, described, parameters)

    def refusal(self, error: ValidationError) -> str:
        """What is wrong with the arguments, for the model."""
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        expected = json.dumps(self.schema["function"]["parameters"]["properties"])
        return f"{self.name} cannot be called like this: {'; '.join(faults)}. Its arguments are {expected}"


def _schema(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


class McpServer:
    """The tools of one MCP server. One connection serves all episodes, in a thread of its own, so that it can be closed
    whatever event loops have ended; where it is lost, the next call opens another one.

    `target` is a URL, or the command line that starts the server and talks to it by standard input and output.
    """

    def __init__(self, target: str, limit_s: float) -> None:
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise ConfigError(f"the tools of {target!r} need the package mcp: pip install 'arealite[mcp]'") from None
        self.target, self.limit_s = target, limit_s
        self._lock = asyncio.Lock()
        self._connection: _Connection | None = None

    async def schemas(self) -> list[dict[str, Any]]:
        """The tools that the server has, in the chat form. Raises ConfigError: it cannot be reached, or has none."""
        from mcp import MCPError

        try:
            page = await self._run(lambda client: client.list_tools())
            tools = list(page.tools)
            while page.next_cursor is not None:
                page = await self._run(partial(_next_page, page.next_cursor))
                tools += page.tools
        except (ToolUnreachable, MCPError) as error:
            raise ConfigError(f"no tools of {self.target!r}, expected a URL or a server's command: {error}") from error
        return [_schema(tool.name, tool.description or "", tool.input_schema) for tool in tools]

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Raises ToolUnreachable."""
        from mcp import MCPError

        try:
            result = await self._run(lambda client: client.call_tool(name, arguments))
        except MCPError as error:  # it refuses, or takes too long
            return ToolResult(str(error), True)
        texts = [block.text if block.type == "text" else f"[{block.type}]" for block in result.content]
        return ToolResult("\n".join(texts), result.is_error)

    def close(self) -> None:
        """End the connection, and the server if it was started. May be called again, from any thread."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.stack.close()

    async def _run(self, ask: Callable[[Client], Awaitable[Any]]) -> Any:
        """What the server answers. Raises ToolUnreachable, and MCPError as the server says it."""
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        try:
            async with self._lock:
                if self._connection is None:
                    self._connection = await in_thread(self._connect, "mcp: start", self.target, 2 * self.limit_s)
                connection = self._connection
            answer = connection.portal.start_task_soon(ask, connection.client)
            return await bounded(asyncio.wrap_future(answer), "mcp: call", self.target, 2 * self.limit_s)
        except Exception as error:  # of the server, or of any kind of transport: no such command, no connection
            if isinstance(error, MCPError) and error.code != CONNECTION_CLOSED:
                raise
            await in_thread(self.close, "mcp: end", self.target, END_LIMIT_S)
            raise ToolUnreachable(f"the MCP server {self.target!r} cannot be reached: {error!r}") from error

    def _connect(self) -> _Connection:
        from anyio.from_thread import start_blocking_portal
        from mcp import Client, StdioServerParameters

        command = shlex.split(self.target)
        is_url = self.target.startswith(("http://", "https://"))
        server = self.target if is_url else StdioServerParameters(command=command[0], args=command[1:])
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            client = Client(server, read_timeout_seconds=self.limit_s)
            stack.enter_context(portal.wrap_async_context_manager(client))
            return _Connection(client, portal, stack.pop_all())


@dataclass(frozen=True)
class _Connection:
    """An open client, and the event loop of its thread; the stack closes both."""

    client: Client
    portal: BlockingPortal
    stack: ExitStack


async def _next_page(cursor: str, client: Client) -> Any:
    return await client.list_tools(cursor=cursor)


class Toolbox:
    """The tools of a workflow, called by name.

    Args:
        tools: functions (`def` in a thread each, so that it may block, or `async def`), and MCP servers: URLs, or
            command lines. Names are unique.
        limit_s: of one call. A thread that is late goes on; it counts against MAX_LATE until it ends.
        max_chars: of a result; what is longer is cut, and that is said.
    """

    def __init__(self, tools: Sequence[Tool], limit_s: float, max_chars: int) -> None:
        self.limit_s, self.max_chars = limit_s, max_chars
        self._late: set[Future[Any]] = set()  # calls whose result nobody waits for any more
        functions = [FunctionTool(tool) for tool in tools if not isinstance(tool, str)]
        self._functions = {tool.name: tool for tool in functions}
        self._schemas = [tool.schema for tool in functions]
        self._servers = [McpServer(tool, limit_s) for tool in tools if isinstance(tool, str)]
        self._server_of: dict[str, McpServer] = {}
        self._is_open, self._lock = False, asyncio.Lock()

    async def schemas(self) -> list[dict[str, Any]]:
        """All tools in the chat form; servers are asked once. Raises ConfigError: unreachable, or a name twice."""
        async with self._lock:
            if not self._is_open:
                offered = [(server, await server.schemas()) for server in self._servers]
                schemas = [*self._schemas, *(schema for _, found in offered for schema in found)]
                counts = Counter(schema["function"]["name"] for schema in schemas)
                if twice := [name for name, count in counts.items() if count > 1]:
                    raise ConfigError(f"several tools are named {', '.join(twice)}: a call could mean any of them")
                self._server_of = {schema["function"]["name"]: server for server, found in offered for schema in found}
                self._schemas, self._is_open = schemas, True
        return self._schemas

    async def call(self, call: CallOfTool) -> ToolResult:
        """Raises ToolUnreachable; all else that goes wrong is told."""
        arguments = json.loads(call.arguments)
        if call.name in self._functions:
            result = await self._call_function(self._functions[call.name], arguments)
        elif call.name in self._server_of:
            result = await self._server_of[call.name].call(call.name, arguments)
        else:
            names = ", ".join([*self._functions, *self._server_of])
            result = ToolResult(f"there is no tool {call.name}; there are {names}", True)
        if len(result.text) <= self.max_chars:
            return result
        return ToolResult(f"{result.text[: self.max_chars]}\n[cut: {len(result.text)} characters]", result.is_error)

    def close(self) -> None:
        """End the connections to servers."""
        for server in self._servers:
            server.close()

    async def _call_function(self, tool: FunctionTool, arguments: dict[str, Any]) -> ToolResult:
        self._late = {late for late in self._late if not late.done()}
        if len(self._late) >= MAX_LATE:
            return ToolResult(f"{tool.name} was not called: {MAX_LATE} earlier calls still run", True)
        running = None if tool.is_async else in_background(lambda: tool.run(**arguments), tool.name)
        try:
            result = tool.run(**arguments) if running is None else asyncio.wrap_future(running)
            said = await bounded(result, "tool", tool.name, self.limit_s)
            return ToolResult(said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, default=str))
        except ValidationError as error:
            return ToolResult(tool.refusal(error), True)
        except WaitTimeout:
            if running is not None:
                self._late.add(running)
            return ToolResult(f"{tool.name} gave no result within {self.limit_s:g} s", True)
        except Exception as error:  # the tool's code: the model is told, and goes on
            return ToolResult(f"{tool.name} failed: {type(error).__name__}: {error}", True)


class ToolWorkflow(EnvironmentWorkflow):
    """A task's question, and calls of tools until the model answers without one; that answer is rewarded.

    Calls of one answer are made in parallel. An attempt that reaches a limit before it answers has the reward 0.

    Args:
        reward_fn: as in workflow/rlvr.py; `completion` is the last answer, and the prompt is the task's.
        tools: functions, URLs and command lines of MCP servers; see Toolbox.
        limits: of a session, as in workflow/environment.py.
        tool_limit_s: of one call.
        max_result_chars: of what a tool says.
        config: number of reward workers and their time limit; the defaults if not given.
    """

    def __init__(
        self,
        reward_fn: RewardFunction,
        tools: Sequence[Tool],
        gconfig: GenerationHyperparameters,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limits: SessionLimits | None = None,
        tool_limit_s: float = 30.0,
        max_result_chars: int = 8000,
        config: InferenceEngineConfig | None = None,
    ) -> None:
        super().__init__(lambda: _ToolUse(self), gconfig, tokenizer, limits=limits, step_limit_s=None)
        config = config or InferenceEngineConfig()
        self.pool = RewardPool(reward_fn, config.num_reward_workers, config.reward_timeout_s, config.reward_retries)
        self.toolbox = Toolbox(tools, tool_limit_s, max_result_chars)

    def close(self) -> None:
        """End the reward workers and the connections to servers."""
        self.pool.close()
        self.toolbox.close()


class _ToolUse(Environment):
    """Calls what the answers call, and rewards the one that calls nothing."""

    def __init__(self, workflow: ToolWorkflow) -> None:
        self._workflow, self._num_calls = workflow, 0

    async def reset(self, task: Task) -> list[Message]:
        self.tools = await self._workflow.toolbox.schemas()
        self._question = Question(self._workflow.pool, self._workflow.tokenizer, task)
        return self._question.messages

    async def step(self, answer: Answer) -> Observation:
        if not answer.calls:
            score = await self._question.score(answer)
            return Observation(reward=score.reward, end="done", parts=score.parts)
        most = self._workflow.limits.max_tool_calls
        made = answer.calls[: max(most - self._num_calls, 0)]
        self._num_calls += len(made)
        results = await asyncio.gather(*map(self._workflow.toolbox.call, made))
        results += [ToolResult(f"not called: {most} calls have been made", True)] * (len(answer.calls) - len(made))
        messages: list[Message] = [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result.text}
            for call, result in zip(answer.calls, results, strict=True)
        ]
        counts = {"num_tool_errors": float(sum(result.is_error for result in results))}
        return Observation(messages, statistics=counts)
