"""Keys: what each opens, how they are given, and that nothing shows them; built-in servers and their client."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
from support import forks
from support.inference import WAIT_S, LocalServer, save_tiny_llama, served
from support.rollout import Clients, one, quick_config
from test_rollout_updates import versions_of_weights

from arealite.api.errors import ConfigError
from arealite.api.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, Keys, is_exposed
from arealite.inference.http.control import ControlRoutes
from arealite.rollout.backends.vllm import VLLMBackend
from arealite.rollout.client import RemoteNativeEngine, RemoteSGLangEngine
from arealite.weights.link import WeightLink, verify

API, ADMIN = "api-key-of-the-test", "admin-key-of-the-test"
BOTH = ["--api-key", API, "--admin-api-key", ADMIN]
PAUSING = ["/pause_generation", "/continue_generation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


def status(url: str, authorization: str | None, body: dict | None = None) -> tuple[int, str]:
    headers = {"Authorization": authorization} if authorization is not None else {}
    raw = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, raw, headers), timeout=WAIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        assert error.code != 401 or error.headers["WWW-Authenticate"] == "Bearer"
        return error.code, error.read().decode()


def test_each_key_opens_what_it_is_for(folder):
    with LocalServer(served(folder), keys=Keys(API, ADMIN)) as server:
        control = [route.path for route in ControlRoutes(server.engine).routes()] + PAUSING
        assert len(control) > 12 and "/update_weights_from_disk" in control and "/load_lora_adapter" in control
        num_refused = 0
        for path in control:
            for shown in (None, "", f"Bearer {API}", f"Basic {ADMIN}", f"Bearer {ADMIN}x", "Bearer", ADMIN):
                code, text = status(server.url + path, shown, {})
                assert code == 401 and "--admin-api-key" in json.loads(text)["error"]["message"], (path, shown, text)
                num_refused += 1
            assert status(server.url + path, f"bearer {ADMIN}", {})[0] != 401, path
        generate = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
        gets = ("/model_info", "/server_info", "/metrics", "/v1/models", "/nowhere")
        for path, body in (("/generate", generate), *((path, None) for path in gets)):
            for shown in (None, "Bearer wrong"):
                code, text = status(server.url + path, shown, body)
                assert code == 401 and "--api-key" in json.loads(text)["error_message"]
                num_refused += 1
            for key in (API, ADMIN):
                assert status(server.url + path, f"Bearer {key}", body)[0] == (404 if path == "/nowhere" else 200)
        assert status(server.url + "/health", None)[0] == 200
        assert status(server.url + "/abort_request", f"Bearer {API}", {"rid": "one-of-mine"})[0] == 200
        for shown in (None, f"Bearer {API}"):
            assert status(server.url + "/abort_request", shown, {"abort_all": True})[0] == 401
            num_refused += 1
        assert status(server.url + "/abort_request", f"Bearer {ADMIN}", {"abort_all": True})[0] == 200
        assert (
            f'num_unauthorized_reqs{{model_name="tiny"}} {float(num_refused)}'
            in status(server.url + "/metrics", f"Bearer {API}")[1]
        )


@pytest.mark.parametrize(
    "path", ["//pause_generation", "/pause%5Fgeneration", "/pause_generation/", "/./pause_generation"]
)
def test_no_spelling_of_a_path_goes_around_the_key(path, folder):
    with LocalServer(served(folder), keys=Keys(API, ADMIN)) as server:
        assert status(server.url + path, f"Bearer {API}", {})[0] in (401, 404)
        assert not server.engine.paused


def test_one_key_alone(folder):
    with LocalServer(served(folder), keys=Keys(api=API)) as server:  # on loopback, it opens control too
        assert status(server.url + "/flush_cache", f"Bearer {API}", {})[0] == 200
        assert status(server.url + "/flush_cache", None, {})[0] == 401
    with LocalServer(served(folder), keys=Keys(admin=ADMIN)) as server:
        assert status(server.url + "/model_info", None)[0] == 401
        assert status(server.url + "/model_info", f"Bearer {ADMIN}")[0] == 200


def test_a_server_that_others_can_reach_has_keys_that_nothing_shows(folder):
    """In `ps`, in what it tells of itself, and in its output."""
    command = [
        sys.executable,
        "-m",
        "arealite.cli",
        "serve",
        "--model",
        str(folder),
        "--port",
        "0",
        "--host",
        "0.0.0.0",
    ]
    env = {k: v for k, v in os.environ.items() if k not in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE)}
    began = time.monotonic()
    refused = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, env=env, check=False)
    assert refused.returncode == 2 and API_KEY_VARIABLE in refused.stderr and "--host 127.0.0.1" in refused.stderr
    print(f"refused after {time.monotonic() - began:.1f} s")
    flags = ["--api-key", API]  # the admin key is there to none, then
    with subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as process:
        try:
            assert process.stdout is not None
            lines = []
            while not (lines and lines[-1].startswith("listening on")):
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            shown = Path(f"/proc/{process.pid}/cmdline").read_text()
            assert API not in shown and "--api-key" in shown and str(folder) in shown
            url = f"http://127.0.0.1:{lines[-1].strip().rpartition(':')[2]}"
            assert API not in "".join(lines) + status(url + "/server_info", f"Bearer {API}")[1]
            assert status(url + "/pause_generation", f"Bearer {API}", {})[0] == 401
            client = openai.OpenAI(base_url=url + "/v1", api_key=API, max_retries=0, timeout=WAIT_S)
            answer = client.completions.create(
                model=str(folder), prompt="a", max_tokens=3, extra_body={"ignore_eos": True}
            )
            assert answer.usage is not None and answer.usage.completion_tokens == 3
            with pytest.raises(openai.AuthenticationError, match="Bearer"):
                client.with_options(api_key="another").models.list()
        finally:
            process.terminate()


@pytest.mark.parametrize(
    "host, exposed",
    [("127.0.0.1", False), ("127.0.0.9", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("::", True),
     ("8.8.8.8", True), ("no.such.host.invalid", True)],
)  # fmt: skip
def test_which_addresses_others_can_reach(host, exposed):
    assert is_exposed(host) == exposed


def test_a_key_that_no_header_can_hold_is_refused_without_being_told(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "a secret\n")
    with pytest.raises(ConfigError, match=API_KEY_VARIABLE) as raised:
        Keys.from_env()
    assert "secret" not in str(raised.value) and "secret" not in repr(Keys("secret", "secret"))


def test_the_client_shows_its_keys(folder, tmp_path, monkeypatch):
    """Requests, pauses, updates by two links; and what is said when they are missing or wrong."""
    with forks.servers(1, str(folder), *BOTH) as [(_, address)]:

        def connect(api: str, admin: str) -> RemoteNativeEngine:
            monkeypatch.setenv(API_KEY_VARIABLE, api)
            monkeypatch.setenv(ADMIN_KEY_VARIABLE, admin)
            engine = RemoteNativeEngine(quick_config())
            engine.initialize(addresses=[address])
            return engine

        for wrong in (("", ""), (API, ""), (API, "wrong")):
            with pytest.raises(ConfigError, match=ADMIN_KEY_VARIABLE):
                connect(*wrong)
        engine, weights = connect(API, ADMIN), versions_of_weights(str(folder))
        try:
            engine.pause()
            engine.resume()
            for version, kind in enumerate(("disk", "distributed"), 1):
                link = WeightLink(kind, tmp_path)
                meta = link.publish(next(weights), version)
                verify(meta, engine.update_weights(meta, link))
                link.close()
            assert set(one(engine, ignore_eos=True).versions) == {2}
        finally:
            engine.destroy()


def test_sglang_is_shown_the_admin_key_for_control_alone(tmp_path, monkeypatch):
    """It takes no other key for either; vLLM has one key only."""
    monkeypatch.setenv(API_KEY_VARIABLE, API)
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, ADMIN)
    with Clients() as connect:
        server, engine = connect(1, RemoteSGLangEngine)
        engine.pause()
        engine.resume()
        one(engine)
        engine.load_adapter("a", str(tmp_path))
    key_of = {path: shown.removeprefix("Bearer ") for path, shown in server.shown.items()}
    assert {path for path, key in key_of.items() if key == ADMIN} == {*PAUSING, "/load_lora_adapter"}
    assert {"/generate", "/health", "/server_info"} <= {path for path, key in key_of.items() if key == API}
    assert {*key_of.values()} == {API, ADMIN}
    assert not VLLMBackend().pause_call("abort").is_control
    assert not VLLMBackend().lora_call("a", "folder").is_control
