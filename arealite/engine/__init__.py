"""The trainer: packed batches in, new weights out, on one process or many ranks."""
