"""The body of POST /generate, checked in full before the engine sees it (types as strict as SGLang 0.5.22 and later).

Called by routes.py. Whatever is wrong is a RequestError, which the route answers with status 400.
"""

from __future__ import annotations

import difflib
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from arealite.api.errors import RequestError

GREEDY_BELOW = 1e-6  # a temperature under this is greedy, and its logprobs are those of temperature 1
DEFAULT_MAX_NEW_TOKENS = 128
MAX_STOP_STRINGS = 32


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
    seed: int | None = None
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
    return_prompt_token_ids: bool = False


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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name}: expected an integer, found {_shown(value)}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name}: expected {bound}, found {_shown(value)}")
    return value


def _number(name: str, value: Any, low: float, high: float | None = None, open_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name}: expected a number, found {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    inside = number > low if open_low else number >= low
    if not math.isfinite(number) or not inside or (high is not None and number > high):
        span = f"{'above' if open_low else 'at least'} {low:g}" + ("" if high is None else f" and at most {high:g}")
        raise RequestError(f"{name}: expected a finite number {span}, found {_shown(value)}")
    return number


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name}: expected true or false, found {_shown(value)}")
    return value


def _stop_strings(name: str, value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise RequestError(f"{name}: expected a string or a list of strings, found {_shown(value)}")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"{name}: expected at most {MAX_STOP_STRINGS} strings, found {len(strings)}")
    return tuple(s for s in strings if s)


def _token_set(name: str, value: Any) -> frozenset[int]:
    if not isinstance(value, list):
        raise RequestError(f"{name}: expected a list of token ids, found {_shown(value)}")
    return frozenset(_integer(name, token, 0) for token in value)


def _top_k(name: str, value: Any) -> int:
    """0 for "all", which the wire writes as -1 or as a number beyond any vocabulary."""
    k = _integer(name, value, -1)
    if k == 0:
        raise RequestError(f"{name}: expected -1 (all tokens) or at least 1, found 0")
    return 0 if k == -1 else k


_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": lambda name, value: _integer(name, value, 0),
    "min_new_tokens": lambda name, value: _integer(name, value, 0),
    "temperature": lambda name, value: _number(name, value, 0.0),
    "top_p": lambda name, value: _number(name, value, 0.0, 1.0, open_low=True),
    "top_k": _top_k,
    "min_p": lambda name, value: _number(name, value, 0.0, 1.0),
    "stop": _stop_strings,
    "stop_token_ids": _token_set,
    "ignore_eos": _boolean,
    "sampling_seed": lambda name, value: _integer(name, value, -(2**63), 2**63 - 1),
    "skip_special_tokens": _boolean,
    "no_stop_trim": _boolean,
    "spaces_between_special_tokens": _boolean,  # without meaning for tokenizers of the tokenizers library
    "stream_interval": lambda name, value: _integer(name, value, 1),
}

# Keys of the protocol that this server does not do yet, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "stop_regex": ("", []),
    "custom_params": ({},),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "beam_width": (1,),
    "watermark": (False,),
}

# The same for the top level of the body; null always asks for nothing.
_NEUTRAL_TOP: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "input_embeds": (),
    "image_data": ([],),
    "video_data": ([],),
    "audio_data": ([],),
    "top_logprobs_num": (0,),
    "token_ids_logprob": ([],),
    "return_text_in_logprobs": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_sampling_mask": (False,),
    "return_entropy": (False,),
    "lora_path": ("",),
    "custom_logit_processor": ("",),
    "session_params": ({},),
}


def _refuse_unless_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if value is None or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral):
        return
    allowed = " or ".join(["null", *(repr(v).lower() if isinstance(v, bool) else repr(v) for v in neutral)])
    raise RequestError(f"{name}: {_shown(value)} is not supported by this server; leave it out or send {allowed}")


