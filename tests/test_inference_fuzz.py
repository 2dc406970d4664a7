"""Malformed and hostile requests to every endpoint: a 4xx with a message or a correct answer; the server goes on."""

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.inference import WAIT_S, LocalServer, save_tiny_llama, served

SAMPLED = ("/generate", "/v1/chat/completions", "/v1/completions")
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = served(save_tiny_llama(tmp_path_factory.mktemp("llama"), context=64))
    model.tokenizer.chat_template = CHATML
    with LocalServer(model, kv_tokens=256) as running:
        yield running


@pytest.fixture(scope="module")
def connection(server):
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


@st.composite
def near(draw: st.DrawFn, good: dict[str, Any], fields: dict[str, st.SearchStrategy[Any]], never: str = "") -> Any:
    """A good body with a few fields of the right kind, and perhaps one of any kind; `never` names fields that are
    refused unless empty."""
    names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True))
    body = {**good, **{name: draw(fields[name]) for name in names}}
    if draw(st.integers(0, 2)) == 0:
        body[draw(st.sampled_from([*fields, *good, *never.split()]))] = draw(anything)
    return body


SAMPLING = {
    "max_new_tokens": few, "min_new_tokens": few, "temperature": st.floats(0, 2), "top_p": st.floats(0.01, 1),
    "top_k": few, "min_p": st.floats(0, 1), "stop": texts_of_stop, "stop_token_ids": tokens, "n": few,
    "frequency_penalty": st.floats(-2, 2), "presence_penalty": st.floats(-2, 2), "ignore_eos": booleans,
    "repetition_penalty": st.floats(0.01, 2), "logit_bias": biases, "sampling_seed": st.integers(0, 2**63 - 1),
    "no_stop_trim": booleans, "skip_special_tokens": booleans,
}  # fmt: skip
COMMON = {
    **{name: kind for name, kind in SAMPLING.items() if name not in ("max_new_tokens", "min_new_tokens")},
    "max_tokens": few, "max_completion_tokens": few, "seed": st.integers(0, 2**40), "stream": booleans,
    "model": odd_texts, "stream_options": near({}, {"include_usage": booleans, "continuous_usage_stats": booleans}),
    "return_token_ids": booleans, "return_meta_info": booleans, "rid": odd_texts,
}  # fmt: skip
CALL = near({"function": {"name": "f", "arguments": "{}"}}, {"function": near({"name": "f"}, {"arguments": odd_texts})})
MESSAGE = near(
    {"role": "user", "content": "a"},
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": odd_texts | st.lists(near({"type": "text", "text": "b"}, {"text": odd_texts}), max_size=2),
        "tool_calls": st.lists(CALL, max_size=2),
    },
)
CHAT = {
    **COMMON, "messages": st.lists(MESSAGE, min_size=1, max_size=3), "tools": st.lists(st.just(TOOL), max_size=2),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"function": {"name": "f"}}]), "logprobs": booleans,
    "input_ids": tokens, "chat_template_kwargs": near({}, {"x": anything}), "top_logprobs": few,
    "continue_final_message": booleans, "add_generation_prompt": booleans,
}  # fmt: skip
GENERATE = {
    "sampling_params": near({"max_new_tokens": 3}, SAMPLING, "stop_regex json_schema oops"), "stream": booleans,
    "input_ids": prompts, "rid": odd_texts | st.lists(odd_texts), "return_logprob": booleans,
    "logprob_start_len": few, "top_logprobs_num": few, "token_ids_logprob": tokens, "num_prompt_tokens": few,
    "return_text_in_logprobs": booleans, "return_prompt_token_ids": booleans,
}  # fmt: skip
ONE = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
SLOT = {"name": "model.norm.weight", "dtype": "float32", "shape": [64], "offset": 0, "nbytes": 256}
GROUP = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[64]], "group_name": "nobody"}
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "/generate": near({"input_ids": [1, 2]}, GENERATE, "lora_path image_data session_params input_embeds"),
    "/v1/chat/completions": near(ONE, CHAT, "lora_path response_format functions"),
    "/v1/completions": near({"prompt": "a", "max_tokens": 3}, {**COMMON, "prompt": prompts, "logprobs": few,
                            "echo": booleans}, "lora_path best_of suffix"),
    "/abort_request": near({}, {"rid": odd_texts, "abort_all": booleans}),
    "/pause_generation": near({}, {"mode": st.sampled_from(["abort", "retract", "in_place"])}),
    "/continue_generation": near({}, {"torch_empty_cache": booleans}),
    "/update_weights_from_disk": near({}, {"model_path": odd_texts, "weight_version": odd_texts}, "flush_cache"),
    "/update_weights_from_shm": near({"path": "nowhere", "slots": [SLOT]}, {"path": odd_texts,
                                     "slots": st.lists(near(SLOT, {"offset": few, "nbytes": few, "shape": tokens}))}),
    "/update_weights_from_distributed": near(GROUP, {"names": st.lists(odd_texts), "dtypes": st.lists(odd_texts),
                                                     "shapes": st.lists(tokens)}, "load_format flush_cache"),
    "/init_weights_update_group": near({"master_address": 5}, {"rank_offset": few, "group_name": odd_texts}),
    "/begin_weight_update": near({}, {"selector": odd_texts}),
    "/end_weight_update": near({}, {"weight_version": odd_texts}),
    "/update_weight_version": near({"new_version": "0"}, {"new_version": odd_texts, "abort_all_requests": booleans}),
    "/load_lora_adapter": near({"lora_name": "a", "lora_path": "nowhere"}, {"lora_path": odd_texts}),
    "/unload_lora_adapter": near({"lora_name": "a"}, {"lora_name": odd_texts}),
    "/flush_cache": anything,
    "/release_memory_occupation": near({}, {"tags": st.lists(odd_texts)}),
    "/resume_memory_occupation": near({}, {"tags": st.lists(odd_texts)}),
}  # fmt: skip
raw_bodies = (
    st.binary(max_size=40)
    | anything.map(lambda body: json.dumps(body).encode())
    | st.sampled_from(
        [b"[" * 200_000, b'{"a":' * 100_000, b"1" * 10_000, b"\xff\xfe", b"{}", b"null", b'"x"', b"[" + b"1," * 200_000]
    )
)
types_of_content = st.sampled_from(["application/json", "text/plain", "multipart/form-data", "\x01", "a/b; charset=zz"])


