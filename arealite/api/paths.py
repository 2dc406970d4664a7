"""How a path is meant that somebody has written, and where AReaLite keeps what it has made once: converted models,
compiled kernels, environments. For all parts.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from arealite.api.errors import ConfigError

# Of files, by which a path is told from a hub id.
FILE_SUFFIXES = (".jsonl", ".parquet", ".json", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".gguf", ".safetensors")


def expand(path: str) -> str:
    """The path with ~ and environment variables ($NAME) filled in, as a shell would; a relative one stays relative to
    the folder in which the command runs. Raises ConfigError for a variable or a user that does not exist."""
    if "://" in path:
        raise ConfigError(
            f"{path!r} is an address, expected a file or folder of this machine (or a hub id): copy it here"
        )
    if absent := [name for name in re.findall(r"\$([A-Za-z_]\w*)", path) if name not in os.environ]:
        raise ConfigError(f"{path!r} names the environment variable {absent[0]}, which is not set")
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~"):
        raise ConfigError(f"{path!r} names the home of a user who is not known here")
    return expanded


def is_local(path: str) -> bool:
    """Whether a model or a data set is meant to be on this machine: it is there, or is written as no hub id can be."""
    written = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in FILE_SUFFIXES
    return written or Path(path).exists()


def cache_root() -> Path:
    """AREALITE_CACHE, else ~/.cache/arealite."""
    given = os.environ.get("AREALITE_CACHE")
    return Path(expand(given)) if given else Path.home() / ".cache" / "arealite"
