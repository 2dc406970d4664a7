"""`arealite run`: the run folder, its lock, the nodes, starts and restarts, signals. Called by cli.py.

Exit codes: 0 all trainers are done; 1 a process failed (its first real error is printed); 2 refused before anything
started; 85 stopped by SIGUSR2 (1 without a new recovery point), or too few nodes are left: the same command goes on, on
others; 128 + n stopped by signal n. With `launcher.type: slurm` all of this happens in a job, submitted and followed.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from arealite.api.atomic import write_json
from arealite.api.cli_args import RunConfig
from arealite.api.errors import ConfigError
from arealite.api.load_config import load_run_config, to_yaml
from arealite.kernels import build
from arealite.launcher.agent import STOP_SIGNALS
from arealite.launcher.check import inspect, warnings
from arealite.launcher.child import kill_leftovers, say
from arealite.launcher.head import NodesMissing, RunHead
from arealite.launcher.machine import Machine
from arealite.launcher.plan import Plan, make_plan
from arealite.launcher.print_plan import print_plan
from arealite.launcher.ray_cluster import run_on_ray
from arealite.launcher.slurm import job_script, run_job
from arealite.launcher.supervisor import EXIT_GO_ON, RunFailed, StopRequested, Supervisor, note_state
from arealite.observe import waits
from arealite.observe.claim import claim
from arealite.observe.processes import Heartbeat
from arealite.observe.run_folder import RunFolder

Planned = Callable[[Sequence[Machine]], Plan]  # the processes of a run on these nodes

LOCK_LIMIT_S = 2.0  # for the kernel to take the lock from a launcher that was killed just now


def run(script: str, config_path: str, overrides: list[str]) -> int:
    """Run a training script with its servers; returns the exit code. Raises ConfigError, DatasetError."""
    if not Path(script).is_file():
        raise ConfigError(f"no training script {script!r}: expected a Python file")
    try:
        compile(Path(script).read_bytes(), script, "exec")
    except (SyntaxError, ValueError) as error:  # found here rather than when all servers are up
        raise ConfigError(f"{script} is no Python: {error}") from None
    config = load_run_config(config_path, overrides)
    command = [script, "--config", config_path, *overrides]
    of_head = ["run", *command, "launcher.type=local"]
    if config.launcher.type == "ray":
        with stop_signals() as stops:
            return run_on_ray(config, RunFolder.of(config), ["-m", "arealite.cli", *of_head], stops)
    model, rows = inspect(config, starts=config.launcher.type != "print")
    is_job = config.launcher.type == "slurm"
    is_here = config.launcher.type == "local"  # else the nodes are others
    machine = Machine.local(config.cluster) if is_here else Machine.described(config.cluster)

    def plan(machines: Sequence[Machine]) -> Plan:
        return make_plan(config, machines, model, command)

    expected = plan([machine] * config.cluster.num_nodes)  # refused before anything starts
    for warning in warnings(config, rows):
        say(f"warning: {warning}")
    if is_job:
        with stop_signals() as stops:
            return run_job(job_script(config, RunFolder.of(config), expected, command), RunFolder.of(config), stops)
    if config.launcher.type == "print":
        print(print_plan(config, RunFolder.of(config), ["arealite", *of_head]))
        return 0
    if not machine.gpus:
        say(f"CPU: {build.expectation()}")
    return launch(plan, config, RunFolder.of(config))


def launch(plan: Planned, config: RunConfig, folder: RunFolder) -> int:
    """Run in `folder` what `plan` makes of the nodes, to its end, with the restarts that `recover` allows; returns the
    exit code.

    Call from the main thread. Raises ConfigError when the folder is in use, RecoveryError when it is another run's.
    """
    try:
        folder = RunFolder(folder.root.resolve()).create()  # one name: leftovers are known by it
        folder.config_yaml.touch()
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder.root} cannot be written ({error.strerror}): set cluster.fileroot to a place that"
            " can"
        ) from None
    with exclusive(folder), stop_signals() as stops:
        claim(folder, config, "launcher")
        if left := kill_leftovers(folder):
            say(f"ended what an earlier launcher of this run left behind: {', '.join(left)}")
        folder.config_yaml.write_text(to_yaml(config))
        waits.configure(folder.root, waits.LAUNCHER, config.watchdog.heartbeat_s, config.watchdog.stall_s)
        code, why, head = 1, "the launcher has failed, as its own output says", None
        try:
            note_state(folder, "running", folder.num_attempts(), "its nodes come together")
            head = RunHead(config, folder, stops)
            code, why = start_and_restart(plan, config, folder, head, stops)
            return code
        finally:
            note_state(folder, "failed" if code else "finished", folder.num_attempts(), why)
            if head is not None:
                head.close(code)
            waits.shut_down()


def start_and_restart(
    plan: Planned, config: RunConfig, folder: RunFolder, head: RunHead, stops: list[int]
) -> tuple[int, str]:
    """Consumes: ends of starts. Produces: the exit code, and why it is not 0. Waits for: nodes, Supervisor.run.
    Unblocked by: their return."""
    recover = config.recover
    max_restarts = recover.max_restarts if recover.mode == "auto" else 0
    say(f"run folder {folder.root}{head.invitation}")
    began = last_point(folder)
    for num_restarts in itertools.count(1):
        try:
            made, nodes = head.gather(plan)
            write_json(folder.plan_json, asdict(made))
            say(", ".join(p.name if len(nodes) == 1 else f"{p.name} on {nodes[p.node].name}" for p in made.processes))
            Supervisor(made, config, folder, nodes, stops).run()
            return 0, ""
        except StopRequested as stopped:
            say(f"{stopped}; all processes have ended. The same command goes on {last_point(folder)}")
            if stopped.exit_code == EXIT_GO_ON and last_point(folder) == began:  # a job would be queued without end
                return 1, f"{stopped}, before a recovery point was written: give the run more time, or shorter steps"
            return stopped.exit_code, str(stopped)
        except RunFailed as failure:
            say(f"the run stopped: {failure}")
            if stops:
                return StopRequested(stops[0]).exit_code, str(failure)
            if not failure.may_restart:
                return EXIT_GO_ON if isinstance(failure, NodesMissing) else 1, str(failure)
            if num_restarts > max_restarts:
                say(f"no restart: recover.mode is {recover.mode}, recover.max_restarts {recover.max_restarts}")
                return 1, str(failure)
            say(f"restart {num_restarts} of at most {max_restarts}, {last_point(folder)}")
    raise AssertionError("unreachable: the loop returns")


def last_point(folder: RunFolder) -> str:
    points = sorted(folder.recover_dir.glob("point_*"))
    return f"from recovery point {points[-1].name}" if points else "from the start: there is no recovery point yet"


@contextmanager
def exclusive(folder: RunFolder) -> Iterator[None]:
    """Hold the run folder's lock; the kernel releases it when this process ends, however that happens."""
    try:
        with FileLock(folder.root / "lock", timeout=LOCK_LIMIT_S):
            yield
    except Timeout:
        beat = Heartbeat.read(folder.waits_dir / f"{waits.LAUNCHER}.json")
        raise ConfigError(
            f"{folder.root} is in use by the launcher with pid {beat.pid if beat else 'unknown'}: stop that one, or"
            " choose another trial_name"
        ) from None


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The numbers of the stop signals that come in while the block runs."""
    numbers: list[int] = []
    earlier = {
        number: signal.signal(number, lambda number, _: numbers.append(number))
        for number in STOP_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup
    }
    try:
        yield numbers
    finally:
        for number, action in earlier.items():
            signal.signal(number, action)
