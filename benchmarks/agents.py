"""How long a run over many nodes takes to start and to end: agents on this machine, each with `sleep` processes.

python benchmarks/agents.py [--nodes 8 16 32 64] [--processes 4]

Ends with one JSON line: by number of nodes, seconds until all agents have joined, until all processes have been
started, and from then until all agents have gone. Loopback addresses stand for the nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arealite.api.cli_args import SFTConfig
from arealite.launcher.head import RunHead
from arealite.launcher.plan import Plan, ProcessPlan
from arealite.observe.run_folder import RunFolder

LIMIT_S = 300.0


def until(condition, what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"no {what} within {LIMIT_S:g} s")
        time.sleep(0.01)


def measure(num_nodes: int, num_processes: int) -> dict[str, float]:
    """Seconds, of one run with its head in this process."""
    config = SFTConfig()
    config.cluster.num_nodes = num_nodes
    sleeps = ["sleep", str(LIMIT_S)]
    with tempfile.TemporaryDirectory() as root:
        folder, agents = RunFolder(Path(root)), []
        began = time.monotonic()
        os.environ["AREALITE_ADDRESS"] = "127.0.0.2"
        head = RunHead(config, folder, [])
        command = [sys.executable, "-m", "arealite.launcher.agent", "--run-folder", root]
        for slot in range(1, num_nodes):
            env = {"AREALITE_SLOT": str(slot), "AREALITE_ADDRESS": f"127.0.{slot // 200}.{slot % 200 + 3}"}
            agents.append(subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.DEVNULL))
        _, nodes = head.gather(lambda machines: Plan("", (), num_nodes=len(machines)))
        joined_s = time.monotonic() - began
        children = []
        for number, node in enumerate(nodes):
            for i in range(num_processes):
                process = ProcessPlan("trainer", number * num_processes + i, tuple(sleeps), node=number)
                children.append(node.start(process, "127.0.0.2", {}))
        until(lambda: all(child.pid for child in children), "processes")
        started_s = time.monotonic() - began
        for node in nodes:
            node.clean()
        head.close(0)
        for agent in agents:
            agent.wait(LIMIT_S)
        ended_s = time.monotonic() - began - started_s
    times = {"joined_s": joined_s, "started_s": started_s, "ended_s": ended_s}
    return {name: round(seconds, 2) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--processes", type=int, default=4, help="of each node")
    given = parser.parse_args()
    measured = {}
    for num_nodes in given.nodes:
        measured[num_nodes] = measure(num_nodes, given.processes)
        print(f"{num_nodes} nodes, {given.processes} processes each: {measured[num_nodes]}", file=sys.stderr)
    print(json.dumps({"agents": measured, "processes": given.processes}))


if __name__ == "__main__":
    main()
