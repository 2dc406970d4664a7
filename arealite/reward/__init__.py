"""Reward functions, and the worker processes that run them. Used by workflow/ and scripts."""
