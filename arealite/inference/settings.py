"""What the routes need besides the engine. Made by serve.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SERVER_VERSION = "arealite-native-0.1"


@dataclass(frozen=True)
class ServerSettings:
    """`flags` are the command line's, for /server_info."""

    served_model_name: str
    flags: dict[str, Any]
    hold_limit_s: float = 600.0  # longest time a new request is held while paused
    request_limit_s: float = 3600.0  # longest time a request may take, and a stream may be silent
    incremental_streaming: bool = False  # /generate streams what is new, not all so far
    tool_call_parser: str = "auto"
    model_defaults: bool = True  # OpenAI calls take sampling defaults from generation_config.json
