"""Stdout and stderr of a process of a run, which are its log: one that cannot be written ends no run. Called by
waits.py, in every process that the launcher has started.
"""

from __future__ import annotations

import io
import sys
from typing import Any


class LogOutput(io.FileIO):
    """A file descriptor whose disk may be full: what that does not take is lost, counted, and told in the log as soon
    as there is room again."""

    num_lost = 0  # bytes

    def write(self, content: Any) -> int:
        num_bytes = len(content)
        try:
            if self.num_lost:
                super().write(f"\narealite: {self.num_lost} bytes are missing here: the log's disk was full\n".encode())
                self.num_lost = 0
            self.num_lost = num_bytes - super().write(content)
        except OSError:
            self.num_lost += num_bytes
        return num_bytes


def outlive_full_disks() -> None:
    """From now on `print` does not raise for want of room."""
    for name in ("stdout", "stderr"):
        log = LogOutput(getattr(sys, name).fileno(), "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(log, "utf-8", "backslashreplace", write_through=True))
