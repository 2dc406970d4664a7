"""Why answers were not scored and groups not trained: each kind of reason is told once, at once, and all are counted.

Noted where it happens (reward workers, rollout head, evaluation) in the process of rank 0; stats_logger.py drains the
counts into each step's line and metrics. Any thread may call.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable

MAX_SHOWN = 300  # characters of a reason
MAX_KINDS = 8  # kinds per event that are told and counted by name; the others are one more kind

logger = logging.getLogger(__name__)


def last_line(text: str) -> str:
    """The line of a traceback that names the error; of a text of one line, itself."""
    return " ".join((text.strip() or "no reason given").splitlines()[-1].split())[:MAX_SHOWN]


def _kind(text: str) -> str:
    """Texts that differ only in their numbers are of one kind."""
    return re.sub(r"\d+", "#", text)


def by_kind(texts: Iterable[str]) -> dict[str, int]:
    """How many of each kind, the most frequent first, under the first text of the kind."""
    example: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for text in texts:
        is_named = _kind(text) in example or len(example) < MAX_KINDS
        counts[example.setdefault(_kind(text), text) if is_named else "other reasons"] += 1
    return dict(counts.most_common())


class Reasons:
    """The reasons noted since the last drain, by event ("failed", "reward errors"), and which kinds were told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: defaultdict[str, set[str]] = defaultdict(set)
        self._noted: defaultdict[str, list[str]] = defaultdict(list)

    def tell(self, event: str, text: str) -> None:
        """Warn of the first reason of its kind."""
        with self._lock:
            told = self._told[event]
            is_new = _kind(text) not in told and len(told) < MAX_KINDS
            if is_new:
                told.add(_kind(text))
        if is_new:
            logger.warning("%s: %s (told once, then counted)", event, text)

    def count(self, event: str, text: str) -> None:
        """Tell it, and count it for the step that comes next."""
        self.tell(event, text)
        with self._lock:
            self._noted[event].append(text)

    def drain(self) -> dict[str, dict[str, int]]:
        """{event: {reason: how many}} since the last call."""
        with self._lock:
            noted, self._noted = self._noted, defaultdict(list)
        return {event: by_kind(texts) for event, texts in sorted(noted.items())}


reasons = Reasons()
