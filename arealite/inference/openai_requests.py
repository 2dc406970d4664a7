"""Bodies of /v1/chat/completions and /v1/completions: turned into a body of /generate, whose checks then hold for both.

Called by routes.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from arealite.api.errors import RequestError
from arealite.inference.bodies import WrongType, field, integer, of_type, shown
from arealite.inference.chat_template import ChatTemplate
from arealite.inference.requests import GenerateCall, ServedLimits, parse_generate
from arealite.inference.tool_calls import CLOSE, ToolUse

DEFAULT_MAX_TOKENS = 16  # of /v1/completions; a chat may take all that fits
MAX_TOP_LOGPROBS = 20

# What OpenAI's protocol calls differently; all other sampling keys have SGLang's names.
_RENAMED = {"seed": "sampling_seed", "min_tokens": "min_new_tokens"}
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "logit_bias", "stop", "stop_token_ids", "stop_regex", "n", "ignore_eos", "skip_special_tokens", "no_stop_trim",
    "regex", "ebnf", "custom_params",
)  # fmt: skip
_FROM_GENERATION_CONFIG = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class OpenAICall:
    """One checked call. Its requests are those of each prompt, one after the other."""

    generate: GenerateCall
    model: str
    num_samples: int  # of each prompt
    use: ToolUse | None
    logprobs: bool
    echo: bool
    include_usage: bool
    usage_in_each: bool
    return_token_ids: bool
    return_prompt_token_ids: bool
    return_meta_info: bool


@dataclass(frozen=True)
class Served:
    """What bodies are read against: `defaults` are sampling values that a body may leave out; `model_name` is what
    /v1/models shows."""

    limits: ServedLimits
    template: ChatTemplate
    model_name: str
    defaults: dict[str, Any]


def model_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """Sampling values that a model's generation_config.json asks for."""
    found = {key: generation_config.get(key) for key in _FROM_GENERATION_CONFIG}
    if found["top_k"] == 0:  # all tokens, as Transformers writes it
        found["top_k"] = -1
    return {key: value for key, value in found.items() if value is not None}


def parse_chat(body: Any, served: Served) -> OpenAICall:
    """Raises RequestError: anything missing, contradictory, of the wrong type, out of range or not supported."""
    body = of_type("the body", body, dict)
    _refuse(body, ("functions", "function_call", "audio"))
    if body.get("input_ids") is None:
        prompt_ids, use = served.template.encode(body)
    else:  # made by the client, who then also decides how the answer begins
        prompt_ids, use = field(body, "input_ids", list, []), served.template.tools(body)[1]
        use = use and ToolUse(use.names, use.way)
        if any(isinstance(token, list) for token in prompt_ids):
            raise RequestError("input_ids: a chat has one prompt; expected a list of token ids")
    num_top = integer("top_logprobs", field(body, "top_logprobs", int, 0), 0, MAX_TOP_LOGPROBS)
    logprobs = field(body, "logprobs", bool, False)
    if num_top and not logprobs:
        raise RequestError("top_logprobs: needs logprobs: true")
    sampling = _sampling(body, served)
    asked = body.get("max_completion_tokens")
    sampling["max_new_tokens"] = body.get("max_tokens") if asked is None else asked
    if use is not None:
        sampling.setdefault("skip_special_tokens", False)  # they may mark a call
        if use.forced and use.way != "plain":
            sampling["stop"] = _with_close(sampling.get("stop"))
    return _call(body, served, {"input_ids": prompt_ids}, sampling, num_top, logprobs, use)


def parse_completion(body: Any, served: Served) -> OpenAICall:
    """Raises RequestError as parse_chat does."""
    body = of_type("the body", body, dict)
    _refuse(body, ("suffix", "use_beam_search"))
    prompt = body.get("prompt")
    is_text = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str))
    if not is_text and not isinstance(prompt, list):
        raise WrongType(f"prompt: expected text, token ids, or a list of either, found {shown(prompt)}")
    num_top = body.get("logprobs")
    num_top = None if num_top is None else integer("logprobs", num_top, 0, MAX_TOP_LOGPROBS)
    sampling = _sampling(body, served)
    asked = body.get("max_tokens")
    sampling["max_new_tokens"] = DEFAULT_MAX_TOKENS if asked is None else asked
    source = {"text" if is_text else "input_ids": prompt}
    return _call(body, served, source, sampling, num_top or 0, num_top is not None, None)


def _refuse(body: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if body.get(name):
            raise RequestError(f"{name}: not supported by this server; leave it out")
    wanted = (field(body, "response_format", dict, {})).get("type", "text")
    if wanted != "text":
        raise RequestError(f"response_format: only text is supported, found {shown(wanted)}")
    if body.get("best_of") not in (None, body.get("n") or 1):
        raise RequestError("best_of: not supported by this server; use n")


def _sampling(body: dict[str, Any], served: Served) -> dict[str, Any]:
    names = {**{name: name for name in _SAME}, **_RENAMED}
    given = {own: body[name] for name, own in names.items() if body.get(name) is not None}
    return {**served.defaults, **given}


def _with_close(stop: Any) -> Any:
    """The forced call is all that is wanted; what is no stop string is left to be refused."""
    given = stop if isinstance(stop, list) else [] if stop is None else [stop]
    return [*given, CLOSE]


def _call(
    body: dict[str, Any],
    served: Served,
    prompt: dict[str, Any],
    sampling: dict[str, Any],
    num_top: int,
    logprobs: bool,
    use: ToolUse | None,
) -> OpenAICall:
    echo = use is None and "messages" not in body and field(body, "echo", bool, False)
    model, adapter = _model_and_adapter(body, served)
    generate = {
        **prompt,
        "sampling_params": sampling,
        "return_logprob": logprobs,
        "top_logprobs_num": num_top,
        "logprob_start_len": 0 if echo and logprobs else -1,
        "lora_path": adapter,
        "rid": body.get("rid"),
        "stream": field(body, "stream", bool, False),
    }
    try:
        call = parse_generate(generate, served.limits)
    except RequestError as error:
        raise type(error)(_in_their_words(str(error), completion="messages" not in body)) from error
    options = field(body, "stream_options", dict, {})
    return OpenAICall(
        call,
        model,
        field(sampling, "n", int, 1),
        use,
        logprobs,
        echo,
        field(options, "include_usage", bool, False),
        field(options, "continuous_usage_stats", bool, False),
        *(field(body, f"return_{what}", bool, False) for what in ("token_ids", "prompt_token_ids", "meta_info")),
    )


def _in_their_words(message: str, completion: bool) -> str:
    """The message with the names that stand in the client's body."""
    if completion:
        message = re.sub(r"^(text|input_ids)\b", "prompt", message)
    for name, own in {**_RENAMED, "max_tokens": "max_new_tokens"}.items():
        message = message.replace(own, name)
    return message.replace("sampling_params.", "")


def _model_and_adapter(body: dict[str, Any], served: Served) -> tuple[str, str | None]:
    """The model's name for the answer, and its adapter: `lora_path`, or "base:adapter", or an adapter's own name."""
    model = field(body, "model", str, served.model_name)
    adapter = field(body, "lora_path", str, None)
    if adapter is None and model != served.model_name:
        adapter = model if model in served.limits.adapters else model.partition(":")[2].strip() or None
    return model, adapter
