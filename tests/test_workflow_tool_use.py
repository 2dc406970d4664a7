"""ToolWorkflow: functions and MCP servers as tools, and everything that a model or a tool can do wrong."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from support.episodes import ScriptedEngine, episode, listening, sampling
from support.rewards import length_reward
from transformers import AutoTokenizer

from arealite.api.errors import ConfigError
from arealite.gateway.asks import CallOfTool
from arealite.gateway.session import SessionLimits
from arealite.workflow.tool_use import FunctionTool, Toolbox, ToolUnreachable, ToolWorkflow


def add(a: int, b: int = 1) -> int:
    """The sum of two numbers."""
    return a + b


def say(text: str) -> str:
    """Says what it is told."""
    return text


def fail(text: str) -> str:
    """Fails."""
    raise ValueError(text)


def hang() -> None:
    """Never ends."""
    time.sleep(600)


async def wait(seconds: float) -> str:
    """Waits."""
    await asyncio.sleep(seconds)
    return "waited"


def undescribed(a: int) -> int:
    return a


def untyped(a: "Nothing") -> int:  # noqa: F821
    """Takes what there is not."""
    return 0


MCP_PROGRAM = """
import os, sys
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("sums")

@server.tool()
def double(number: int) -> int:
    "Twice the number."
    if number < 0:
        raise ToolError("no negative numbers")
    if number == 666:
        os._exit(3)
    return 2 * number

@server.tool()
def process() -> int:
    "Its process."
    return os.getpid()

if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
"""


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def toolbox():
    """toolbox(*tools, **options), closed at the end"""
    made = []

    def make(*tools, limit_s=10.0, max_chars=1000):
        made.append(Toolbox(tools, limit_s, max_chars))
        return made[-1]

    yield make
    for box in made:
        box.close()


def call(box, tool, /, **arguments):
    async def once():
        await box.schemas()
        return await box.call(CallOfTool("call_0", tool, json.dumps(arguments)))

    return asyncio.run(once())


def written(tool, **arguments):
    """A call as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


def test_a_function_is_described_by_its_signature_and_docstring():
    assert FunctionTool(add).schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "The sum of two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    }


@pytest.mark.parametrize("function", [undescribed, untyped])
def test_a_function_that_cannot_be_described_is_refused(function):
    with pytest.raises(ConfigError, match=function.__name__):
        FunctionTool(function)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("add", {"a": "two"}, ["add", "a: Input should be a valid integer", '"a"', '"b"']),
        ("add", {"b": 2}, ["Missing required argument"]),
        ("add", {"a": 1, "c": 2}, ["c: Unexpected keyword argument"]),
        ("fail", {"text": "no luck"}, ["fail failed: ValueError: no luck"]),
        ("hang", {}, ["hang gave no result within 0.2 s"]),
        ("wait", {"seconds": 60}, ["wait gave no result within 0.2 s"]),
        ("multiply", {}, ["there is no tool multiply; there are add"]),
    ],
)
def test_what_goes_wrong_is_told_to_the_model(toolbox, name, arguments, words):
    result = call(toolbox(add, fail, hang, wait, limit_s=0.2), name, **arguments)
    assert result.is_error and all(word in result.text for word in words), result.text


def test_results_are_text_and_have_a_limit(toolbox):
    box = toolbox(add, say, wait, max_chars=100)
    assert call(box, "add", a="2", b=3).text == "5"  # a number in quotes is a number
    assert call(box, "wait", seconds=0).text == "waited"
    long = call(box, "say", text="x" * 5000)
    assert long.text.startswith("x" * 100 + "\n") and "5000" in long.text and not long.is_error


def test_threads_that_hang_are_bounded(toolbox, monkeypatch):
    monkeypatch.setattr("arealite.workflow.tool_use.MAX_LATE", 2)
    box = toolbox(hang, add, limit_s=0.05)
    told = [call(box, "hang").text for _ in range(3)]
    assert ["within" in text for text in told] == [True, True, False] and "2 earlier calls" in told[2]


