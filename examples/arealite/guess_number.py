"""A game of several turns: the model guesses a number, and is told where it still may be.

    arealite run examples/arealite/guess_number.py --config examples/arealite/guess_number.yaml

An environment of your own: docs/environments.md. Turns are lines of raw text, which a small model continues.
"""

import math
import re
import sys

from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters, GRPOConfig
from arealite.api.load_config import load_config
from arealite.api.types import Task
from arealite.gateway.asks import Answer
from arealite.trainer import PPOTrainer
from arealite.workflow.environment import Environment, EnvironmentWorkflow, Observation

MAX_GUESSES = 5


class GuessTheNumber(Environment):
    """From 1 to 15. Found at the first guess it is worth 1, and a tenth less for each guess more; not found, up to half
    as much as it would have been, by how few numbers are left (a share of the bits that would tell it)."""

    def reset(self, task: Task) -> str:
        self.secret, self.low, self.high, self.num_guesses = int(task.answer), 1, 15, 0
        return task.prompt

    def step(self, answer: Answer) -> Observation:
        self.num_guesses += 1
        guess = int((re.findall(r"\d+", answer.text) or ["0"])[0])
        if guess == self.secret:
            return Observation(reward=1 - (self.num_guesses - 1) / 10, end="done", statistics={"found": 1})
        if self.low <= guess < self.secret:
            self.low = guess + 1
        elif self.secret < guess <= self.high:
            self.high = guess - 1
        if self.num_guesses == MAX_GUESSES:
            told = 1 - math.log(self.high - self.low + 1) / math.log(15)
            return Observation(reward=told / 2, end="done", statistics={"found": 0})
        line_end = "" if answer.reason == "stop_string" else "\n"
        return Observation(f"{line_end}{self.low} to {self.high}:")


def workflow(gconfig: GenerationHyperparameters, tokenizer: PreTrainedTokenizerBase) -> EnvironmentWorkflow:
    return EnvironmentWorkflow(GuessTheNumber, gconfig, tokenizer)


def main(argv: list[str]) -> None:
    PPOTrainer(load_config(argv, GRPOConfig), workflow=workflow).train()


if __name__ == "__main__":
    main(sys.argv[1:])
