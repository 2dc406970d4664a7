"""Malformed and hostile requests to every endpoint: a 4xx with a message or a correct answer; the server goes on."""

from __future__ import annotations

import base64
import http.client
import json
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inference_support import WAIT_S, LocalServer, save_tiny_llama, served

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


class Payload:
    """Would leave a file behind if it were executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    model = served(save_tiny_llama(tmp_path_factory.mktemp("llama"), context=64))
    model.tokenizer.chat_template = CHATML
    with LocalServer(model, kv_tokens=256) as running:
        yield running


@pytest.fixture(scope="module")
def connection(server: LocalServer) -> Iterator[http.client.HTTPConnection]:
    opened = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=WAIT_S)
    yield opened
    opened.close()


odd_numbers = st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 1e308, -1e-320, 0.5, True])
odd_numbers |= st.sampled_from([float("nan"), float("inf"), float("-inf")])
odd_texts = st.sampled_from(["", "a", "\ud800", "\x00", "\U0001f600", "<eos>", "../../x", "{{ 7 * 7 }}", "z" * 5000])
leaves = st.none() | odd_numbers | odd_texts | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | odd_texts, inner, max_size=4),
    max_leaves=8,
)
tokens = st.lists(st.integers(0, 259), min_size=1, max_size=8)
prompts = tokens | st.lists(tokens, min_size=1, max_size=3) | odd_texts | st.lists(odd_texts, max_size=3)
booleans, few = st.booleans(), st.integers(0, 6)
texts_of_stop = odd_texts | st.lists(odd_texts, max_size=3)
biases = st.dictionaries(st.sampled_from(["0", "5", "259", "260", "-1", "x", "9" * 30]), odd_numbers, max_size=3)


def record(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the fields, each mostly of the right kind."""
    return st.fixed_dictionaries({}, optional={name: kind | kind | anything for name, kind in fields.items()})


SAMPLING = {
    "max_new_tokens": few, "min_new_tokens": few, "temperature": st.floats(0, 2), "top_p": st.floats(0, 1),
    "top_k": few, "min_p": st.floats(0, 1), "stop": texts_of_stop, "stop_token_ids": tokens, "n": few,
    "frequency_penalty": st.floats(-2, 2), "presence_penalty": st.floats(-2, 2), "ignore_eos": booleans,
    "repetition_penalty": st.floats(0, 2), "logit_bias": biases, "sampling_seed": st.integers(),
    "no_stop_trim": booleans, "skip_special_tokens": booleans,
    "stop_regex": odd_texts, "json_schema": odd_texts, "oops": anything,
}  # fmt: skip
COMMON = {
    **{name: SAMPLING[name] for name in ("temperature", "top_p", "top_k", "min_p", "stop", "n", "logit_bias")},
    "max_tokens": few, "max_completion_tokens": few, "seed": st.integers(), "stream": booleans, "model": odd_texts,
    "stream_options": record(include_usage=booleans), "return_token_ids": booleans, "rid": odd_texts,
    "return_meta_info": booleans, "lora_path": odd_texts, "top_logprobs": few,
    "response_format": record(type=odd_texts),
}  # fmt: skip
MESSAGE = record(
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=odd_texts | st.lists(record(type=st.just("text"), text=odd_texts), max_size=2),
    tool_calls=st.lists(record(function=record(name=odd_texts, arguments=odd_texts)), max_size=2),
)
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "/generate": record(
        input_ids=prompts, text=prompts, sampling_params=record(**SAMPLING), rid=odd_texts | st.lists(odd_texts),
        stream=booleans, return_logprob=booleans, logprob_start_len=few, top_logprobs_num=few,
        token_ids_logprob=tokens, return_text_in_logprobs=booleans, return_prompt_token_ids=booleans,
        lora_path=odd_texts, image_data=anything, session_params=anything,
    ),
    "/v1/chat/completions": record(
        **COMMON, messages=st.lists(MESSAGE, min_size=1, max_size=3),
        tools=st.lists(st.just(TOOL) | anything, max_size=2),
        tool_choice=st.sampled_from(["none", "auto", "required", {"function": {"name": "f"}}]), logprobs=booleans,
        input_ids=tokens, chat_template_kwargs=anything, continue_final_message=booleans,
        add_generation_prompt=booleans,
    ),
    "/v1/completions": record(**COMMON, prompt=prompts, logprobs=few, echo=booleans, best_of=few, suffix=odd_texts),
    "/tokenize": record(prompt=prompts, add_special_tokens=booleans),
    "/detokenize": record(tokens=prompts, skip_special_tokens=booleans),
    "/abort_request": record(rid=odd_texts, abort_all=booleans),
    "/pause_generation": record(mode=odd_texts),
    "/continue_generation": record(torch_empty_cache=booleans),
    "/update_weights_from_disk": record(
        model_path=odd_texts, weight_version=odd_texts, flush_cache=booleans, abort_all_requests=booleans
    ),
    "/update_weights_from_shm": record(path=odd_texts, slots=anything, partial=booleans),
    "/update_weights_from_distributed": record(
        names=st.lists(odd_texts), dtypes=st.lists(odd_texts), shapes=st.lists(tokens), group_name=odd_texts
    ),
    "/update_weights_from_tensor": record(
        serialized_named_tensors=st.lists(odd_texts | st.binary().map(lambda b: base64.b64encode(b).decode())),
        load_format=st.sampled_from([None, "direct", "flattened_bucket", "x.y"]), weight_version=odd_texts,
    ),
    "/init_weights_update_group": record(master_address=odd_texts, rank_offset=anything),
    "/destroy_weights_update_group": record(group_name=odd_texts),
    "/begin_weight_update": record(selector=odd_texts),
    "/end_weight_update": anything,
    "/update_weight_version": record(new_version=odd_texts, abort_all_requests=booleans),
    "/weights_checker": record(action=st.just("checksum"), names=st.lists(odd_texts)),
    "/get_weights_by_name": record(
        name=st.sampled_from(["model.norm.weight", "lm_head.weight", "x"]), truncate_size=st.integers(0, 5)
    ),
    "/load_lora_adapter": record(lora_name=odd_texts, lora_path=odd_texts, pinned=booleans),
    "/load_lora_adapter_from_tensors": record(
        lora_name=odd_texts, config_dict=anything, serialized_named_tensors=st.lists(odd_texts)
    ),
    "/unload_lora_adapter": record(lora_name=odd_texts),
    "/flush_cache": anything,
    "/release_memory_occupation": record(tags=anything),
    "/resume_memory_occupation": record(tags=anything),
}  # fmt: skip
raw_bodies = st.binary(max_size=40) | st.sampled_from(
    [b"[" * 200_000, b'{"a":' * 100_000, b"1" * 10_000, b"\xff\xfe", b"{}", b"null", b'"x"', b"[" + b"1," * 200_000]
)
types_of_content = st.sampled_from(["application/json", "text/plain", "multipart/form-data", "\x01", "a/b; charset=zz"])