def test_calls_of_one_answer_run_in_parallel_and_are_answered_in_order(tokenizer):
    together = threading.Barrier(2)

    def meet(name: str) -> str:
        """Waits for the other call."""
        together.wait(10)
        return f"met {name}"

    workflow = ToolWorkflow(length_reward, [meet], sampling(1), tokenizer)
    both = written("meet", name="one") + written("meet", name="two")
    engine = ScriptedEngine(tokenizer, [both, "done"])
    (t,) = episode(workflow, engine, answer="5")
    workflow.close()
    assert t.status == "ok" and t.reward == len("done")
    assert t.statistics["num_tool_calls"] == 2 and t.statistics["num_tool_errors"] == 0
    last = engine.prompts[0][-1]
    assert 0 < last.index("met one") < last.index("met two")


def test_errors_of_tools_are_counted_and_the_model_goes_on(tokenizer):
    workflow = ToolWorkflow(length_reward, [fail, add], sampling(2), tokenizer)
    bad, good = [written("fail", text="no"), written("add", a="x"), "oh"], [written("add", a=1), "fine"]
    found = episode(workflow, ScriptedEngine(tokenizer, bad, good), answer="5")
    workflow.close()
    assert [(t.status, t.reward) for t in found] == [("ok", 2.0), ("ok", 4.0)]
    assert [t.statistics["num_tool_errors"] for t in found] == [2, 0]
    assert [t.statistics["num_turns"] for t in found] == [3, 2]


def test_calls_have_a_limit_in_one_answer_and_in_all(tokenizer):
    limits = SessionLimits(max_tool_calls=3)
    workflow = ToolWorkflow(length_reward, [add], sampling(2), tokenizer, limits=limits)
    many = written("add", a=1) * 5
    found = episode(workflow, engine := ScriptedEngine(tokenizer, [many, "x"], [written("add", a=1), "ok"]), answer="5")
    workflow.close()
    assert [t.reward for t in found] == [0.0, 2.0] and found[0].statistics["stop_tool_calls"] == 1
    assert found[0].statistics["num_tool_errors"] == 2 and len(engine.prompts[0]) == 1


def test_two_tools_of_one_name_are_refused(toolbox):
    with pytest.raises(ConfigError, match="add"):
        asyncio.run(toolbox(add, add).schemas())


@pytest.fixture
def mcp_program(tmp_path):
    pytest.importorskip("mcp")
    path = tmp_path / "sums.py"
    path.write_text(MCP_PROGRAM)
    return f"{sys.executable} {path}"


def test_an_mcp_server_that_is_started(toolbox, mcp_program):
    box = toolbox(mcp_program, add)
    names = [schema["function"]["name"] for schema in asyncio.run(box.schemas())]
    assert names == ["add", "double", "process"]
    assert call(box, "double", number=21).text == "42"
    refused = call(box, "double", number=-1)
    assert refused.is_error and "no negative numbers" in refused.text
    pid = int(call(box, "process").text)
    box.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_mcp_server_that_dies_fails_the_call_and_is_started_again(toolbox, mcp_program):
    box = toolbox(mcp_program)
    first = call(box, "process").text
    with pytest.raises(ToolUnreachable, match="sums.py"):
        call(box, "double", number=666)
    second = call(box, "process").text
    assert first != second


def test_an_mcp_server_that_does_not_start_is_refused(toolbox):
    pytest.importorskip("mcp")
    with pytest.raises(ConfigError, match="nowhere-at-all"):
        asyncio.run(toolbox("nowhere-at-all --port 3").schemas())


def test_an_mcp_server_behind_a_url(toolbox, mcp_program, free_port):
    command = [*mcp_program.split(), str(free_port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            listening(free_port)
            box = toolbox(f"http://127.0.0.1:{free_port}/mcp")
            assert call(box, "double", number=4).text == "8"
            box.close()
        finally:
            server.kill()
