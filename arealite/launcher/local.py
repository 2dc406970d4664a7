"""`arealite run` on one machine: the run folder, the lock, starts and restarts, signals. Called by cli.py.

Exit codes: 0 all trainers are done; 1 a process failed (its first real error is printed); 2 refused before anything
started; 128 + n stopped by signal n.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arealite.api.cli_args import RunConfig
from arealite.api.errors import ConfigError
from arealite.api.load_config import load_run_config, to_yaml
from arealite.kernels import build
from arealite.launcher import children
from arealite.launcher.failures import RunFailed
from arealite.launcher.inspect import inspect, warnings
from arealite.launcher.machine import Machine
from arealite.launcher.plan import Plan, make_plan
from arealite.launcher.supervisor import StopRequested, StopSignals, Supervisor
from arealite.launcher.terminal import say
from arealite.observe import waits
from arealite.observe.claim import claim
from arealite.observe.run_folder import RunFolder

LOCK_LIMIT_S = 2.0  # for the kernel to take the lock from a launcher that was killed just now
LOCK_POLL_S = 0.05


def run(script: str, config_path: str, overrides: list[str]) -> int:
    """Run a training script with its servers; returns the exit code. Raises ConfigError, DatasetError."""
    if not Path(script).is_file():
        raise ConfigError(f"no training script {script!r}: expected a Python file")
    try:
        compile(Path(script).read_bytes(), script, "exec")
    except (SyntaxError, ValueError) as error:  # found here rather than when all servers are up
        raise ConfigError(f"{script} is no Python: {error}") from None
    config = load_run_config(config_path, overrides)
    model, rows = inspect(config, starts=True)
    machine = Machine.local(config.cluster)
    plan = make_plan(config, machine, model, [script, "--config", config_path, *overrides])
    if not machine.gpus:
        say(f"CPU: {build.expectation()}")
    for warning in warnings(config, rows):
        say(f"warning: {warning}")
    return launch(plan, config, RunFolder.of(config))


def launch(plan: Plan, config: RunConfig, folder: RunFolder) -> int:
    """Run a plan in `folder` to its end, with the restarts that `recover` allows; returns the exit code.

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
    with _exclusive(folder), StopSignals() as stop:
        claim(folder, config, "launcher")
        if left := children.kill_leftovers(folder):
            say(f"ended what an earlier launcher of this run left behind: {', '.join(left)}")
        for beat in folder.waits_dir.glob("*.json"):  # of processes that are gone; their numbers may be others' by now
            beat.unlink(missing_ok=True)
        folder.config_yaml.write_text(to_yaml(config))
        folder.plan_json.write_text(plan.as_json())
        waits.configure(folder.root, waits.LAUNCHER, config.watchdog.heartbeat_s, config.watchdog.stall_s)
        try:
            return _start_and_restart(plan, config, folder, stop)
        finally:
            waits.shut_down()


def _start_and_restart(plan: Plan, config: RunConfig, folder: RunFolder, stop: StopSignals) -> int:
    """Consumes: ends of starts. Produces: the exit code. Waits for: Supervisor.run. Unblocked by: its return."""
    recover = config.recover
    max_restarts = recover.max_restarts if recover.mode == "auto" else 0
    say(f"run folder {folder.root}: {', '.join(p.name for p in plan.processes)}")
    for attempt in itertools.count():
        try:
            Supervisor(plan, config, folder, attempt, stop).run()
            return 0
        except StopRequested as stopped:
            say(f"{stopped}; all processes have ended. The same command goes on {_last_point(folder)}")
            return 128 + stopped.number
        except RunFailed as failure:
            say(f"the run stopped: {failure}")
            if stop.first:
                return 128 + stop.first
            if not failure.may_restart:
                return 1
            if attempt >= max_restarts:
                say(f"no restart: recover.mode is {recover.mode}, recover.max_restarts {recover.max_restarts}")
                return 1
            say(f"restart {attempt + 1} of at most {max_restarts}, {_last_point(folder)}")
    raise AssertionError("unreachable: the loop returns")


def _last_point(folder: RunFolder) -> str:
    points = sorted(folder.recover_dir.glob("point_*"))
    return f"from recovery point {points[-1].name}" if points else "from the start: there is no recovery point yet"


@contextmanager
def _exclusive(folder: RunFolder) -> Iterator[None]:
    """Hold the run folder's lock; the kernel releases it when this process ends, however that happens."""
    end = time.monotonic() + LOCK_LIMIT_S
    with open(folder.root / "lock", "a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(LOCK_POLL_S)
                    continue
                lock.seek(0)
                raise ConfigError(
                    f"{folder.root} is in use by the launcher with pid {lock.read().strip()}: stop that one, or choose"
                    " another trial_name"
                ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
