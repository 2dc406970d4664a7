"""Reward of reasoning_gym tasks: the task's own verifier, which stands beside the task source."""

from arealite.dataset.reasoning_gym_source import reasoning_gym_reward

__all__ = ["reasoning_gym_reward"]
