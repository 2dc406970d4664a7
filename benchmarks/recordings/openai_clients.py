"""Two small agents around the stream helpers of the openai package. Started by benchmarks/harnesses.py."""

from __future__ import annotations

import json
from typing import Any

from openai import AsyncOpenAI

from arealite.reward.number import number_reward

NUMBER = {"type": "integer"}
PARAMETERS = {
    "type": "object",
    "properties": {"a": NUMBER, "b": NUMBER},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ADD: dict[str, Any] = {
    "name": "add",
    "description": "The sum of two numbers.",
    "strict": True,
    "parameters": PARAMETERS,
}


def add(arguments: str) -> str:
    """What the tool says; a model may call it with anything."""
    try:
        given = json.loads(arguments)
        return str(int(given["a"]) + int(given["b"]))
    except (KeyError, ValueError) as error:
        return f"error: {error!r}"


async def streamed_chat(task: Any, base_url: str, api_key: str) -> float:
    """An agent around the stream helper of the openai package, chat completions."""
    question, text = task.messages[-1]["content"], ""
    messages: list[Any] = [{"role": "user", "content": question}]
    tools: Any = [{"type": "function", "function": ADD}]
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        for _ in range(4):
            async with client.chat.completions.stream(model="policy", messages=messages, tools=tools) as stream:
                message = (await stream.get_final_completion()).choices[0].message
            text, calls = message.content or "", message.tool_calls or []
            if not calls:
                break
            told = [{"id": c.id, "type": "function", "function": c.function.to_dict()} for c in calls]
            messages.append({"role": "assistant", "content": message.content, "tool_calls": told})
            messages += [{"role": "tool", "tool_call_id": c.id, "content": add(c.function.arguments)} for c in calls]
    return number_reward(question, text, [], [], answer=task.answer)


async def streamed_responses(task: Any, base_url: str, api_key: str) -> float:
    """An agent around the stream helper of the openai package, Responses, each by the id of the last."""
    question, text = task.messages[-1]["content"], ""
    given: Any = question
    before: dict[str, str] = {}
    tools: Any = [{"type": "function", **ADD}]
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        for _ in range(4):
            async with client.responses.stream(model="policy", input=given, tools=tools, **before) as stream:
                response = await stream.get_final_response()
            text, calls = response.output_text, [part for part in response.output if part.type == "function_call"]
            if not calls:
                break
            before = {"previous_response_id": response.id}
            outputs = [(call.call_id, add(call.arguments)) for call in calls]
            given = [{"type": "function_call_output", "call_id": id, "output": output} for id, output in outputs]
    return number_reward(question, text, [], [], answer=task.answer)
