"""`arealite gateway` in front of a real server: agents' own packages, a kill, and what is on disk afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import anthropic
import openai
import pytest
from support.gateway import ADMIN, WAIT_S
from support.inference import LocalServer, served

from arealite.api.errors import ConfigError
from arealite.gateway.gateway_command import SessionLog

USER = {"role": "user", "content": "Count to three."}


@pytest.fixture(scope="module")
def address(tiny_llama):
    with LocalServer(served(tiny_llama), kv_tokens=1536) as server:  # less than the model's own limit
        yield server.url.removeprefix("http://")


@contextmanager
def gateway(address, model, folder):
    """(process, first line that it prints, control(path, body))."""
    words = ["gateway", "--servers", address, "--model", model, "--folder", str(folder), "--max-new-tokens", "24"]
    env = {**os.environ, "AREALITE_ADMIN_API_KEY": ADMIN}
    command = [sys.executable, "-m", "arealite.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            line = process.stdout.readline()
            url = line.split()[2].rstrip(",")

            def control(path, body):
                headers = {"Authorization": f"Bearer {ADMIN}"}
                request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                    return json.loads(answer.read())

            yield process, line, control
        finally:
            process.kill()


def test_packages_of_agents_over_a_real_model_and_a_kill(address, tiny_llama, tmp_path):
    with gateway(address, tiny_llama, tmp_path) as (process, _, control):
        done, lost = control("/sessions", {"name": "done"}), control("/sessions", {"name": "lost"})
        gpt = openai.OpenAI(base_url=done["base_url"] + "/v1", api_key=done["key"], timeout=WAIT_S)
        claude = anthropic.Anthropic(base_url=done["base_url"], api_key=done["key"], timeout=WAIT_S)
        first = gpt.chat.completions.create(model="any", messages=[USER])
        assert 0 < first.usage.completion_tokens <= 24
        history = [USER, first.choices[0].message.model_dump(exclude_none=True), USER]
        stream = gpt.chat.completions.create(model="any", messages=history, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        with claude.messages.stream(model="any", max_tokens=8, messages=[USER]) as events:
            for _ in events:
                pass
            message = events.get_final_message()
        assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 8
        assert gpt.responses.create(model="any", input="Hi", max_output_tokens=8).status == "incomplete"
        control("/sessions/done/finish", {})
        control("/sessions/done/reward", {"value": 1.0})
        gpt = openai.OpenAI(base_url=lost["base_url"] + "/v1", api_key=lost["key"], timeout=WAIT_S)
        gpt.chat.completions.create(model="any", messages=[USER])
        process.send_signal(signal.SIGKILL)
        process.wait(WAIT_S)
    path = tmp_path / "sessions.jsonl"
    lines = records(path)
    assert [(line["id"], line["state"], "reward" in line) for line in lines] == [
        ("done", "open", False), ("lost", "open", False), ("done", "finished", False), ("done", "finished", True)
    ]  # fmt: skip
    trace = lines[2]
    assert [turn["parent"] for turn in trace["turns"]] == [None, 0, None, None]
    assert trace["turns"][1]["answer"]["content"] == text
    assert all(len(t["sampled_ids"]) == len(t["logprobs"]) == len(t["versions"]) for t in trace["turns"])
    assert done["key"] not in path.read_text() and lost["key"] not in path.read_text()
    with open(path, "a") as file:
        file.write('{"id": "torn", "sta')
    with gateway(address, tiny_llama, tmp_path) as (_, line, control):
        assert "1 sessions of a killed one are aborted" in line
        with pytest.raises(ConfigError, match="another gateway records there"):
            SessionLog(tmp_path)
        # What had ended waits for its reward, through any number of kills; what was open is told to be lost.
        control("/sessions/done/reward", {"value": 0.25, "turn": first.id, "name": "style"})
        assert asked("/sessions/lost/reward", {"value": 1.0}, control) == (
            410,
            "session lost is aborted: the gateway was killed",
        )
        for given in (done, lost):
            gpt = openai.OpenAI(base_url=line.split()[2].rstrip(",") + "/v1", api_key=given["key"], timeout=WAIT_S)
            with pytest.raises(openai.APIStatusError, match="ended") as refused:
                gpt.chat.completions.create(model="any", messages=[USER])
            assert refused.value.status_code == 410
    log = SessionLog(tmp_path)
    done = log.ended["done"].trace()
    assert log.num_lost == 0 and list(log.ended) == ["done", "lost"]
    assert (done["rewards"], done["turns"][0]["rewards"]) == ({"outcome": 1.0}, {"style": 0.25})
    log.close()
    assert [(line["id"], line["state"]) for line in records(path)[4:]] == [("lost", "aborted"), ("done", "finished")]
    path.write_text('{"id": "x"}\n')
    with pytest.raises(ConfigError, match="no record of a session from byte 0 on: KeyError.'started_at'"):
        SessionLog(tmp_path)


def test_the_context_is_what_the_servers_take(address, tiny_llama, tmp_path):
    with gateway(address, tiny_llama, tmp_path) as (_, _, control):
        made = control("/sessions", {})
        gpt = openai.OpenAI(base_url=made["base_url"] + "/v1", api_key=made["key"], timeout=WAIT_S)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 1536") as refused:
            gpt.completions.create(model="any", prompt=[5] * 1536)
        assert refused.value.code == "context_length_exceeded"
        assert gpt.completions.create(model="any", prompt=[5] * 1530).usage.completion_tokens <= 6


def test_a_signal_ends_it_while_it_waits_for_servers(tiny_llama, tmp_path, free_port):
    words = ["--servers", f"127.0.0.1:{free_port}", "--model", tiny_llama, "--folder", str(tmp_path), "--port", "0"]
    with subprocess.Popen([sys.executable, "-m", "arealite.cli", "gateway", *words]) as process:
        try:
            end = time.monotonic() + WAIT_S
            while not (tmp_path / "sessions.jsonl").exists():
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) in (128 + signal.SIGTERM, -signal.SIGTERM)
        finally:
            process.kill()


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(path, body, control):
    """Status and words of a control call that is refused."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        control(path, body)
    return refused.value.code, json.loads(refused.value.read())["error"]["message"]