def parse_sampling_params(value: Any, num_prompt_tokens: int, limits: ServedLimits) -> SamplingParams:
    """One `sampling_params` object of the wire (null for all defaults)."""
    fields = {} if value is None else value
    if not isinstance(fields, dict):
        raise RequestError(f"sampling_params: expected an object, found {_shown(value)}")
    parsed: dict[str, Any] = {}
    for key, entry in fields.items():
        if key in _NEUTRAL:
            _refuse_unless_neutral(f"sampling_params.{key}", entry, _NEUTRAL[key])
        elif key not in _PARSERS:
            near = difflib.get_close_matches(key[:64], [*_PARSERS, *_NEUTRAL], n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else f"; known keys are {', '.join(sorted(_PARSERS))}"
            raise RequestError(f"sampling_params: unknown key {_shown(key)}{hint}")
        elif entry is not None:
            parsed[key] = _PARSERS[key](f"sampling_params.{key}", entry)
    for ignored in ("spaces_between_special_tokens", "stream_interval"):
        parsed.pop(ignored, None)
    parsed["seed"] = parsed.pop("sampling_seed", None)
    if parsed.get("temperature", 1.0) < GREEDY_BELOW:
        parsed["temperature"] = 0.0
    if parsed.get("stop") and limits.encode is None:
        raise RequestError("sampling_params.stop: the served model folder has no tokenizer; use stop_token_ids")
    parsed["max_new_tokens"] = _max_new_tokens(fields, parsed, num_prompt_tokens, limits)
    if parsed.get("min_new_tokens", 0) > parsed["max_new_tokens"]:
        raise RequestError(
            f"sampling_params.min_new_tokens: {parsed['min_new_tokens']} is more than max_new_tokens"
            f" {parsed['max_new_tokens']}"
        )
    return SamplingParams(**parsed)


def _max_new_tokens(fields: dict[str, Any], parsed: dict[str, Any], num_prompt: int, limits: ServedLimits) -> int:
    """The asked number where it fits; null is all that fits, a missing key the protocol's default at most."""
    if num_prompt >= limits.max_tokens:
        raise RequestError(
            f"the prompt has {num_prompt} tokens; context length {limits.context_length} and KV cache of"
            f" {limits.kv_cache_tokens} tokens allow less than {limits.max_tokens}"
        )
    room = limits.max_tokens - num_prompt
    asked = parsed.get("max_new_tokens")
    if asked is None:
        return room if "max_new_tokens" in fields else min(DEFAULT_MAX_NEW_TOKENS, room)
    if asked > room:
        raise RequestError(
            f"prompt ({num_prompt} tokens) and max_new_tokens ({asked}) pass what is served: context length"
            f" {limits.context_length}, KV cache {limits.kv_cache_tokens} tokens; ask for at most {room}"
        )
    return int(asked)


def parse_generate(body: Any, limits: ServedLimits) -> tuple[list[GenerateRequest], bool]:
    """The requests of one /generate body, and whether the answer is a list (batch).

    Raises:
        RequestError: anything missing, contradictory, of the wrong type, out of range or not supported.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the body: expected a JSON object, found {_shown(body)}")
    for key, neutral in _NEUTRAL_TOP.items():
        _refuse_unless_neutral(key, body.get(key), neutral)
    prompts, batched = _prompts(body, limits)
    num = len(prompts)
    rids = _rids(body.get("rid"), num, batched)
    params = _per_request("sampling_params", body.get("sampling_params"), num, batched)
    want_logprob = _per_request("return_logprob", body.get("return_logprob"), num, batched)
    start = _per_request("logprob_start_len", body.get("logprob_start_len"), num, batched)
    want_prompt = body.get("return_prompt_token_ids")
    requests = []
    for i, prompt in enumerate(prompts):
        with_logprob = False if want_logprob[i] is None else _boolean("return_logprob", want_logprob[i])
        first = -1 if start[i] is None else _integer("logprob_start_len", start[i], -1, len(prompt))
        requests.append(
            GenerateRequest(
                rid=rids[i],
                prompt_ids=prompt,
                params=parse_sampling_params(params[i], len(prompt), limits),
                return_logprob=with_logprob,
                logprob_start=first if with_logprob and 0 <= first < len(prompt) else None,
                return_prompt_token_ids=False
                if want_prompt is None
                else _boolean("return_prompt_token_ids", want_prompt),
            )
        )
    return requests, batched


def _per_request(name: str, value: Any, num: int, batched: bool) -> list[Any]:
    if not isinstance(value, list):
        return [value] * num
    if not batched or len(value) != num:
        raise RequestError(f"{name}: expected one value or a list of {num} for a batch, found {len(value)} values")
    return value


def _prompts(body: dict[str, Any], limits: ServedLimits) -> tuple[list[list[int]], bool]:
    given = [key for key in ("text", "input_ids") if body.get(key) is not None]
    if len(given) != 1:
        raise RequestError(f"exactly one of text and input_ids is needed, found {' and '.join(given) or 'neither'}")
    value = body[given[0]]
    if given[0] == "text":
        encode = limits.encode
        if encode is None:
            raise RequestError("text: the served model folder has no tokenizer; send input_ids")
        batched = isinstance(value, list)
        texts = value if batched else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise RequestError(f"text: expected a string or a list of strings, found {_shown(value)}")
        prompts = [encode(text) for text in texts]
    else:
        if not isinstance(value, list) or not value:
            raise RequestError(f"input_ids: expected token ids or a list of token id lists, found {_shown(value)}")
        batched = isinstance(value[0], list)
        prompts = value if batched else [value]
    for i, prompt in enumerate(prompts):
        _check_prompt(f"{given[0]}[{i}]" if batched else given[0], prompt, limits)
    return prompts, batched


def _check_prompt(name: str, prompt: Any, limits: ServedLimits) -> None:
    if not isinstance(prompt, list):
        raise RequestError(f"{name}: expected a list of token ids, found {_shown(prompt)}")
    if not prompt:
        raise RequestError(f"{name}: the prompt is empty; at least one token is needed")
    for token in prompt:
        _integer(name, token, 0, limits.vocab_size - 1)


def _rids(value: Any, num: int, batched: bool) -> list[str]:
    if value is None:
        return [uuid.uuid4().hex for _ in range(num)]
    if isinstance(value, str) and value:
        return [f"{value}_{i}" for i in range(num)] if batched else [value]
    if not isinstance(value, list) or not batched or not all(isinstance(rid, str) and rid for rid in value):
        raise RequestError(f"rid: expected a string, or for a batch a list of strings, found {_shown(value)}")
    if len(value) != num or len(set(value)) != num:
        raise RequestError(f"rid: expected {num} different ids, found {len(set(value))} different among {len(value)}")
    return value
