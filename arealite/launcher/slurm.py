"""A run as a Slurm job: its script, and the job as seen from outside, from sbatch to its end. Called by local.py for
`launcher.type: slurm`.

The script runs the head on the job's first node and starts an agent on each other one, nothing else. Slurm's warning
before the wall limit becomes STOP_SIGNAL for the head; after its exit code EXIT_GO_ON the job is queued again under its
id, by an agent when the first node is gone. A head or agent that a signal has ended is started again, a few times.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arealite.api.atomic import write_text
from arealite.api.cli_args import ClusterSpecConfig, RunConfig
from arealite.api.errors import ConfigError, listed
from arealite.launcher.agent import EXIT_GO_ON, EXIT_NO_HEAD, STOP_SIGNAL
from arealite.launcher.child import STDOUT, say, write
from arealite.launcher.plan import Plan
from arealite.observe.run_folder import RunFolder

WARNING_S = 300  # before the wall limit, for a step and a recovery point; Slurm may warn a minute earlier
POLL_S = 5.0  # between two questions to Slurm, which serves many
TICK_S = 0.2
COMMAND_LIMIT_S = 60.0
SILENCE_S = 900.0  # for which Slurm may say nothing of a job, as when its controller is moved
MAX_COPIED_BYTES = 1 << 16
MAX_LINE = 100
# The states that are an end; all others, unknown ones too, are not.
ENDINGS = {
    **dict.fromkeys(("COMPLETED", "FAILED", "REVOKED", "DEADLINE", "BOOT_FAIL"), ""),
    "CANCELLED": "somebody cancelled it",
    "TIMEOUT": "no recovery point could be written after Slurm's warning; one N seconds ahead of the wall limit:"
    " cluster.sbatch.signal=B:USR1@N",
    "NODE_FAIL": "a node failed, and Slurm has not queued it again",
    "OUT_OF_MEMORY": "the memory that Slurm grants ran out: see cluster.sbatch.mem, and MEMORY in `arealite check`",
    "PREEMPTED": "another job took its place, and Slurm has not queued it again",
}
UNPLAIN = re.compile(r"[^A-Za-z0-9._+-]+")
FIELDS = re.compile(r"(?:^| )(JobState|Reason|Restarts|ExitCode|NodeList|Partition)=(\S*)")
OPTION = re.compile(r"[a-z][a-z-]+")
OWN_OPTIONS = {"array", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "wrap"}
KEPT_VARIABLES = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}  # others may be those of a job that this shell is in

SCRIPT = """#!/bin/bash
{options}
# Written and submitted by `arealite run`: the head of {name} and, on the other nodes, its agents.
{setup}head=
trap 'kill -{warning} "$head"' USR1  # the wall limit is near: a recovery point, and exit code {go_on}
trap 'kill -TERM "$head"' TERM
{agents}for _ in 1 2 3 4; do
  {head} &
  head=$!
  while kill -0 "$head" 2> /dev/null; do wait "$head"; done
  wait "$head"; code=$?
  case "$code" in 134 | 135 | 137 | 139) ;; *) break ;; esac
