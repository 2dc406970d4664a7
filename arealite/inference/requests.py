"""The body of POST /generate, checked in full before the engine sees it (types as strict as SGLang 0.5.22 and later).

Called by routes.py. Whatever is wrong is a RequestError, which the route answers with status 400.
"""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from arealite.api.errors import RequestError
from arealite.inference.bodies import WrongType, field, integer, number, of_type, shown, strings

GREEDY_BELOW = 1e-6  # a temperature under this is greedy, and its logprobs are those of temperature 1
DEFAULT_MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled, after validation. `temperature` 0 is greedy, `top_k` 0 is all."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    sampling_seed: int | None = None
    skip_special_tokens: bool = True
    no_stop_trim: bool = False


@dataclass(frozen=True)
class GenerateRequest:
    """One sequence to sample. `logprob_start` is the first prompt position whose logprob is wanted, None for none."""

    rid: str
    prompt_ids: list[int]
    params: SamplingParams
    return_logprob: bool = False
    logprob_start: int | None = None


@dataclass(frozen=True)
class ServedLimits:
    """What a request is checked against. `encode` is None without a tokenizer, which also rules out stop strings."""

    vocab_size: int
    context_length: int
    kv_cache_tokens: int
    encode: Callable[[str], list[int]] | None

    @property
    def max_tokens(self) -> int:
        """Prompt and answer together, in tokens."""
        return min(self.context_length, self.kv_cache_tokens)


def _stop_strings(name: str, value: Any) -> tuple[str, ...]:
    return tuple(s for s in ([value] if isinstance(value, str) else strings(name, value)) if s)


def _token_set(name: str, value: Any) -> frozenset[int]:
    return frozenset(integer(name, token, 0) for token in of_type(name, value, list))


def _top_k(name: str, value: Any) -> int:
    """0 for "all", which the wire writes as -1 or as a number beyond any vocabulary."""
    if value == 0:
        raise RequestError(f"{name}: expected -1 (all tokens) or at least 1, found {shown(value)}")
    return max(0, integer(name, value, -1))


_boolean = partial(of_type, kind=bool)

_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": partial(integer, low=0),
    "min_new_tokens": partial(integer, low=0),
    "temperature": partial(number, low=0.0),
    "top_p": partial(number, low=0.0, high=1.0, open_low=True),
    "top_k": _top_k,
    "min_p": partial(number, low=0.0, high=1.0),
    "stop": _stop_strings,
    "stop_token_ids": _token_set,
    "ignore_eos": _boolean,
    "sampling_seed": partial(integer, low=-(2**63), high=2**63 - 1),
    "skip_special_tokens": _boolean,
    "no_stop_trim": _boolean,
}

# Keys of the protocol that change nothing here.
_IGNORED = ("spaces_between_special_tokens", "stream_interval")

# Keys that this server does not do yet: 1 asks for nothing in the first, empty, 0 and false in the others.
_OFF_AT_ONE = ("n", "repetition_penalty", "beam_width")
_OFF_WHEN_EMPTY = [
    "frequency_penalty", "presence_penalty", "logit_bias", "stop_regex", "custom_params", "json_schema", "regex",
    "ebnf", "structural_tag", "watermark",
]  # fmt: skip
_TOP_OFF_WHEN_EMPTY = [
    "stream", "input_embeds", "image_data", "video_data", "audio_data", "top_logprobs_num", "token_ids_logprob",
    "return_text_in_logprobs", "return_hidden_states", "return_routed_experts", "return_sampling_mask",
    "return_entropy", "return_prompt_token_ids", "lora_path", "custom_logit_processor", "session_params",
]  # fmt: skip


def _refuse_unless_off(name: str, value: Any, is_off: bool) -> None:
    if value is not None and not is_off:
        raise RequestError(f"{name}: {shown(value)} is not supported by this server; leave it out or send null")


