"""`arealite gateway` in front of a real server: agents' own packages, a kill, and what is on disk afterwards."""

import json
import os
import signal
import subprocess
import sys
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
    with LocalServer(served(tiny_llama)) as server:
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
        control("/sessions/done/reward", {"value": 1.0})
        control("/sessions/done/finish", {})
        gpt = openai.OpenAI(base_url=lost["base_url"] + "/v1", api_key=lost["key"], timeout=WAIT_S)
        gpt.chat.completions.create(model="any", messages=[USER])
        process.send_signal(signal.SIGKILL)
        process.wait(WAIT_S)
    lines = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [(line["id"], line["state"]) for line in lines] == [("done", "open"), ("lost", "open"), ("done", "finished")]
    trace = lines[-1]
    assert [turn["parent"] for turn in trace["turns"]] == [None, 0, None, None]
    assert trace["turns"][1]["answer"]["content"] == text and trace["rewards"] == {"outcome": 1.0}
    assert all(len(t["sampled_ids"]) == len(t["logprobs"]) == len(t["versions"]) for t in trace["turns"])
    with open(tmp_path / "sessions.jsonl", "a") as file:
        file.write('{"id": "torn", "sta')
    log = SessionLog(tmp_path)  # as at the next start
    assert log.num_lost == 1
    with pytest.raises(ConfigError, match="another gateway records there"):
        SessionLog(tmp_path)
    log.close()
    SessionLog(tmp_path).close()
    lines = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [(line["id"], line["state"]) for line in lines[3:]] == [("lost", "aborted")]
