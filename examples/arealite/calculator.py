"""Sums that are too hard for a small model, and a calculator as its tool.

arealite run examples/arealite/calculator.py --config examples/arealite/calculator.yaml
"""

import ast
import operator
import sys

from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters, GRPOConfig
from arealite.api.load_config import load_config
from arealite.reward.number import number_reward
from arealite.trainer import PPOTrainer
from arealite.workflow.tool_use import ToolWorkflow

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculator(expression: str) -> str:
    """Computes an expression such as 12 + 30."""
    return str(_value(ast.parse(expression, mode="eval").body))


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only whole numbers, +, - and * are allowed")


def workflow(gconfig: GenerationHyperparameters, tokenizer: PreTrainedTokenizerBase) -> ToolWorkflow:
    return ToolWorkflow(number_reward, [calculator], gconfig, tokenizer)


def main(argv: list[str]) -> None:
    PPOTrainer(load_config(argv, GRPOConfig), workflow=workflow).train()


if __name__ == "__main__":
    main(sys.argv[1:])
