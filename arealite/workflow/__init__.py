"""Workflows: how one task becomes a group of trajectories. Used by scripts and evaluation/."""
