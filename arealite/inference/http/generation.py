"""The protocol of POST /generate (SGLang's): a body becomes requests, an answer becomes an entry.

Called by routes.py; openai/ writes bodies of its calls for `parse_generate`, whose checks then hold for both.
"""

from __future__ import annotations

import difflib
import math
import time
import uuid
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from arealite.api.errors import RequestError
from arealite.inference.core.answers import ShownAnswer
from arealite.inference.core.requests import Body, GenerateRequest, SamplingParams, ServedLimits
from arealite.inference.core.sequence import Scored
from arealite.inference.http.bodies import checked, json_object, refusal, shown

MAX_REQUESTS = 65_536  # of one body
MAX_TOP_LOGPROBS = 1024
SAMPLING_KEYS = tuple(field.name for field in fields(SamplingParams))

# What this server does not do may be asked for with a value that turns it off. Expressions can take any time to match,
# and nothing can interrupt the engine's thread, which makes everyone's tokens.
_OFF_SAMPLING = (
    "stop_regex", "custom_params", "json_schema", "regex", "ebnf", "structural_tag", "watermark", "beam_width",
)  # fmt: skip
_OFF = (
    "input_embeds", "image_data", "video_data", "audio_data", "return_hidden_states", "return_routed_experts",
    "return_sampling_mask", "return_entropy", "custom_logit_processor", "session_params",
)  # fmt: skip
# A batch may give each prompt its own: then they are lists.
_PER_PROMPT = (
    "rid", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob",
    "lora_path", "return_text_in_logprobs", "num_prompt_tokens",
)  # fmt: skip

TokenIds = Annotated[list[NonNegativeInt], Field(fail_fast=True)]


class GenerateBody(Body):
    """Of one prompt. `num_prompt_tokens` is ours: so many leading tokens are the prompt, what follows was generated
    before the request was interrupted; so is `stream_only_new`: events have just what came since the one before."""

    text: str | None = None
    input_ids: TokenIds | None = None
    rid: Annotated[str, Field(min_length=1)] | None = None
    sampling_params: dict[str, Any] = Field(default_factory=dict)
    return_logprob: bool = False
    logprob_start_len: Annotated[int, Field(ge=-1)] = -1
    top_logprobs_num: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    token_ids_logprob: TokenIds = Field(default_factory=list)
    return_text_in_logprobs: bool = False
    lora_path: str | None = None
    num_prompt_tokens: PositiveInt | None = None
    stream: bool = False
    stream_only_new: bool = False
    return_prompt_token_ids: bool = False


@dataclass(frozen=True)
class GenerateCall:
    """What one body asks for, prompt by prompt, the samples of a prompt together; `batched`: its answer is a list."""

    requests: list[GenerateRequest]
    batched: bool
    stream: bool
    return_prompt_token_ids: bool
    only_new: bool


def parse_generate(body: Any, limits: ServedLimits) -> GenerateCall:
    """One /generate body, checked in full before the engine sees it (types as strict as SGLang 0.5.22 and later).

    Raises:
        RequestError: anything missing, contradictory, of the wrong type, out of range or not supported.
    """
    together = json_object("the body", body)
    for key in _OFF:
        _refuse_unless_off(key, together.get(key))
    rows, places = _rows(together)
    name = "text" if together.get("text") is not None else "input_ids"
    requests: list[GenerateRequest] = []
    for i, row in enumerate(rows):
        one = checked(GenerateBody, row, rows=dict.fromkeys(places, f"[{i}]"))
        requests += _samples(one, f"{name}[{i}]" if places else name, limits)
    if len(requests) > MAX_REQUESTS:
        raise RequestError(f"{len(requests)} sequences in one body (prompts times n); at most {MAX_REQUESTS} are taken")
    if len({request.rid for request in requests}) != len(requests):
        raise RequestError(f"rid: expected different strings in a batch, found {shown(together['rid'])}")
    is_batch = bool(places) or len(requests) > 1
    return GenerateCall(requests, is_batch, one.stream, one.return_prompt_token_ids, one.stream_only_new)


