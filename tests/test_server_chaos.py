"""The chaos benchmark in short: servers killed and frozen under load, every request answered once and the same."""

import json
import subprocess
import sys


def test_servers_killed_and_frozen_under_load(repository):
    command = [sys.executable, "benchmarks/server_chaos.py", "--seconds", "14", "--kill-every-s", "4"]
    command += ["--frozen-s", "7", "--requests", "16", "--tokens", "128", "--concurrency", "8"]
    ran = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures["killed"] >= 1 and figures["frozen"] == 1
    assert figures["num_server_failures"] >= 2 and figures["num_requests_moved"] >= 1
    assert figures["requests"] == figures["answered_once"] == figures["greedy_equal"] > 16
    assert figures["lost"] == figures["answered_twice"] == 0
