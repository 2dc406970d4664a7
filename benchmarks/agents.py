"""How long a run over many nodes takes to start and to end: agents on this machine, each with `sleep` processes.

python benchmarks/agents.py [--nodes 8 16 32 64] [--processes 4]

Ends with one JSON line: by number of nodes, seconds until all agents have joined, until all processes have been
started, and from the end of their work until all agents have gone; and what the run folder, which would be a shared
one, has to bear: files and folders opened, made, changed or removed until then, and in a second of the work. `growth`:
of each figure from the fewest nodes to the most, relative to that of the nodes; 1 is linear. Loopback addresses stand
for the nodes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from surroundings import surroundings

from arealite.api.cli_args import SFTConfig
from arealite.launcher.head import RunHead
from arealite.launcher.plan import Plan, ProcessPlan
from arealite.observe.run_folder import RunFolder

LIMIT_S = 300.0
WORK_S = 10.0
# inotify(7): opened, modified, attributes, created, moved, deleted.
OPERATIONS = 0x20 | 0x2 | 0x4 | 0x100 | 0xC0 | 0x200


class Operations:
    """Counts those on the files of a folder and its folders, whoever does them."""

    def __init__(self, root: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor, self._num = self._libc.inotify_init1(os.O_NONBLOCK), 0
        for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
            if self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), OPERATIONS) < 0:
                sys.exit(f"cannot watch {folder}: {os.strerror(ctypes.get_errno())}")

    def num(self) -> int:
        """So far. Look often: the kernel keeps 16,384 at most."""
        with suppress(BlockingIOError):
            while events := os.read(self._descriptor, 1 << 16):
                while events:
                    _, mask, _, length = struct.unpack_from("iIII", events)
                    events = events[16 + length :]
                    assert not mask & 0x4000, "the kernel has lost events"
                    self._num += 1
        return self._num

    def close(self) -> None:
        os.close(self._descriptor)


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
        for path in (folder.waits_dir, folder.logs_dir, folder.stacks_dir):
            path.mkdir()
        operations = Operations(folder.root)
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
        started_s, num_started = time.monotonic() - began, operations.num()
        end = time.monotonic() + WORK_S
        while time.monotonic() < end:
            operations.num()
            time.sleep(0.1)
        num_of_work, ending = operations.num() - num_started, time.monotonic()
        operations.close()
        for node in nodes:
            node.clean()
        head.close(0)
        for agent in agents:
            agent.wait(LIMIT_S)
        ended_s = time.monotonic() - ending
    figures = {"joined_s": joined_s, "started_s": started_s, "ended_s": ended_s}
    figures |= {"operations_until_started": num_started, "operations_per_s": num_of_work / WORK_S}
    return {name: round(figure, 2) for name, figure in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--processes", type=int, default=4, help="of each node")
    given = parser.parse_args()
    measured = {}
    for num_nodes in given.nodes:
        measured[num_nodes] = measure(num_nodes, given.processes)
        print(f"{num_nodes} nodes, {given.processes} processes each: {measured[num_nodes]}", file=sys.stderr)
    fewest, most = measured[given.nodes[0]], measured[given.nodes[-1]]
    ratio = given.nodes[-1] / given.nodes[0]
    growth = {name: round(most[name] / fewest[name] / ratio, 2) for name in most if fewest[name]}
    print(json.dumps({"agents": measured, "processes": given.processes, "growth": growth} | surroundings()))


if __name__ == "__main__":
    main()
