"""Hostile programs in both kinds of sandbox: none is rewarded, none gets out, none takes longer than its limit."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from support.hostile import FUNCTIONS, QUICK, SLOW

from arealite.reward.code import grade
from arealite.reward.problems import CodeProblem
from arealite.reward.sandbox import ProcessLimits, Sandbox, SandboxError, best_kind

KINDS = ("bubblewrap", "landlock")
LIMITS = ProcessLimits(limit_s=3.0, memory_bytes=512 << 20, output_bytes=1 << 20, file_bytes=4 << 20)
SLACK_S = 12.0  # on a machine that does other things: without a limit these programs run for minutes


@pytest.fixture(scope="module", params=KINDS)
def sandbox(request):
    try:
        made = Sandbox(request.param)
    except SandboxError as error:
        pytest.skip(f"this machine has no sandbox of the kind {request.param}: {error}")
    with made:
        yield made


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """What programs must not get at: a file, processes, a port, a mailbox, an environment variable."""
    secret = secrets.token_hex(16)
    file = tmp_path_factory.mktemp("host") / "secret.txt"
    file.write_text(secret)
    os.environ["AREALITE_SECRET"] = secret
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    mailbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    mailbox.bind(f"\0{secret}-mailbox")
    with socket.create_server(("127.0.0.1", 0)) as server, mailbox, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(server.getsockname())
        udp.setblocking(False)
        server.setblocking(False)
        mailbox.setblocking(False)
        yield {
            "secret": secret, "secret_file": file, "victim": victim, "server": server, "port": server.getsockname()[1],
            "status": file.stat(), "mailbox": mailbox, "udp": udp, "cores": os.sched_getaffinity(0),
        }  # fmt: skip
    del os.environ["AREALITE_SECRET"]
    victim.kill()
    victim.wait()


def filled(program, host):
    known = {
        "secret_file": host["secret_file"],
        "victim": host["victim"].pid,
        "port": host["port"],
        "checker": os.getpid(),
        "mailbox": host["mailbox"].getsockname()[1:].decode(),
    }
    for name, value in known.items():
        program = program.replace(f"{{{name}}}", str(value))
    return program


def unharmed(host):
    assert host["victim"].poll() is None
    assert host["secret_file"].read_text() == host["secret"]
    status, before = host["secret_file"].stat(), host["status"]
    assert (status.st_mode, status.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert os.sched_getaffinity(0) == host["cores"]
    for receiver in (host["mailbox"], host["udp"]):
        with pytest.raises(BlockingIOError):
            receiver.recv(10)
    with pytest.raises(BlockingIOError):
        host["server"].accept()


def hostile(programs):
    return pytest.mark.parametrize("program", programs.values(), ids=[name.replace(" ", "_") for name in programs])


@hostile(QUICK)
def test_programs(sandbox, host, program):
    """The expected output is drawn after the program is written, so only the checker can leak it."""
    answer = str(secrets.randbelow(10**12) + 10**12)
    problem = CodeProblem("stdin", (("3 4\n", answer),), limits=LIMITS)
    start = time.monotonic()
    verdict = grade(problem, filled(program, host), sandbox)
    assert verdict.reason != "passed" and verdict.sandbox == sandbox.kind
    assert time.monotonic() - start < LIMITS.limit_s + SLACK_S
    assert host["secret"] not in verdict.told and answer not in verdict.told
    unharmed(host)
    assert (
        grade(CodeProblem("stdin", (("3 4\n", "7"),)), "print(sum(map(int, input().split())))", sandbox).reason
        == "passed"
    )


@hostile(SLOW)
def test_programs_that_do_not_end(sandbox, host, program):
    problem = CodeProblem("stdin", (("3 4\n", "7"),), limits=ProcessLimits(limit_s=0.5, memory_bytes=512 << 20))
    start = time.monotonic()
    verdict = grade(problem, program, sandbox)
    assert verdict.reason in ("timeout", "crash")
    assert time.monotonic() - start < 0.5 + SLACK_S
    assert grade(CodeProblem("stdin", (("", "1"),)), "print(1)", sandbox).reason == "passed"


CHECK = "def check(candidate):\n    assert candidate(5) == {0}\n    assert abs(candidate(5) - {0}) < 1\ncheck(f)"


@hostile(FUNCTIONS)
def test_functions(sandbox, host, program):
    answer, limits = secrets.randbelow(10**12) + 10**12, ProcessLimits(limit_s=1.5, memory_bytes=512 << 20)
    check = CodeProblem("check", ((CHECK.format(answer), "passed"),), "f", "def f(x):\n    pass\n", limits)
    for problem in (check, CodeProblem("call", (([5], answer),), "f", "", limits)):
        start = time.monotonic()
        verdict = grade(problem, program, sandbox)
        assert verdict.reason != "passed"
        assert str(answer) not in verdict.told or problem is check  # a check's own error may tell what it expected
        assert time.monotonic() - start < limits.limit_s + SLACK_S
    honest = CodeProblem("check", ((CHECK.format(9), "passed"),), "f", "def f(x):\n    pass\n", limits)
    assert grade(honest, "def f(x): return x + 4", sandbox).reason == "passed"


# What namespaces or a machine with one core would make harmless: the filter itself refuses it, in both kinds.
REFUSED = {
    "datagrams": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "sockets": "socket.socket()",
    "cores": "os.sched_setaffinity(0, os.sched_getaffinity(0))",
    "priority": "os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0))",
    "modes": "os.chmod('.', 0o700)",
    "times": "os.utime('.')",
    "processes": "os.fork()",
    "signals": "os.kill(os.getppid(), 0)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_filter_refuses(sandbox, name):
    program = f"import os, socket\ntry: {REFUSED[name]}\nexcept PermissionError: print('refused')"
    assert sandbox.run(program, b"", LIMITS).stdout == b"refused\n"


def test_there_are_as_many_as_we_say():
    assert len(QUICK) + len(SLOW) >= 120


def test_nothing_is_carried_over(sandbox):
    leave = "open('left', 'w').write('x')\nimport os\nos.environ['LEFT'] = 'x'\nimport json\njson.left = 1\nprint(1)"
    look = "import os, json\nprint(os.listdir('.'), 'LEFT' in os.environ, 'left' in vars(json))"
    assert sandbox.run(leave, b"", LIMITS).stdout == b"1\n"
    assert sandbox.run(look, b"", LIMITS).stdout == b"[] False False\n"


def test_scratch_threads_and_streams_work(sandbox):
    program = """
