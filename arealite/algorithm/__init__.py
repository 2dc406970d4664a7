"""Reinforcement learning as pure functions: tensors and numbers in, tensors out. Called by engine/."""
