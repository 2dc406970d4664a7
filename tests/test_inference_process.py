"""The server as a process: its ready line, its exit statuses, its heartbeat."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.inference import EOS, WAIT_S, byte_tokenizer, fetch, save_tiny_llama

from arealite.inference.serve import build_engine, main, parse_arguments

BROKEN_ENGINE = """
import sys
from arealite.inference.core.batcher import Batcher
from arealite.inference.serve import main
def broken(self):
    raise RuntimeError("the cable is unplugged")
Batcher.step = broken
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"), context=8192)


@contextmanager
def server_process(folder: Path, *flags: str, code="", env=None) -> Iterator[tuple[Any, str]]:
    """The process and its address."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "arealite.inference.serve"])]
    command += ["--model", str(folder), "--port", "0", "--dtype", "float32", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        host = "[::1]" if "::1" in flags else "127.0.0.1"
        assert line.startswith(f"listening on http://{host}:"), line
        yield process, line.removeprefix("listening on ").strip()
    finally:
        process.kill()
        process.wait(WAIT_S)


def test_it_serves_says_how_it_waits_and_answers_what_is_running_on_sigterm(folder, tmp_path):
    env = {"AREALITE_RUN_DIR": str(tmp_path), "AREALITE_PROCESS": "server-0", "AREALITE_HEARTBEAT_S": "0.05"}
    with server_process(folder, "--weight-version", "3", "--host", "::1", env=env) as (process, url):
        status, answer = fetch(url + "/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3}})
        assert status == 200 and answer["meta_info"]["weight_version"] == "3"
        beat = tmp_path / "waits" / "server-0.json"
        end = time.monotonic() + WAIT_S
        content: dict[str, Any] = {"waits": [], "marks": {}}
        while "token" not in content["marks"] or "engine idle, last token" not in str(content["waits"]):
            assert time.monotonic() < end, content
            content = json.loads(beat.read_text())
        assert content["marks"]["token"] >= 0
        with ThreadPoolExecutor() as pool:
            body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 8000, "ignore_eos": True}}
            future = pool.submit(fetch, url + "/generate", body)
            while fetch(url + "/server_info", None)[1]["internal_states"][0]["num_generated_tokens"] <= 3:
                assert time.monotonic() < end and not future.done()
            process.send_signal(signal.SIGTERM)
            status, answer = future.result(WAIT_S)
        assert status == 200 and answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert process.wait(WAIT_S) == 0
        assert not beat.exists()


def test_a_failed_engine_ends_the_process_with_an_error(folder):
    with server_process(folder, code=BROKEN_ENGINE) as (process, url):
        status, answer = fetch(url + "/generate", {"input_ids": [1]})
        assert status == 503 and "the cable is unplugged" in answer["error"]["message"]
        assert process.wait(WAIT_S) == 1


def test_a_model_that_cannot_be_served_is_refused(tmp_path, capsys):
    assert main(["--model", str(tmp_path)]) == 2
    assert "no causal language model can be loaded from" in capsys.readouterr().err


def test_another_tokenizer_brings_its_end_token_and_template(folder, tmp_path):
    other = byte_tokenizer()
    other.eos_token, other.chat_template = "<bos>", "{{ messages[0].content }}!"
    other.save_pretrained(tmp_path)
    engine = build_engine(parse_arguments(["--model", str(folder), "--tokenizer-path", str(tmp_path)]))
    model = engine.batcher.model
    assert model.eos_token_ids == {EOS, 257} and model.tokenizer.chat_template == other.chat_template


def test_a_taken_port_is_refused(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", str(folder), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_flags_are_checked():
    assert parse_arguments(["--model", "m", "--max-running-requests", "7"]).max_running_requests == 7
    for wrong in (
        *(["--kv-cache-tokens", "0"], ["--dtype", "int8"], ["--max-running-requests", "-1"], ["--port", "65536"]),
        *(["--hold-limit-s", "nan"], ["--hold-limit-s", "-1"]),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(["--model", "m", *wrong])


@pytest.mark.parametrize("flags", [["--kv-cache-tokens", str(10**13)], ["--device", "cuda:99"], ["--device", "gpu"]])
def test_what_the_machine_has_not_is_refused(folder, capsys, flags):
    assert main(["--model", str(folder), *flags]) == 2
    assert flags[0] in capsys.readouterr().err
