"""Reward models from pairs of answers."""
