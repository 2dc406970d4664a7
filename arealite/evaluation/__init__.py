"""Accuracy on held-out tasks."""
