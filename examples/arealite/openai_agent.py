"""An agent of the openai-agents SDK (pip install openai-agents), as it would be written for OpenAI's models.

arealite run examples/arealite/openai_agent.py --config examples/arealite/openai_agent.yaml
"""

import logging
import sys

from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from agents.exceptions import MaxTurnsExceeded, ModelBehaviorError
from openai import AsyncOpenAI

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config
from arealite.api.types import Task
from arealite.reward.number import number_reward
from arealite.trainer import PPOTrainer, agent_workflow
from arealite.workflow.runners import AgentCoroutine

set_tracing_disabled(True)  # it would be sent to OpenAI
logging.getLogger("openai.agents").setLevel(logging.CRITICAL)  # it tells what the policy does wrong, each time


@function_tool
def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


async def agent(task: Task, base_url: str, api_key: str) -> float:
    """What its final answer is worth. Without one in four turns, or where an answer is cut at its length or calls what
    is not there, the package raises: that is worth nothing. What is raised further would be a failure, and no zero."""
    question = task.messages[-1]["content"]
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        adder = Agent(
            name="adder",
            instructions="Answer with the number.",
            tools=[add],
            model=OpenAIResponsesModel("policy", client),
            model_settings=ModelSettings(parallel_tool_calls=True),
        )
        try:
            result = await Runner.run(adder, question, max_turns=4)
        except (MaxTurnsExceeded, ModelBehaviorError):
            return 0.0
    return number_reward(question, str(result.final_output), [], [], answer=task.answer)


def main(argv: list[str]) -> None:
    config = load_config(argv, GRPOConfig)
    PPOTrainer(config, workflow=agent_workflow(config, AgentCoroutine(agent))).train()


if __name__ == "__main__":
    main(sys.argv[1:])
