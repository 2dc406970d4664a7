"""A stop that is asked for by Ctrl-C or SIGTERM: noted at once, heeded where nothing is lost by it.

`noted` surrounds a run's steps (engine/recover.py); the end of a step and the wait for groups `look`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from arealite.api.errors import RunStopped

_noted: list[int] = []  # the signal, once it came


@contextmanager
def noted() -> Iterator[None]:
    """While the block runs, the first SIGINT or SIGTERM is noted; from then on they act as before. Signals reach the
    main thread alone, so that in others nothing changes."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    earlier = {n: action for n in numbers if (action := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, action in earlier.items():
            signal.signal(number, action)

    def note(number: int, _: FrameType | None) -> None:
        _noted.append(number)
        restore()

    for number in earlier:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()
        _noted.clear()


def look() -> None:
    """Raise RunStopped if a stop was asked for."""
    if _noted:
        raise RunStopped(f"stopped by {signal.Signals(_noted[0]).name}")


def exit_code() -> int:
    """128 + the signal that was noted, as shells have it; SIGTERM's where it reached another rank only."""
    return 128 + (_noted or [signal.SIGTERM])[0]
