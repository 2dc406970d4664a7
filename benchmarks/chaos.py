"""Kill -9 of every role of a real run at random moments, in turn; then account for every sample.

    python benchmarks/chaos.py [--launcher local|slurm|ray|agents] [--kills 10] [--faults scancel,node,freeze]
        [--seed 0] [--steps 48] [--wall-minutes 2] [key=value ...]

local: the quickstart with SmolLM2-135M; trainer, server and launcher are killed. agents: on this machine too, with a
tiny random model and the programs of tests/support/agent_run.py, which leave daemons; a program is killed as well,
daemons are counted among the processes left, and so are rewards that no program has given. slurm and ray: the
quickstart with a tiny random model on two nodes of a real Slurm (slurmctld, slurmd) or two raylets, all of this
machine; trainer, server, head and agent are killed, and then each of --faults happens once: freeze (SIGSTOP to the
agent for 60 s), node (the agent's node is lost), on Slurm also scancel, requeue, and memory (a second run asks for
more than a node has). With --wall-minutes each of the jobs has that limit. The command is given again whenever it was
the victim or gave up, until the run is done. Ends with the audit of the ledger and one JSON line: faults, which of them
nobody named within 10 s, lives, samples trained exactly once,
violations, checkpoints lost, processes left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from surroundings import surroundings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.agent_run import daemons, programs, wrong_rewards  # noqa: E402
from support.ray_nodes import RayNodes  # noqa: E402
from support.runs import TINY, save_tiny_model  # noqa: E402
from support.slurm import SlurmNodes  # noqa: E402

from arealite.models.fetch import resolve_model  # noqa: E402
from arealite.observe.processes import Heartbeat, processes_of_run  # noqa: E402
from arealite.rollout.ledger import audit  # noqa: E402

NUM_PROMPTS = 8
LIMIT_S = 3600.0
NAMED_LIMIT_S = 10.0
FREEZE_S = 60.0
BACK_LIMIT_S = 180.0  # for a victim that is being started again
QUICKSTART = (
    "gconfig.n_samples=4", "recover.freq_steps=2", "recover.max_restarts=60", "saver.freq_steps=8",
    "saver.num_kept=null", "evaluator.freq_steps=null", f"train_dataset.batch_size={NUM_PROMPTS}",
)  # fmt: skip
NODES = ("cluster.num_nodes=2", "cluster.num_gpus_per_node=0", "launcher.node_silence_s=15")
JOB = ("launcher.type=slurm", "cluster.num_cores_per_node=2")
WARNING_S = 45  # before a wall limit of minutes
# What the terminal or the job's log says of each fault. A launcher that is killed cannot say so itself.
NAMED = {
    "trainer-0": r"trainer-0 .*(SIGKILL|is lost)", "server-0": r"server-0 .*(SIGKILL|is lost)",
    "head": r"Killed|the head was killed by SIGKILL", "agent": r"is lost",
    "scancel": r"CANCELLED|cancelled", "requeue": r"requeue|COMPLETING|PENDING|SIGTERM", "node": r"is lost|NODE_FAIL",
    "freeze": r"says nothing|is lost", "memory": r"Slurm refused the job.*[Mm]emory",
}  # fmt: skip


class Chaos:
    """One run in `root`, what was done to it, and what it said. `victims` are killed in turn."""

    victims = ("trainer-0", "server-0", "launcher")
    script, config, name = "examples/arealite/quickstart.py", "examples/arealite/quickstart.yaml", "quickstart/addition"
    words: tuple[str, ...] = ()

    def __init__(self, root: Path, args: argparse.Namespace) -> None:
        self.root, self.args = root, args
        self.run, self.log = root / self.name, root / "terminal"
        self.env: dict[str, str] = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.choose = random.Random(args.seed)
        self.done: list[str] = []
        self.unnamed: list[str] = []
        self.naming_s: dict[str, list[float]] = {}
        self.checkpoints: set[str] = set()
        self.lives = self.lost = 0
        self.shared_memory = set(os.listdir("/dev/shm"))

    def start(self) -> None:
        self.lives += 1
        self.launcher = self.command()

    def command(self, *others: str) -> subprocess.Popen[bytes]:
        """`arealite run`, given once more."""
        words = [
            sys.executable, "-m", "arealite.cli", "run", self.script, "--config", self.config,
            f"cluster.fileroot={self.root}", *self.words, *QUICKSTART,
            f"total_train_steps={self.args.steps}", *self.args.override, *others,
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            return subprocess.Popen(words, cwd=ROOT, env=self.env, stdout=log, stderr=log)

    def living(self) -> dict[str, int]:
        """Processes of the run by name, as they report themselves."""
        beats = map(Heartbeat.read, (self.run / "waits").glob("*.json"))
        found = {beat.process: beat.pid for beat in beats if beat is not None and psutil.pid_exists(beat.pid)}
        if self.victims != Chaos.victims and "launcher" in found:
            found["head"] = found["launcher"]
        for process in psutil.process_iter() if "server-0" in found else ():  # before, the agent need not have joined
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                words = process.cmdline()
                if words[1:3] == ["-m", "arealite.launcher.agent"] and self.is_own(words, process.environ()):
                    found["agent"] = process.pid
        return found

    def is_own(self, words: list[str], env: dict[str, str]) -> bool:
        """Whether an agent is one of this run."""
        key = json.loads((self.run / "rendezvous.json").read_text())["key"]
        return str(self.run) in words or env.get("AREALITE_RUN_KEY") == key

    def agent_variable(self, name: str) -> str:
        """Of the node that is not the head's. Raises LookupError: nobody is there now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.living()["agent"]).environ()[name]
        raise LookupError("agent")

    def kill(self, victim: str) -> None:
        """Waits for the victim to be there, which may be on its way back. Unblocked by: that, BACK_LIMIT_S, the end."""
        end = time.monotonic() + BACK_LIMIT_S
        while time.monotonic() < end and self.launcher.poll() is None:
            pid = self.launcher.pid if victim == "launcher" else self.living().get(victim)
            if pid is not None and psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.2)
        raise LookupError(victim)

    def freeze(self) -> None:
        """The agent's node stands still for a minute: its agent alone, as nobody else there could say anything."""
        agent = psutil.Process(self.living()["agent"])
        agent.suspend()

        def wake() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):  # its job was cancelled
                agent.resume()

        self.later = (time.monotonic() + FREEZE_S, wake)

    later: tuple[float, Callable[[], Any]] | None = None  # what ends a fault, and when

    def apply(self, name: str) -> bool:
        """Do it, and see whether it is named in time; False where there is nobody to do it to, as between two lives."""
        offset = self.log.stat().st_size
        try:
            {**dict.fromkeys(self.victims, self.kill), **self.others()}[name](name)
        except (LookupError, ProcessLookupError, psutil.NoSuchProcess):
            return False
        began = time.monotonic()
        self.done.append(name)
        print(f"--- {name} ({len(self.done)})", flush=True)
        pattern = NAMED.get(name)
        while pattern and not re.search(pattern, self.log.read_bytes()[offset:].decode(errors="replace")):
            if time.monotonic() - began > NAMED_LIMIT_S:
                self.unnamed.append(name)
                print(f"not named; said was:\n{self.log.read_text(errors='replace')[-3000:]}", flush=True)
                break
            time.sleep(0.1)
        self.naming_s.setdefault(name, []).append(round(time.monotonic() - began, 1))
        return True

    def others(self) -> dict[str, Callable[[str], Any]]:
        """Faults beside kills, by the words of --faults."""
        return {"freeze": lambda _: self.freeze()}

    def go(self) -> int:
        """To the end of the run, whatever happens to it; returns the exit code."""
        began, to_do = time.monotonic(), [self.victims[i % len(self.victims)] for i in range(self.args.kills)]
        to_do += list(filter(None, self.args.faults.split(",")))
        self.start()
        while (code := self.launcher.poll()) != 0:
            if time.monotonic() - began > LIMIT_S:
                self.launcher.terminate()
                print(f"not done within {LIMIT_S:.0f} s, after {self.done}", flush=True)
                return 1
            if code is not None:
                self.start()
            if self.later and time.monotonic() > self.later[0]:
                self.later[1]()
                self.later = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.launcher.wait(timeout=self.choose.uniform(*self.args.pause_s) if to_do else 1.0)
                continue
            if to_do and self.later is None and self.apply(to_do[0]):
                to_do.pop(0)
            present = {p.name for p in (self.run / "checkpoints").glob("step_*")}
            self.lost += len(self.checkpoints - present)
            self.checkpoints |= present
        return self.report(time.monotonic() - began)

    def report(self, wall_s: float) -> int:
        audited, num_expected = audit(self.run / "ledger.jsonl"), self.args.steps * NUM_PROMPTS
        summary = json.loads((self.run / "summary.json").read_text())
        num_trained = sum(state == "trained" for state in audited.states.values())
        end = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.2)
        figures = {
            "benchmark": "chaos", "launcher": self.args.launcher, "faults": len(self.done),
            "by_kind": {name: self.done.count(name) for name in dict.fromkeys(self.done)}, "unnamed": self.unnamed,
            "slowest_naming_s": {name: max(times) for name, times in self.naming_s.items()},
            "launcher_lives": self.lives, "requeues": self.requeues(),
            "samples_trained_once": num_trained, "samples_expected": num_expected,
            "violations": len(audited.violations), "checkpoints_lost": self.lost, "processes_left": len(left),
            "shared_memory_left": len(set(os.listdir("/dev/shm")) - self.shared_memory),
            "steps": summary["steps"], "wall_s": round(wall_s, 1), **self.rewards(), **surroundings(),
        }  # fmt: skip
        print(json.dumps(figures))
        is_wrong = audited.violations or self.lost or left or self.unnamed or figures.get("rewards_wrong")
        return int(bool(is_wrong) or num_trained != num_expected)

    def processes(self) -> list[int]:
        """What lives of the run."""
        return list(processes_of_run(self.run.resolve()))

    def rewards(self) -> dict[str, int]:
        """What is wrong with them, where that is known."""
        return {}

    def requeues(self) -> int:
        """Times that Slurm has queued a job again."""
        last = dict(re.findall(r"job (\d+): .*, after (\d+) requeues", self.log.read_text(errors="replace")))
        return sum(map(int, last.values()))