def send(connection, method: str, path: str, body: bytes, **headers: str) -> tuple[int, str]:
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


UNDONE_BY = {
    "/pause_generation": "/continue_generation",
    "/release_memory_occupation": "/resume_memory_occupation",
}


def still_serves(connection: http.client.HTTPConnection) -> None:
    send(connection, "POST", "/continue_generation", b"{}")
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    status, text = send(connection, "POST", "/generate", json.dumps(body).encode())
    assert status == 200 and len(json.loads(text)["output_ids"]) == 4, text


@pytest.mark.parametrize("path", BODIES)
def test_bodies_by_schema(path, connection):
    num_examples = 150 if path in SAMPLED else 25
    statuses: list[int] = []

    @settings(max_examples=num_examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(body=BODIES[path])
    def sent(body: Any) -> None:
        status, text = send(connection, "POST", path, json.dumps(body).encode(), **{"Content-Type": "application/json"})
        judge(path, status, text)
        statuses.append(status)
        if path in UNDONE_BY:
            send(connection, "POST", UNDONE_BY[path], b"{}")

    sent()
    still_serves(connection)
    if path in SAMPLED:
        assert statuses.count(200) > len(statuses) / 5 and statuses.count(400) > len(statuses) / 5, "both are tried"


def test_bytes_types_and_methods(connection):
    paths = st.sampled_from([*BODIES, "/", "/nothing", "/v1/models", "/metrics", "/health", "/v1/%00", "//generate"])

    @settings(max_examples=150, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.sampled_from(["POST", "GET", "PUT", "DELETE", "PATCH"]), paths, raw_bodies, types_of_content)
    def sent(method: str, path: str, body: bytes, content_type: str) -> None:
        judge(path, *send(connection, method, path, body, **{"Content-Type": content_type}))
        send(connection, "POST", "/continue_generation", b"{}")

    sent()
    still_serves(connection)


def test_texts_that_cannot_fit_are_refused_before_they_are_encoded(connection):
    long = "z" * 20_000_000
    for path, body in (
        ("/generate", {"text": long}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/generate", {"input_ids": [5] * 1_000_000}),
    ):
        status, text = send(connection, "POST", path, json.dumps(body).encode())
        assert status == 400 and len(text) < 2000, text[:2000]


def test_compressed_and_broken_connections_do_no_harm(server):
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
