"""Where AReaLite keeps what it has made once: converted models, compiled kernels, environments. For all parts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """AREALITE_CACHE, else ~/.cache/arealite."""
    given = os.environ.get("AREALITE_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "arealite"
