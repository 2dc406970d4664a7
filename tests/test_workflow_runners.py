"""What runs agents: what they are given, what becomes of their end, and that nothing of them is left, whoever dies."""

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from arealite.api.errors import ConfigError, RewardError
from arealite.api.types import Task
from arealite.launcher.child import kill_leftovers
from arealite.observe.run_folder import RunFolder
from arealite.workflow import warden
from arealite.workflow.runners import AgentCommand, AgentCoroutine, AgentFailed, AgentService, Assignment

PYTHON = [sys.executable, "-I", "-S", "-c"]
TASK = Task("e0-r3", messages=[{"role": "user", "content": "count {api_key} to 3"}], extras={"bonus": 2})


def assignment(base_url="http://127.0.0.1:1", limit_s=20.0):
    return Assignment(TASK, base_url, "key-1", "policy", "s1", limit_s)


def outcome(runner, **given):
    """(score, files of the workspace) of one agent, and that its folder is gone afterwards."""

    async def run():
        async with runner.run(assignment(**given)) as end:
            files = {}
            if end.workspace is not None:
                files = {path.name: path.read_text() for path in end.workspace.iterdir()}
        assert end.workspace is None or not end.workspace.parent.exists()
        return end.score, files

    try:
        return asyncio.run(run())
    finally:
        runner.close()


def is_gone(pid, limit_s=5.0):
    end = time.monotonic() + limit_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def returning(value):
    async def agent(task, base_url, api_key):
        assert (task, base_url, api_key) == (TASK, "http://127.0.0.1:1/v1", "key-1")
        if isinstance(value, Exception):
            raise value
        return value

    return AgentCoroutine(agent)


def test_the_result_of_a_coroutine_is_its_reward():
    assert outcome(returning(None)) == (None, {})
    assert outcome(returning(3))[0].reward == 3
    score = outcome(returning({"reward": 0.5, "speed": 2}))[0]
    assert (score.reward, score.parts) == (0.5, {"speed": 2.0})


@pytest.mark.parametrize(("value", "kind", "told"), [
    (KeyError("lost"), AgentFailed, "KeyError: 'lost'"), ("much", RewardError, "the agent returned reward = 'much'"),
    (RewardError("nobody knows"), RewardError, "nobody knows"),
])  # fmt: skip
def test_a_coroutine_that_fails_is_no_zero(value, kind, told):
    with pytest.raises(kind, match=told):
        outcome(returning(value))


def test_a_coroutine_that_waits_or_blocks_is_ended_and_others_are_not(monkeypatch):
    monkeypatch.setattr("arealite.observe.loop_thread.STOP_LIMIT_S", 0.3)

    async def waits(task, base_url, api_key):
        await asyncio.sleep(60)

    async def blocks(task, base_url, api_key):
        time.sleep(1)

    with pytest.raises(AgentFailed, match="no end within 0.1 s .gateway.session_timeout_s"):
        outcome(AgentCoroutine(waits), limit_s=0.1)
    started = time.monotonic()
    with pytest.raises(AgentFailed, match="blocks it: await what it waits for"):
        outcome(AgentCoroutine(blocks), limit_s=0.1)
    assert time.monotonic() - started < 0.9
    with pytest.raises(ConfigError, match="AgentCommand"):
        AgentCoroutine(lambda task, base_url, api_key: 1)


SHOW = "import json, os, sys; open('seen.json', 'w').write(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))"


