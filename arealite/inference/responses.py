"""What /generate answers for a request that has ended, and how its text is made. Called by routes.py and batcher.py."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

from arealite.inference.sequence import Sequence

BYTES_PER_CHARACTER = 4  # UTF-8 at most; a token is at least one byte


def find_stop_string(tokenizer: Any, sequence: Sequence) -> str | None:
    """The stop string that the newest token completes, the earliest in the text if there are several.

    Only the end of the answer is decoded; a hit counts when the whole answer's text has it too.
    """
    stop = sequence.request.params.stop
    window = (max(map(len, stop), default=0) + 1) * BYTES_PER_CHARACTER
    if not stop or not any(s in _decode(tokenizer, sequence, sequence.output_ids[-window:]) for s in stop):
        return None
    text = _decode(tokenizer, sequence, sequence.output_ids)
    return min((s for s in stop if s in text), key=text.find, default=None)


def _decode(tokenizer: Any, sequence: Sequence, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=sequence.request.params.skip_special_tokens))


def answer_text(tokenizer: Any, sequence: Sequence) -> str:
    """The decoded answer without what stopped it (unless no_stop_trim); "" without a tokenizer."""
    if tokenizer is None:
        return ""
    matched = None if sequence.request.params.no_stop_trim else (sequence.finish_reason or {}).get("matched")
    if isinstance(matched, int):
        return _decode(tokenizer, sequence, sequence.output_ids[:-1])
    text = _decode(tokenizer, sequence, sequence.output_ids)
    return text if matched is None else text[: text.find(matched)]


def version_spans(versions: list[str]) -> list[dict[str, Any]]:
    """Runs of equal versions: {"version", "start", "end"} in generated-token positions."""
    spans = []
    end = 0
    for version, run in groupby(versions):
        start, end = end, end + len(list(run))
        spans.append({"version": version, "start": start, "end": end})
    return spans


def _json_number(value: float | None) -> float | None:
    """JSON has no NaN: a prompt scored by broken weights reads null, and its request ends as aborted."""
    return value if value is not None and math.isfinite(value) else None


def render(tokenizer: Any, sequence: Sequence) -> dict[str, Any]:
    """One entry of the /generate answer."""
    request = sequence.request
    finished: dict[str, Any] = {
        "id": request.rid,
        "finish_reason": sequence.finish_reason,
        "prompt_tokens": sequence.num_prompt,
        "completion_tokens": sequence.num_output,
        "cached_tokens": sequence.num_cached,
        "weight_version": sequence.weight_version,
        "weight_versions": version_spans(sequence.versions),
        "num_retractions": sequence.num_retractions,
        "e2e_latency": sequence.finished_at - sequence.submitted_at,
    }
    if request.return_logprob:
        first = request.logprob_start
        scored = [] if first is None else zip(sequence.input_logprobs, request.prompt_ids[first:], strict=False)
        finished["input_token_logprobs"] = [[_json_number(logprob), token, None] for logprob, token in scored]
        finished["output_token_logprobs"] = [
            [logprob, token, None] for logprob, token in zip(sequence.logprobs, sequence.output_ids, strict=True)
        ]
        finished["output_token_logprobs_length"] = sequence.num_output
    return {"text": answer_text(tokenizer, sequence), "output_ids": sequence.output_ids, "meta_info": finished}