import sys, threading, random, heapq, decimal
with open("notes.txt", "w") as file:
    file.write("hello")
found = []
thread = threading.Thread(target=lambda: found.append(open("notes.txt").read()))
thread.start()
thread.join()
data = sys.stdin.buffer.read()
print(found, len(data), sys.stdin.isatty(), random.random() < 1)
sys.stderr.write("note")
"""
    ended = sandbox.run(program, b"x" * 3_000_000, LIMITS)
    assert (ended.stdout, ended.stderr, ended.code) == (b"['hello'] 3000000 False True\n", b"note", 0)


def test_a_program_that_reads_nothing_does_not_hold_up_a_long_input(sandbox):
    assert sandbox.run("print(1)", b"x" * 10_000_000, LIMITS).stdout == b"1\n"


WORKER = """
import sys, time
from arealite.reward.sandbox import ProcessLimits, Sandbox
sandbox = Sandbox(sys.argv[1])
print(sandbox._process.pid, sandbox._scratch, flush=True)
sandbox.run("import time\\nopen('x', 'w').write('x')\\ntime.sleep(600)", b"", ProcessLimits(limit_s=600))
"""


def test_nothing_is_left_when_the_worker_is_killed(sandbox, tmp_path):
    command = [sys.executable, "-c", WORKER, sandbox.kind]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as worker:
        pid, _ = worker.stdout.readline().split()
        inside = [psutil.Process(int(pid)), *psutil.Process(int(pid)).children(recursive=True)]
        time.sleep(0.3)
        worker.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(inside, timeout=10)
    assert not alive
    assert not any(tmp_path.iterdir()), list(tmp_path.iterdir())


def test_a_sandbox_that_is_killed_is_an_error_and_not_a_zero(sandbox):
    with Sandbox(sandbox.kind) as other:
        for process in [
            *psutil.Process(other._process.pid).children(recursive=True),
            psutil.Process(other._process.pid),
        ]:
            process.kill()
        with pytest.raises(SandboxError):
            grade(CodeProblem("stdin", (("", "1"),)), "print(1)", other)


def test_the_best_kind_is_one_that_works():
    assert best_kind() in KINDS


def test_no_sandbox_is_told_with_a_remedy(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match="bwrap cannot be started"):
        Sandbox("bubblewrap")