def test_a_command_has_its_own_folder_and_only_what_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("AREALITE_SECRET", "xyzzy")
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "readme").write_text("hello")
    runner = AgentCommand(
        [*PYTHON, SHOW, "{prompt}", "{bonus} {none} {workspace}"], env={"URL": "{base_url}/x"}, files=tmp_path / "repo"
    )
    score, files = outcome(runner)
    words, env, folder = json.loads(files["seen.json"])
    assert score is None and files["readme"] == "hello"
    assert words == ["count {api_key} to 3", f"2 {{none}} {folder}"]  # what is filled in is not filled in again
    assert env["HOME"] == str(Path(folder).with_name("home")) and env["URL"] == "http://127.0.0.1:1/x"
    assert env["OPENAI_BASE_URL"] == "http://127.0.0.1:1/v1" and env["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:1"
    assert env["OPENAI_API_KEY"] == env["ANTHROPIC_API_KEY"] == "key-1"
    assert "AREALITE_SECRET" not in env and "PYTHONPATH" not in env and env["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(("program", "how", "reward"), [
    ("print('thinking'); print('{\"reward\": 0.25, \"part\": 1}')", "last_line", 0.25), ("print(7)", "last_line", 7.0),
    ("pass", "exit_code", 1.0), ("raise SystemExit(1)", "exit_code", 0.0), ("print(7)", None, None),
])  # fmt: skip
def test_the_reward_of_a_command(program, how, reward):
    score, _ = outcome(AgentCommand([*PYTHON, program], reward=how))
    assert (score and score.reward) == reward


@pytest.mark.parametrize(("program", "how", "kind", "told"), [
    ("raise SystemExit('no money left')", None, AgentFailed, "ended with exit code 1: no money left"),
    ("raise SystemExit(2)", "exit_code", AgentFailed, "ended with exit code 2"),
    ("import os; os.kill(os.getpid(), 9)", "exit_code", AgentFailed, "was killed by signal 9"),
    ("print('fine')", "last_line", RewardError, "the last line of the agent's output is 'fine'; expected a number"),
    ("pass", "last_line", RewardError, "is ''; expected"), ("print('[1]')", "last_line", RewardError, "a finite"),
    ("print('NaN')", "last_line", RewardError, "expected a finite number"),
    ("while True: print('x' * 9999)", None, AgentFailed, "more than 100000 bytes"),
    ("import sys\nwhile True: print('x' * 9999, file=sys.stderr)", None, AgentFailed, "more than 100000 bytes"),
])  # fmt: skip
def test_a_command_that_fails_is_no_zero(program, how, kind, told):
    with pytest.raises(kind, match=told):
        outcome(AgentCommand([*PYTHON, program], reward=how, max_output_bytes=100_000))


def test_a_command_that_is_not_there():
    with pytest.raises(AgentFailed, match="exit code 127: cannot start 'no-such-agent': .*No such file"):
        outcome(AgentCommand(["no-such-agent"]))
    with pytest.raises(ConfigError, match="the program first"):
        AgentCommand("claude -p hello")
    with pytest.raises(ConfigError, match="no folder"):
        AgentCommand(["x"], files=Path("nowhere"))


# A daemon: its parent is gone, its session and environment are its own, and it holds on to nothing but a file.
DAEMON = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve(sys.executable, ["daemon", "-I", "-S", "-c", '''
import os, signal, time
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
os.closerange(0, 3)
with open("PID_FILE", "w") as file: file.write(f"{os.getpid()}\\\\n")
time.sleep(1000)'''], {})
    os._exit(0)
while not (os.path.exists("PID_FILE") and open("PID_FILE").read().endswith("\\n")): time.sleep(0.01)
REST
"""


@pytest.mark.parametrize("rest", ["", "time.sleep(1000)", "while True: os.fork()"], ids=["ends", "hangs", "bomb"])
def test_nothing_that_a_command_started_outlives_it(tmp_path, rest):
    if "fork" in rest:
        rest = "for _ in range(7): os.fork()\ntime.sleep(1000)"  # 128 processes; a bomb without end is for a lock-up
    pid_file = tmp_path / "pid"
    runner = AgentCommand([*PYTHON, DAEMON.replace("PID_FILE", str(pid_file)).replace("REST", rest)])
    if rest:
        with pytest.raises(AgentFailed, match="no end within 1 s"):
            outcome(runner, limit_s=1.0)
    else:
        outcome(runner)
    assert is_gone(int(pid_file.read_text()), 0.0)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(pid_file) in str(p.info["cmdline"])]


HEAD = """
import asyncio, sys
from arealite.api.types import Task
from arealite.workflow import warden
from arealite.workflow.runners import AgentCommand, Assignment
async def main():
    runner = AgentCommand(["WORDS"], is_locked_up=LOCKED)
    async with runner.run(Assignment(Task("t", prompt="x"), "http://127.0.0.1:1", "k", "m", "s", 60.0)):
        pass