def parse_sampling_params(value: Any, num_prompt_tokens: int, limits: ServedLimits) -> SamplingParams:
    """One `sampling_params` object of the wire (null for all defaults)."""
    fields = {} if value is None else of_type("sampling_params", value, dict)
    parsed: dict[str, Any] = {}
    for key, entry in fields.items():
        name = f"sampling_params.{key}"
        if key in _OFF_AT_ONE:
            _refuse_unless_off(name, entry, entry == 1 and entry is not True)
        elif key in _OFF_WHEN_EMPTY:
            _refuse_unless_off(name, entry, not entry)
        elif key in _PARSERS:
            if entry is not None:
                parsed[key] = _PARSERS[key](name, entry)
        elif key not in _IGNORED:
            near = difflib.get_close_matches(key[:64], [*_PARSERS, *_OFF_AT_ONE, *_OFF_WHEN_EMPTY], n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"known keys are {', '.join(sorted(_PARSERS))}"
            raise WrongType(f"sampling_params: unknown key {shown(key)}; {hint}")
    if parsed.get("temperature", 1.0) < GREEDY_BELOW:
        parsed["temperature"] = 0.0
    if parsed.get("stop") and limits.encode is None:
        raise RequestError("sampling_params.stop: the served model folder has no tokenizer; use stop_token_ids")
    parsed["max_new_tokens"] = _max_new_tokens(fields, parsed.get("max_new_tokens"), num_prompt_tokens, limits)
    params = SamplingParams(**parsed)
    if params.min_new_tokens > params.max_new_tokens:
        raise RequestError(
            f"sampling_params.min_new_tokens: {params.min_new_tokens} is more than max_new_tokens"
            f" {params.max_new_tokens}"
        )
    return params


def _max_new_tokens(fields: dict[str, Any], asked: int | None, num_prompt: int, limits: ServedLimits) -> int:
    """The asked number where it fits (0 only scores the prompt); null is all that fits, a missing key the protocol's
    default at most."""
    room = limits.max_tokens - num_prompt
    least = 1 if asked is None else asked
    if least > room:
        raise RequestError(
            f"a prompt of {num_prompt} tokens and max_new_tokens {least} pass what is served: context length"
            f" {limits.context_length}, KV cache {limits.kv_cache_tokens} tokens; ask for at most {max(0, room)}"
        )
    if asked is not None:
        return asked
    return room if "max_new_tokens" in fields else min(DEFAULT_MAX_NEW_TOKENS, room)


def parse_generate(body: Any, limits: ServedLimits) -> tuple[list[GenerateRequest], bool]:
    """The requests of one /generate body, and whether the answer is a list (batch).

    Raises:
        RequestError: anything missing, contradictory, of the wrong type, out of range or not supported.
    """
    body = of_type("the body", body, dict)
    for key in _TOP_OFF_WHEN_EMPTY:
        _refuse_unless_off(key, body.get(key), not body.get(key))
    prompts, batched = _prompts(body, limits)
    rids = _rids(body.get("rid"), len(prompts), batched)
    requests = []
    for i, (rid, prompt) in enumerate(zip(rids, prompts, strict=True)):
        own = {
            key: _own(key, body.get(key), i, len(prompts), batched)
            for key in ("sampling_params", "return_logprob", "logprob_start_len")
        }
        params = parse_sampling_params(own["sampling_params"], len(prompt), limits)
        scored = field(own, "return_logprob", bool, False)
        first = integer("logprob_start_len", field(own, "logprob_start_len", int, -1), -1, len(prompt))
        start = first if scored and 0 <= first < len(prompt) else None
        requests.append(GenerateRequest(rid, prompt, params, scored, start))
    return requests, batched


def _own(name: str, value: Any, i: int, num: int, batched: bool) -> Any:
    """Request i's own value: of a list in a batch, else the one of all."""
    if not isinstance(value, list):
        return value
    if not batched or len(value) != num:
        raise RequestError(f"{name}: expected one value or a list of {num} for a batch, found {len(value)} values")
    return value[i]


def _prompts(body: dict[str, Any], limits: ServedLimits) -> tuple[list[list[int]], bool]:
    given = [key for key in ("text", "input_ids") if body.get(key) is not None]
    if len(given) != 1:
        raise RequestError(f"exactly one of text and input_ids is needed, found {' and '.join(given) or 'neither'}")
    [name] = given
    value = body[name]
    if name == "text":
        batched = isinstance(value, list)
        prompts = [_encoded(text, limits) for text in (value if batched else [value])]
    else:
        batched = bool(value) and isinstance(of_type(name, value, list)[0], list)
        prompts = value if batched else [value]
    for i, prompt in enumerate(prompts):
        _check_prompt(f"{name}[{i}]" if batched else name, prompt, limits)
    if not prompts:
        raise RequestError(f"{name}: the list of prompts is empty")
    return prompts, batched


def _encoded(text: Any, limits: ServedLimits) -> list[int]:
    if limits.encode is None:
        raise RequestError("text: the served model folder has no tokenizer; send input_ids")
    try:
        of_type("text", text, str).encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"text: half of a surrogate pair is no character: {error}") from error
    return limits.encode(text)


def _check_prompt(name: str, prompt: Any, limits: ServedLimits) -> None:
    if not of_type(name, prompt, list):
        raise RequestError(f"{name}: the prompt is empty; at least one token is needed")
    for token in prompt:
        integer(name, token, 0, limits.vocab_size - 1)


def _rids(value: Any, num: int, batched: bool) -> list[str]:
    if value is None:
        return [uuid.uuid4().hex for _ in range(num)]
    if isinstance(value, str) and value:
        return [f"{value}_{i}" for i in range(num)] if batched else [value]
    rids = strings("rid", value) if batched else []
    if not all(rids) or len(set(rids)) != num or len(rids) != num:
        raise RequestError(f"rid: expected a string, or for a batch {num} different strings, found {shown(value)}")
    return rids
