"""Accuracy on held-out tasks: the estimators (metrics.py) and the loop that asks the model (evaluator.py)."""