asyncio.run(main())
"""


def test_nothing_is_left_of_a_command_when_the_rollout_head_is_killed(tmp_path):
    """Also where the launcher at once kills all that it finds of the run, which must not be what ends the rest."""
    pid_file, folder = tmp_path / "pid", RunFolder(tmp_path / "run")
    agent = DAEMON.replace("PID_FILE", str(pid_file)).replace("REST", "time.sleep(1000)")
    program = HEAD.replace('["WORDS"]', repr([*PYTHON, agent])).replace("LOCKED", "False")
    marks = {"AREALITE_RUN_DIR": str(folder.root), "AREALITE_PROCESS": "trainer-0"}
    head = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **marks})
    try:
        end = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
            assert head.poll() is None and time.monotonic() < end
            time.sleep(0.02)
    finally:
        wardens = psutil.Process(head.pid).children()
        kill_leftovers(folder)
        head.kill()
        head.wait(10)
    assert len(list(folder.agents_dir.iterdir())) == 1  # its folder, which the next start removes
    assert is_gone(int(pid_file.read_text())) and all(is_gone(warden.pid) for warden in wardens)


def programs():
    """Words of all that this process and what it started have started, oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # they come and go
            found.append((process, process.cmdline()))
    return sorted(found, key=lambda each: each[0].create_time())


@pytest.mark.parametrize("which", [0, 1], ids=["outer", "inner"])
@pytest.mark.parametrize("is_locked_up", [False, True], ids=["plain", "locked up"])
def test_a_command_whose_warden_is_killed_has_failed_and_leaves_nothing(which, is_locked_up):
    agent = DAEMON.replace("PID_FILE", "pid").replace("REST", "time.sleep(1000)")
    runner = AgentCommand([*PYTHON, agent], is_locked_up=is_locked_up, reward="last_line")

    async def kill():
        while not any(words[:1] == ["daemon"] for _, words in programs()):
            await asyncio.sleep(0.02)
        wardens = [process for process, words in programs() if warden.__file__ in words]
        found = [wardens[0], *wardens[0].children(recursive=True)]
        wardens[which].kill()
        return found

    async def run():
        killing = asyncio.create_task(asyncio.wait_for(kill(), 20.0))
        with pytest.raises(AgentFailed, match="killed by signal 9|exit code -9"):
            async with runner.run(assignment()):
                pass
        return await killing

    left = asyncio.run(run())
    assert all(is_gone(process.pid) for process in left)


