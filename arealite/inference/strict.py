"""What `--strict-sglang` changes: the built-in server refuses what SGLang 0.5.23 refuses, and words its answers as it
does, traps included, so that a client that passes here has met them. Used by routes.py.

Facts: sglang 0.5.23, entrypoints/http_server.py, managers/tokenizer_manager.py, scheduler_components/weight_updater.py.
"""

from __future__ import annotations

from typing import Any

from arealite.inference.bodies import WrongType
from arealite.inference.requests import DEFAULT_MAX_NEW_TOKENS
from arealite.inference.responses import Answer

VERSION = "0.5.23"
NOT_SGLANGS = ("/update_weights_from_shm",)
_ABSENT_FROM_QUEUE_ABORTS = ("prompt_tokens", "cached_tokens", "num_retractions")


def error_body(path: str, status: int, message: str, error: Exception | None = None) -> dict[str, Any]:
    """A refused schema of /generate, a refused value there, and everything else have three forms."""
    if path == "/generate" and status == 400:
        return {"error": message if isinstance(error, WrongType) else {"message": message}}
    kind = str(status) if status != 400 else "BadRequest" if path.startswith("/v1/") else "Bad Request"
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


def stream_error_body(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status == 400 else "internal_server_error"
    return {"error": {"message": message, "type": kind, "code": status, "retryable": False}}


def with_default_length(body: Any) -> Any:
    """A missing max_new_tokens counts in full, and is not cut to what fits."""
    if not isinstance(body, dict):
        return body
    params = body.get("sampling_params")
    if params is None or isinstance(params, dict):
        return {**body, "sampling_params": {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **(params or {})}}
    return body


def as_sglang(entry: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """One /generate answer with its traps: a logprob without a token where none was to be generated, and little about a
    request that was aborted in the queue."""
    account = entry["meta_info"]
    if answer.finished and answer.request.return_logprob and answer.request.params.max_new_tokens == 0:
        account["output_token_logprobs"] = [[0.0, answer.request.prompt_ids[-1], None]]
        account["output_token_logprobs_length"] = 1
    if (answer.finish_reason or {}).get("message") == "Abort in waiting queue":
        for key in _ABSENT_FROM_QUEUE_ABORTS:
            del account[key]
    return entry