def _rows(body: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """A body per prompt, and the keys of which each prompt of a batch has its own; none if it is no batch."""
    prompt_keys = [key for key in ("text", "input_ids") if body.get(key) is not None]
    if len(prompt_keys) != 1:
        present = " and ".join(prompt_keys) or "neither"
        raise RequestError(f"exactly one of text and input_ids is needed, found {present}")
    [name] = prompt_keys
    prompts = body[name]
    if not isinstance(prompts, list) or (name == "input_ids" and not (prompts and isinstance(prompts[0], list))):
        return [body], []
    if not prompts:
        raise RequestError(f"{name}: the list of prompts is empty")
    lists = {key: body[key] for key in _PER_PROMPT if isinstance(body.get(key), list)}
    if not any(isinstance(ids, list) for ids in lists.get("token_ids_logprob", [])):
        lists.pop("token_ids_logprob", None)  # one list for all
    for key, values in lists.items():
        if len(values) != len(prompts):
            raise RequestError(
                f"{key}: expected one value or a list of {len(prompts)} for a batch, found {len(values)} values"
            )
    lists[name] = prompts
    if isinstance(body.get("rid"), str) and body["rid"]:
        lists["rid"] = [f"{body['rid']}_{i}" for i in range(len(prompts))]
    return [{**body, **{key: lists[key][i] for key in lists}} for i in range(len(prompts))], [*lists]


def _samples(body: GenerateBody, place: str, limits: ServedLimits) -> list[GenerateRequest]:
    """The requests of one prompt: as many as it wants answers."""
    prompt = _prompt(body, place, limits)
    num_given = len(prompt) - (body.num_prompt_tokens or len(prompt))
    for name, value in (("num_prompt_tokens", len(prompt) - num_given), ("logprob_start_len", body.logprob_start_len)):
        if value > len(prompt):
            raise RequestError(f"{name}: expected at most {len(prompt)}, the prompt's length, found {value}")
    for token in body.token_ids_logprob:
        _check_token("token_ids_logprob", token, limits)
    if body.lora_path and body.lora_path not in limits.adapters:
        known = ", ".join(sorted(limits.adapters)) or "none"
        raise RequestError(f"lora_path: no adapter named {shown(body.lora_path)} is loaded (loaded: {known})")
    params = _sampling(body.sampling_params, len(prompt), num_given, limits)
    scores = body.return_logprob
    request = GenerateRequest(
        rid=body.rid or uuid.uuid4().hex,
        prompt_ids=prompt,
        params=params,
        return_logprob=scores,
        logprob_start=body.logprob_start_len if scores and 0 <= body.logprob_start_len < len(prompt) else None,
        top_logprobs_num=min(body.top_logprobs_num, limits.vocab_size) if scores else 0,
        token_ids_logprob=tuple(body.token_ids_logprob) if scores else (),
        return_text_in_logprobs=body.return_text_in_logprobs,
        lora=body.lora_path or None,
        num_given=num_given,
    )
    if params.n == 1:
        return [request]
    samples = []
    for k in range(params.n):
        seed = params.sampling_seed
        if seed is not None:  # one for all would make them equal, so each adds its number, within 64 bits
            seed = seed + k if seed + k < 2**63 else seed + k - 2**64
        rid = f"{request.rid}_{k}"
        samples.append(replace(request, rid=rid, params=replace(params, sampling_seed=seed)))
    return samples


def _prompt(body: GenerateBody, place: str, limits: ServedLimits) -> list[int]:
    if body.input_ids is not None:
        ids = body.input_ids
    elif body.text is None:
        raise RequestError(f"{place}: expected a prompt, found null")
    elif limits.encode is None:
        raise RequestError("text: the served model folder has no tokenizer; send input_ids")
    else:
        ids = limits.encode(body.text)
    if not ids:
        raise RequestError(f"{place}: the prompt is empty; at least one token is needed")
    _check_token(place, max(ids), limits)
    return ids


def _check_token(place: str, token: int, limits: ServedLimits) -> None:
    if token >= limits.vocab_size:
        raise RequestError(
            f"{place}: the model has no embedding of token {shown(token)}, only of those below {limits.vocab_size}: if"
            " it comes from the served tokenizer, the tokenizer has more tokens than the model"
        )


def _sampling(asked: dict[str, Any], num_prompt: int, num_given: int, limits: ServedLimits) -> SamplingParams:
    """One `sampling_params` object of the wire; null is all that fits for max_new_tokens, else the default."""
    for key, value in asked.items():
        if key in _OFF_SAMPLING:
            _refuse_unless_off(f"sampling_params.{key}", None if key == "beam_width" and value == 1 else value)
        elif key not in SAMPLING_KEYS:
            near = difflib.get_close_matches(key[:64], [*SAMPLING_KEYS, *_OFF_SAMPLING], n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"known keys are {', '.join(sorted(SAMPLING_KEYS))}"
            raise RequestError(f"sampling_params: unknown key {shown(key)}; {hint}")
    chosen = {key: value for key, value in asked.items() if value is not None and key not in _OFF_SAMPLING}
    if chosen.get("top_k") == 0:
        raise RequestError(f"sampling_params.top_k: expected -1 (all) or at least 1, found {shown(chosen['top_k'])}")
    try:
        params = SamplingParams(**chosen)
    except ValidationError as error:
        raise refusal(error, "sampling_params.") from error
    if params.stop and limits.encode is None:
        raise RequestError("sampling_params.stop: the served model folder has no tokenizer; use stop_token_ids")
    for token, _ in params.logit_bias:
        _check_token("sampling_params.logit_bias", token, limits)
    if params.forced_ids and not limits.may_force:
        raise RequestError("sampling_params.forced_ids: this server samples; start it with --forced-decoding")
    if params.forced_ids:
        _check_token("sampling_params.forced_ids", max(params.forced_ids), limits)
    room = limits.max_tokens - num_prompt
    num_new = chosen.get("max_new_tokens")
    least = 1 if num_new is None else num_new
    if least > room:
        raise RequestError(
            f"a prompt of {num_prompt} tokens and max_new_tokens {least} pass what is served: context length"
            f" {limits.context_length}, KV cache {limits.kv_cache_tokens} tokens; ask for at most {max(0, room)}"
        )
    if num_new is None:
        num_new = room if "max_new_tokens" in asked else min(params.max_new_tokens, room)
    if params.min_new_tokens > num_new + num_given:
        raise RequestError(
            f"sampling_params.min_new_tokens: {params.min_new_tokens} is more than max_new_tokens {num_new}"
        )
    return replace(params, max_new_tokens=num_new)


def _refuse_unless_off(name: str, value: Any) -> None:
    if value:
        raise RequestError(f"{name}: {shown(value)} is not supported by this server; leave it out or send null")


# -- answers -----------------------------------------------------------------------------------------------------------


def entry_of(answer: ShownAnswer, call: GenerateCall, only_new: bool = False) -> dict[str, Any]:
    """One entry of the /generate answer; `only_new` has just what the last `advance` added."""
    first = answer.first_new if only_new else 0
    entry: dict[str, Any] = {
        "text": answer.new_text if only_new else answer.text,
        "output_ids": answer.output_ids[first:],
        "meta_info": meta_info(answer, first),
    }
    if call.return_prompt_token_ids:
        entry["prompt_token_ids"] = answer.request.prompt_ids
    return entry


def meta_info(answer: ShownAnswer, first: int = 0) -> dict[str, Any]:
    """The protocol's account of one answer, with the logprobs of its tokens from `first` on."""
    sequence = answer.sequence
    versions = sequence.versions[: answer.num_tokens]
    account: dict[str, Any] = {
        "id": answer.request.rid,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": sequence.num_prompt,
        "completion_tokens": answer.num_tokens,
        "cached_tokens": sequence.num_cached,
        "weight_version": sequence.weight_version if answer.finished else "".join(versions[-1:]),
        "weight_versions": version_spans(versions),
        "num_retractions": sequence.num_retractions,
        "e2e_latency": (sequence.finished_at if answer.finished else time.perf_counter()) - sequence.submitted_at,
    }
    if sequence.cut_mass:  # ours
        account["cut_mass"] = sequence.cut_mass
    if answer.request.return_logprob:
        account |= _logprobs(answer, first)
        account["output_token_logprobs_length"] = answer.num_tokens
    return account


def version_spans(versions: list[str]) -> list[dict[str, Any]]:
    """Runs of equal versions: {"version", "start", "end"} in generated-token positions."""
    spans = []
    end = 0
    for version, run in groupby(versions):
        start, end = end, end + len(list(run))
        spans.append({"version": version, "start": start, "end": end})
    return spans


def json_number(value: float | None) -> float | None:
    """JSON has no NaN: a prompt scored by broken weights reads null, and its request ends as aborted."""
    return value if value is not None and math.isfinite(value) else None


def _logprobs(answer: ShownAnswer, first: int) -> dict[str, list[Any]]:
    """The lists of logprobs: of the prompt, and of the answer's tokens from `first` on."""
    sequence, request, new = answer.sequence, answer.request, slice(first, answer.num_tokens)

    def entry(logprob: float | None, token: int) -> list[Any]:
        return [json_number(logprob), token, answer.token_text(token) if request.return_text_in_logprobs else None]

    def entries(positions: list[Scored | None]) -> list[list[list[Any]] | None]:
        return [None if scored is None else [entry(*pair) for pair in scored] for scored in positions]

    start = request.logprob_start
    scored = [] if start is None else zip(sequence.input_logprobs, request.prompt_ids[start:], strict=False)
    lists: dict[str, list[Any]] = {
        "input_token_logprobs": [entry(*pair) for pair in scored],
        "output_token_logprobs": [
            entry(*pair) for pair in zip(sequence.logprobs[new], sequence.output_ids[new], strict=True)
        ],
    }
    if request.top_logprobs_num:
        lists["input_top_logprobs"] = entries(sequence.input_top_logprobs)
        lists["output_top_logprobs"] = entries(sequence.top_logprobs[new])
    if request.token_ids_logprob:
        lists["input_token_ids_logprobs"] = entries(sequence.input_token_ids_logprobs)
        lists["output_token_ids_logprobs"] = entries(sequence.token_ids_logprobs[new])
    return lists
