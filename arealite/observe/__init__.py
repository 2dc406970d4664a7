"""Seeing a run: its folder, the numbers of each step, named waits, the report at the end. Used by all other folders."""