class OfAgents(Chaos):
    """On this machine, with programs as agents."""

    victims = ("trainer-0", "server-0", "program", "launcher")
    script, config, name = "tests/support/agent_run.py", "examples/arealite/black_box_agent.yaml", "agents/black_box"

    def living(self) -> dict[str, int]:
        found = super().living()
        running = programs(found["trainer-0"]) if "trainer-0" in found else []
        return found | ({"program": self.choose.choice(running)} if running else {})

    def processes(self) -> list[int]:
        return [*super().processes(), *daemons(str(self.root))]

    def rewards(self) -> dict[str, int]:
        return dict(zip(("sessions_failed", "rewards_wrong"), wrong_rewards(self.run), strict=True))


class OnSlurm(Chaos):
    """On two nodes of a real Slurm."""

    victims = ("trainer-0", "server-0", "head", "agent")
    nodes: SlurmNodes

    def others(self) -> dict[str, Callable[[str], Any]]:
        def job() -> str:
            return (self.run / "slurm_job").read_text()

        def lose_node(_: str) -> None:
            node = self.agent_variable("SLURMD_NODENAME")
            self.nodes.fail(node)
            self.later = (time.monotonic() + 30, lambda: self.nodes.start_node(node))

        def ask_for_memory(_: str) -> None:
            asking = self.command("trial_name=memory", "cluster.sbatch={mem: 900G}")
            if asking.wait(60) != 2:
                raise SystemExit(f"a run that asks for 900G ended with exit code {asking.returncode}")

        return {
            **super().others(),
            "scancel": lambda _: self.nodes("scancel", job()),
            "requeue": lambda _: self.nodes("scontrol", "requeue", job()),
            "node": lose_node,
            "memory": ask_for_memory,
        }