def send(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes, **headers: str
) -> tuple[int, str]:
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def judge(path: str, status: int, text: str) -> None:
    """A good answer, or a refusal that says something."""
    assert status == 200 or 400 <= status < 500, f"{path}: {status} {text}"
    assert status == 200 or len(text) > 10, text
    if status == 200 and text.startswith("data: "):
        assert text.endswith("data: [DONE]\n\n") and '"error"' not in text, text
        for event in text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
            strictly_json(event.removeprefix("data: "))
    elif text and text[0] in "[{":
        strictly_json(text)


def strictly_json(text: str) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(text, parse_constant=refuse)


def still_serves(connection: http.client.HTTPConnection) -> None:
    send(connection, "POST", "/continue_generation", b"{}")
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    status, text = send(connection, "POST", "/generate", json.dumps(body).encode())
    assert status == 200 and len(json.loads(text)["output_ids"]) == 4, text


@pytest.mark.parametrize("path", BODIES)
def test_bodies_by_schema(path: str, connection: http.client.HTTPConnection) -> None:
    num_examples = 120 if path in ("/generate", "/v1/chat/completions", "/v1/completions") else 25

    @settings(max_examples=num_examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(body=BODIES[path] | anything)
    def sent(body: Any) -> None:
        judge(path, *send(connection, "POST", path, json.dumps(body).encode(), **{"Content-Type": "application/json"}))
        if path == "/pause_generation":
            send(connection, "POST", "/continue_generation", b"{}")

    sent()
    still_serves(connection)


def test_bytes_types_and_methods(connection: http.client.HTTPConnection) -> None:
    paths = st.sampled_from([*BODIES, "/", "/nothing", "/v1/models", "/metrics", "/health", "/v1/%00", "//generate"])

    @settings(max_examples=150, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.sampled_from(["POST", "GET", "PUT", "DELETE", "PATCH"]), paths, raw_bodies, types_of_content)
    def sent(method: str, path: str, body: bytes, content_type: str) -> None:
        judge(path, *send(connection, method, path, body, **{"Content-Type": content_type}))
        send(connection, "POST", "/continue_generation", b"{}")

    sent()
    still_serves(connection)


def test_texts_that_cannot_fit_are_refused_before_they_are_encoded(connection: http.client.HTTPConnection) -> None:
    long = "z" * 20_000_000
    for path, body in (
        ("/generate", {"text": long}),
        ("/tokenize", {"prompt": long}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/generate", {"input_ids": [5] * 1_000_000}),
    ):
        status, text = send(connection, "POST", path, json.dumps(body).encode())
        assert status == 400 and len(text) < 2000, text[:2000]


@pytest.mark.parametrize("path", ["/update_weights_from_tensor", "/load_lora_adapter_from_tensors"])
def test_a_pickle_is_never_executed(path: str, connection: http.client.HTTPConnection, tmp_path: Path) -> None:
    payload = base64.b64encode(pickle.dumps([("w", Payload(tmp_path / "executed"))])).decode()
    body = {"serialized_named_tensors": [payload], "lora_name": "x", "config_dict": {"r": 1, "lora_alpha": 1}}
    status, text = send(connection, "POST", path, json.dumps(body).encode())
    assert status == 400 and "essage" in text
    assert not (tmp_path / "executed").exists()


def test_compressed_and_broken_connections_do_no_harm(server: LocalServer) -> None:
    place = urlsplit(server.url)
    for raw in (
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{}",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    ):
        with socket.create_connection((str(place.hostname), int(place.port or 0)), WAIT_S) as opened:
            opened.sendall(raw)
            opened.shutdown(socket.SHUT_WR)
            answer = opened.recv(64)
        assert not answer or b" 4" in answer[:12], answer
    status, _ = server.post("/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 2}})
    assert status == 200
