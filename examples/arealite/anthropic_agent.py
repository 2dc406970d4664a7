"""An agent of the anthropic SDK (pip install anthropic), as it would be written for Anthropic's models.

arealite run examples/arealite/anthropic_agent.py --config examples/arealite/anthropic_agent.yaml
"""

import sys

from anthropic import AsyncAnthropic

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config
from arealite.api.types import Task
from arealite.reward.number import number_reward
from arealite.trainer import PPOTrainer, agent_workflow
from arealite.workflow.runners import AgentCoroutine

NUMBER = {"type": "integer"}
ADD = {
    "name": "add",
    "description": "The sum of two numbers.",
    "input_schema": {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]},
}


def add(given: object) -> str:
    """What the tool says; a model may call it with anything."""
    try:
        return str(int(given["a"]) + int(given["b"]))
    except (KeyError, TypeError, ValueError) as error:
        return f"error: {error}"


async def agent(task: Task, base_url: str, api_key: str) -> float:
    """What its last words are worth, after four turns at most."""
    question = task.messages[-1]["content"]
    messages = [{"role": "user", "content": question}]
    text = ""
    async with AsyncAnthropic(base_url=base_url.removesuffix("/v1"), api_key=api_key) as client:
        for _ in range(4):
            reply = await client.messages.create(
                model="policy", max_tokens=64, system="Answer with the number.", tools=[ADD], messages=messages
            )
            text = "".join(block.text for block in reply.content if block.type == "text")
            calls = [block for block in reply.content if block.type == "tool_use"]
            if not calls:
                break
            results = [{"type": "tool_result", "tool_use_id": call.id, "content": add(call.input)} for call in calls]
            messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": results}]
    return number_reward(question, text, [], [], answer=task.answer)


def main(argv: list[str]) -> None:
    config = load_config(argv, GRPOConfig)
    PPOTrainer(config, workflow=agent_workflow(config, AgentCoroutine(agent))).train()


if __name__ == "__main__":
    main(sys.argv[1:])
