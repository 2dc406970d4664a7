"""A training script with a workflow and a loss of its own. Run by test_run_own_parts.py."""

from __future__ import annotations

import sys
from dataclasses import replace

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config
from arealite.trainer import PPOTrainer
from arealite.workflow.rlvr import RLVRWorkflow


def reward(prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], **_: object) -> float:
    return float(sum(completion_ids) % 2)


class Counting(RLVRWorkflow):
    """Says how it was told to sample."""

    def __init__(self, gconfig, tokenizer):
        super().__init__(reward, gconfig, tokenizer)

    async def arun_episode(self, engine, task):
        found = await super().arun_episode(engine, task)
        return [replace(t, statistics={"num_asked": self.gconfig.n_samples, "half": 0.5 + t.member % 2}) for t in found]


def reinforce(logp, entropy, columns, config, over):
    loss = -(columns.advantages * logp).sum() / over.num_tokens
    return loss, {"surprise": -logp.detach().sum(), "ones": float(len(logp)), "advantage_max": columns.advantages.max()}


if __name__ == "__main__":
    PPOTrainer(load_config(sys.argv[1:], GRPOConfig), workflow=Counting, loss_fn=reinforce).train()