done
jobs -p | xargs -r kill 2> /dev/null
[ "$code" -ne {go_on} ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
"""
AGENTS = """agents() {{  # FIRST_SLOT OPTIONS_OF_SRUN...
  for _ in 1 2 3 4; do
    srun "${{@:2}}" --ntasks-per-node=1 --cpu-bind=none --overlap --export=ALL --wait=0 --no-kill \\
      --kill-on-bad-exit=1 bash -c 'trap : TERM; AREALITE_SLOT=$((SLURM_NODEID + $0)) "$@"; code=$?
      [ "$code" -ne {no_head} ] || scontrol requeue "$SLURM_JOB_ID"; exit "$code"' "$1" \\
      {agent}
    [ "$?" -gt 128 ] || break
  done
}}
{calls}"""


def job_script(config: RunConfig, folder: RunFolder, plan: Plan, command: Sequence[str]) -> str:
    """The batch script of `arealite run` with `command`: its words from the training script on. Raises ConfigError."""
    head = [sys.executable, "-m", "arealite.cli", "run", *command, "launcher.type=local"]
    agent = [sys.executable, "-m", "arealite.launcher.agent", "--run-folder", str(folder.root)]
    num_trainer_nodes = 1 + max(p.node for p in plan.trainers)  # the first ones
    return make_script(config, folder, head, agent, config.cluster.num_nodes - num_trainer_nodes)


def make_script(
    config: RunConfig, folder: RunFolder, head: Sequence[str], agent: Sequence[str], num_server_nodes: int = 0
) -> str:
    """A script that runs the words of a head, once, and of an agent, on each other node. With `cluster.server_sbatch`
    the last `num_server_nodes`, which have no trainer, are nodes of another kind. Raises ConfigError."""
    cluster, name = config.cluster, UNPLAIN.sub("_", f"{config.experiment_name}.{config.trial_name}")
    num_others = num_server_nodes if cluster.server_sbatch is not None else 0
    num_nodes = cluster.num_nodes - num_others
    options = {
        "job-name": name,
        "output": str(folder.slurm_log).replace("%", "%%"),
        "open-mode": "append",  # a job that is queued again goes on in its log
        "requeue": True,
        "no-kill": True,  # when a node fails the others stay, and the head decides
        "signal": f"B:USR1@{WARNING_S}",
        **node_options(cluster, num_nodes),
    }
    lines, calls = directives(options, "cluster.sbatch", cluster.sbatch), ""
    if num_nodes > 1:
        of_group, num = "--het-group=0 " if num_others else "", num_nodes - 1
        calls += f"agents 1 {of_group}--relative=1 --nodes={num} --ntasks={num} &\n"
    if num_others:
        own = directives(node_options(cluster, num_others), "cluster.server_sbatch", cluster.server_sbatch or {})
        lines += f"\n#SBATCH hetjob\n{own}"
        calls += f"agents {num_nodes} --het-group=1 --nodes={num_others} --ntasks={num_others} &\n"
    return SCRIPT.format(
        options=lines,
        name=name,
        setup="".join(f"{line}\n" for line in cluster.job_setup),
        warning=STOP_SIGNAL.name.removeprefix("SIG"),
        go_on=EXIT_GO_ON,
        agents=AGENTS.format(no_head=EXIT_NO_HEAD, agent=shlex.join(agent), calls=calls) if calls else "",
        head=shlex.join(head),
    )


def node_options(cluster: ClusterSpecConfig, num_nodes: int) -> dict[str, Any]:
    """What is asked for of nodes of one kind: whole ones, if the number of cores is not given."""
    if cluster.num_gpus_per_node is None:
        raise ConfigError(
            "cluster.num_gpus_per_node is missing: this machine need not be like the nodes of the job, so say what"
            " those have; 0 for runs on CPUs"
        )
    cores, gpus = cluster.num_cores_per_node, cluster.num_gpus_per_node
    share = {"exclusive": True, "mem": 0} if cores is None else {"cpus-per-task": cores}
    return {"nodes": num_nodes, "ntasks-per-node": 1, "gpus-per-node": gpus or False, **share}


def directives(options: Mapping[str, Any], key: str, own: Mapping[str, Any]) -> str:
    """Lines of #SBATCH, in which Slurm takes quotes as a shell does: of options, and those of a user in their place.
    Raises ConfigError for the latter where they follow from other fields, and for what no line can hold."""
    named = {name.replace("_", "-"): value for name, value in own.items()}
    if wrong := [name for name in named if not OPTION.fullmatch(name) or name in OWN_OPTIONS]:
        why = "follows from other fields" if wrong[0] in OWN_OPTIONS else "is no long name of an option of sbatch"
        raise ConfigError(f"{key}: {wrong[0]!r} {why}: remove it")
    lines = ["#SBATCH"]
    for name, value in {**options, **named}.items():
        if isinstance(value, list | dict) or not str(value).isprintable() or "\\" in str(value):
            raise ConfigError(f"Slurm cannot be given --{name}={value!r}: expected one line, without a backslash")
        if value is not False and value is not None:
            word = f" --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")
            lines += [] if len(lines[-1] + word) < MAX_LINE else ["#SBATCH"]
            lines[-1] += word
    return "\n".join(lines)


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job: its word for the state, why it waits, and the exit status of its script; `lacking`:
    nodes that it might have had, and why not."""

    word: str
    reason: str = ""
    nodes: str = ""
    exit_code: int = 0
    num_restarts: int = 0
    lacking: tuple[str, ...] = ()

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason not in ("", "None") else ""
        why += f"; of its partition's nodes are not to be had: {listed(list(self.lacking))}" if self.lacking else ""
        where = f" on {self.nodes}" if self.word == "RUNNING" else why
        return self.word + where + (f", after {self.num_restarts} requeues" if self.num_restarts else "")


def answer(*words: str) -> str:
    """What one of Slurm's programs prints; empty where it fails, is missing, or says nothing within its limit."""
    try:
        ran = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


@dataclass(frozen=True)
class SlurmJob:
    """A job of the run in `folder`, by its id."""

    folder: RunFolder
    id: str

    @classmethod
    def submit(cls, script: str, folder: RunFolder) -> SlurmJob:
        """Hand the script to sbatch. Raises ConfigError when Slurm refuses it."""
        folder.logs_dir.mkdir(parents=True, exist_ok=True)  # Slurm does not make it for the log
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in KEPT_VARIABLES}
        try:
            ran = subprocess.run(
                ["sbatch", "--parsable"], input=script, env=env, capture_output=True, text=True, timeout=COMMAND_LIMIT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"no sbatch here ({error}): run this where Slurm is, as on a login node") from None
        if ran.returncode != 0:
            raise ConfigError(f"Slurm refused the job: {ran.stderr.strip()}\nIts options: cluster.sbatch")
        job = cls(folder, ran.stdout.strip().split(";")[0])  # its cluster may follow
        write_text(folder.slurm_job, job.id)
        return job

    def state(self) -> JobState | None:
        """By the controller, else its queue, else accounting. None: nobody knows it, which may pass."""
        if shown := answer("scontrol", "show", "job", "-o", self.id):
            told = dict(reversed(FIELDS.findall(shown.splitlines()[0])))
            code, number = map(int, told["ExitCode"].split(":"))
            code = 128 + number if number else code
            state = JobState(told["JobState"], told["Reason"], told["NodeList"], code, int(told["Restarts"]))
            if state.word == "PENDING":  # those that have failed, or are drained by somebody
                asked = ("-p", told["Partition"], "-t", "down,drain,fail,no_respond", "-o", "%N is %T (%E)")
                lines = answer("sinfo", "-h", "-N", *asked).replace("*", " and does not answer").splitlines()
                state = replace(state, lacking=tuple(dict.fromkeys(lines)))
            return state
        if queued := answer("squeue", "-h", "-o", "%T|%r|%N", "-j", self.id):
            word, reason, nodes = queued.splitlines()[0].split("|")
            return JobState(word, reason, nodes)
        if counted := answer("sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", self.id):
            word, status = counted.splitlines()[-1].split("|")
            return JobState(word.split()[0], exit_code=int(status.split(":")[0]))
        return None

    def follow(self, stops: list[int], offset: int = 0, poll_s: float = POLL_S, silence_s: float = SILENCE_S) -> int:
        """Show the job's log from `offset` on, and its states, until it has ended; returns its exit code. At the first
        signal in `stops` the run ends after its step, at the second at once.

        Consumes: answers of Slurm, the log, signals. Produces: the terminal's view. Waits for: the job's end, which may
        be days away. Unblocked by: that, or nothing heard of it for `silence_s`.
        """
        word = shown = ""
        num_stops, due, heard = 0, 0.0, time.monotonic()
        while True:
            offset += self._echo(offset)
            if signal.SIGHUP in stops or len(stops) > 2:
                say(f"job {self.id} is not followed any more; the same command follows it again")
                return 128 + stops[-1]
            if len(stops) > num_stops:
                num_stops, due = len(stops), 0.0
                gently = num_stops == 1 and word == "RUNNING"  # as at Ctrl-C without Slurm
                say(f"job {self.id}: " + ("ends after this step; asked once more, at once" if gently else "cancelled"))
                answer("scancel", *(["--batch", "--signal=TERM"] if gently else []), self.id)
            if (now := time.monotonic()) < due:
                time.sleep(TICK_S)
                continue
            due, state = now + poll_s, self.state()
            if state is not None:
                heard, word = now, state.word
                if str(state) != shown:
                    shown = str(state)
                    say(f"job {self.id}: {shown}")
                if word in ENDINGS:
                    return self._ended(state, offset, stops)
            elif now - heard > silence_s:
                say(f"Slurm has not known job {self.id} for {now - heard:.0f} s; the same command asks again")
                return 1

    def _echo(self, offset: int) -> int:
        """Copy to stdout what the log has gained; returns how many bytes."""
        try:
            with open(self.folder.slurm_log, "rb") as log:
                log.seek(offset)
                return write(STDOUT, log.read(MAX_COPIED_BYTES), TICK_S)
        except FileNotFoundError:  # it is in the queue, or this machine sees the shared folder late
            return 0

    def _ended(self, state: JobState, offset: int, stops: list[int]) -> int:
        while num_bytes := self._echo(offset):
            offset += num_bytes
        if state.word == "COMPLETED":
            return 0
        why = "as asked" if stops else ENDINGS[state.word] or f"exit code {state.exit_code}"
        say(f"job {self.id} has ended: {why}. Its log is {self.folder.slurm_log}; the same command goes on")
        return 128 + stops[0] if stops else state.exit_code or 1


def run_job(script: str, folder: RunFolder, stops: list[int], poll_s: float = POLL_S) -> int:
    """Submit the script of a run and follow the job to its end; one that is not over is followed instead of a second.
    Returns the exit code. Raises ConfigError."""
    offset = folder.slurm_log.stat().st_size if folder.slurm_log.exists() else 0
    job = SlurmJob(folder, folder.slurm_job.read_text()) if folder.slurm_job.exists() else None
    state = None if job is None else job.state()
    if job is None or state is None or state.word in ENDINGS:
        job = SlurmJob.submit(script, folder)
        say(f"submitted as job {job.id}; Ctrl-C ends it. Its log is {folder.slurm_log}")
    else:
        say(f"job {job.id} of this run is followed")
    return job.follow(stops, offset, poll_s)