@asynccontextmanager
async def service(answer):
    """A server whose every route is `answer`; its address."""
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", answer)
    site = web.AppRunner(app, shutdown_timeout=0.1)
    await site.setup()
    try:
        await web.TCPSite(site, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{site.addresses[0][1]}"
    finally:
        await site.cleanup()


@pytest.mark.parametrize(("status", "body", "told"), [
    (200, '{"reward": 2, "part": 1}', 2.0), (200, "0.5", 0.5), (202, "", None), (200, "null", None),
    (500, "out of order", "answered 500: out of order"), (200, "well", "the answer of .* is 'well'; expected a number"),
    (200, "1" * (1 << 21), "more than 1048576 bytes"),
])  # fmt: skip
def test_a_service_elsewhere(status, body, told):
    asked = []

    async def answer(request):
        asked.append(await request.json())
        return web.Response(status=status, text=body)

    async def run():
        async with service(answer) as url, AgentService(f"{url}/run").run(assignment()) as end:
            return end.score

    if isinstance(told, str):
        with pytest.raises((AgentFailed, RewardError), match=told):
            asyncio.run(run())
    else:
        score = asyncio.run(run())
        assert (score and score.reward) == told
    assert asked[0]["task"]["id"] == "e0-r3" and asked[0]["api_key"] == "key-1" and asked[0]["session_id"] == "s1"


def test_a_service_that_is_silent_or_not_there():
    async def silent(request):
        await asyncio.sleep(60)

    async def run():
        async with service(silent) as url, AgentService(url).run(assignment(limit_s=0.2)):
            pass

    with pytest.raises(AgentFailed, match="agent.service"):
        asyncio.run(run())
    with pytest.raises(AgentFailed, match="127.0.0.1:1: ClientConnector"):
        outcome(AgentService("http://127.0.0.1:1"))


REACHES = """
import json, os, socket, sys, urllib.request
url = os.environ["OPENAI_BASE_URL"]
def asks(i):
    return urllib.request.urlopen(urllib.request.Request(url, b"x" * SIZE, {"n": str(i)}), timeout=10).read().decode()
seen = {"answers": [asks(i) for i in range(3)], "pids": [p for p in os.listdir("/proc") if p.isdigit()]}
seen["files"] = [path for path in PATHS if os.path.exists(path)]
seen["ports"] = []
for port in PORTS:
    try: socket.create_connection(("127.0.0.1", port), 1); seen["ports"].append(port)
    except OSError: pass
try: socket.create_connection(("192.0.2.1", 80), 1); seen["ports"].append("out")
except OSError: pass
import pwd; seen["user"] = [os.getuid() == 0, pwd.getpwuid(os.getuid()).pw_dir == os.environ["HOME"]]
open("seen.json", "w").write(json.dumps(seen))
"""


def test_a_locked_up_command_reaches_the_gateway_and_nothing_else(tmp_path):
    (tmp_path / "secret").write_text("xyzzy")
    shown = tmp_path / "shown"
    shown.write_text("for agents")

    async def answer(request):
        return web.Response(text=f"{request.headers['n']} {len(await request.read())}")

    async def run():
        async with service(answer) as url, service(answer) as other:
            program = REACHES.replace("PORTS", f"[{other.rpartition(':')[2]}]").replace("SIZE", str(1 << 20))
            program = program.replace("PATHS", repr([str(tmp_path / "secret"), str(shown), str(Path(__file__))]))
            runner = AgentCommand([sys.executable, "-c", program], is_locked_up=True, visible=[str(shown)])
            async with runner.run(assignment(url)) as end:
                return json.loads((end.workspace / "seen.json").read_text())

    seen = asyncio.run(run())
    assert seen["answers"] == [f"{i} {1 << 20}" for i in range(3)]
    assert seen["ports"] == [] and seen["files"] == [str(shown)] and len(seen["pids"]) <= 3
    assert seen["user"] == [False, True]


def test_a_fork_bomb_in_a_lock_up_holds_up_nobody():
    bomb = AgentCommand([*PYTHON, "import os\nwhile True:\n try: os.fork()\n except OSError: pass"], is_locked_up=True,
                        max_processes=64)  # fmt: skip
    plain = AgentCommand([*PYTHON, "print(1)"], reward="last_line", is_locked_up=True)

    async def ends(runner, limit_s):
        async with runner.run(assignment(limit_s=limit_s)) as end:
            return end.score

    async def run():
        return await asyncio.gather(ends(bomb, 2.0), *(ends(plain, 20.0) for _ in range(3)), return_exceptions=True)

    failed, *scores = asyncio.run(run())
    assert "no end within 2 s" in str(failed) and [str(s) for s in scores] == ["Score(reward=1.0, parts={})"] * 3
    assert not [p for p in psutil.process_iter(["cmdline"]) if "try: os.fork()" in str(p.info["cmdline"])]
