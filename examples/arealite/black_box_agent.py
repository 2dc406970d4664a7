"""An agent that is a command line, here a shell script with curl, in a lock-up; judged by what it leaves in its folder.

arealite run examples/arealite/black_box_agent.py --config examples/arealite/black_box_agent.yaml
"""

import sys
from pathlib import Path

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config
from arealite.reward.number import number_reward
from arealite.trainer import PPOTrainer, agent_workflow
from arealite.workflow.runners import AgentCommand

PROGRAM = Path(__file__).parent / "black_box"


def reward(prompt, completion, prompt_ids, completion_ids, *, answer, workspace, trace, **columns):
    """What is in the file is worth; what the model said in between is not."""
    written = Path(workspace, "answer.txt").read_text(errors="replace")
    return number_reward(prompt, written, prompt_ids, completion_ids, answer=answer)


def main(argv: list[str]) -> None:
    config = load_config(argv, GRPOConfig)
    runner = AgentCommand(["sh", "agent.sh", "{prompt}"], files=PROGRAM, is_locked_up=True)
    PPOTrainer(config, workflow=agent_workflow(config, runner, reward)).train()


if __name__ == "__main__":
    main(sys.argv[1:])