class OnRay(Chaos):
    """On two raylets."""

    victims = ("trainer-0", "server-0", "head", "agent")
    nodes: RayNodes

    def others(self) -> dict[str, Callable[[str], Any]]:
        def lose_node(_: str) -> None:
            index = int(self.agent_variable("AREALITE_ADDRESS").rpartition(".")[2]) - 2
            self.nodes.raylet(index).kill()
            self.later = (time.monotonic() + 10, lambda: self.nodes.start(index))

        return {**super().others(), "node": lose_node}


@contextlib.contextmanager
def chaos_of(args: argparse.Namespace) -> Iterator[Chaos]:
    """The run, with the nodes that it needs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        if args.launcher == "local":
            yield Chaos(root, args)
            return
        model = save_tiny_model(resolve_model("smollm2-135m"), root / "model")
        if args.launcher == "agents":
            with_agents = OfAgents(root, args)
            with_agents.words = (*TINY, f"actor.path={model}", "server.context_length=512", "valid_dataset=null")
            yield with_agents
            return
        nodes_dir = root / "nodes"
        nodes_dir.mkdir()
        kind = OnSlurm if args.launcher == "slurm" else OnRay
        chaos = kind(root, args)
        chaos.nodes = stack.enter_context(SlurmNodes(nodes_dir) if args.launcher == "slurm" else RayNodes())
        chaos.env |= (
            {**chaos.nodes.env, "AREALITE_ADDRESS": "127.0.0.2"} if args.launcher == "slurm" else chaos.nodes.env
        )
        limit = f", time: {args.wall_minutes}, signal: 'B:USR1@{WARNING_S}'" if args.wall_minutes else ""
        job = (*JOB, f"cluster.sbatch={{mem: 6G{limit}}}") if args.launcher == "slurm" else ("launcher.type=ray",)
        chaos.words = (*TINY, f"actor.path={model}", *NODES, *job)
        yield chaos


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", choices=("local", "slurm", "ray", "agents"), default="local")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--faults", default="", help="freeze, node; on Slurm also scancel, requeue, memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--wall-minutes", type=int, default=0, help="limit of each job of Slurm")
    parser.add_argument("--pause-s", type=float, nargs=2, default=(3.0, 45.0), help="between two kills, at random")
    parser.add_argument("override", nargs="*")
    with chaos_of(parser.parse_args()) as chaos:
        try:
            code = chaos.go()
        finally:
            if chaos.launcher.poll() is None:
                chaos.launcher.terminate()
                chaos.launcher.wait(60)
            if sys.exc_info()[0] or code:
                print(chaos.log.read_text(errors="replace")[-6000:])
    sys.exit(code)


if __name__ == "__main__":
    main()
