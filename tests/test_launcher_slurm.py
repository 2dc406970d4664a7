"""Runs as jobs of a real Slurm of three nodes, with a small program in the agents' place: script, states and faults."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import ConfigError
from arealite.launcher.slurm import SlurmJob, make_script, run_job
from arealite.observe.run_folder import RunFolder

PROGRAM = str(Path(__file__).parent / "support" / "node_program.py")
SLEEPING = [sys.executable, "-c", "import time; time.sleep(100)"]
POLL_S = 0.3
LIMIT_S = 240.0  # a job that is queued again waits two minutes in Slurm
HOSTILE = "a b'c\"d $(touch pwned) `touch pwned` %j ; & é"


def config_of(root, num_nodes=3, num_cores=4, **cluster):
    config = GRPOConfig(experiment_name="test", trial_name="trial")
    chosen = {"num_nodes": num_nodes, "num_cores_per_node": num_cores, "num_gpus_per_node": 0, "fileroot": str(root)}
    for name, value in (chosen | cluster).items():
        setattr(config.cluster, name, value)
    return config


@dataclass
class Followed:
    """A job with `num_steps` steps, followed in a thread of its own as the launcher follows it."""

    root: Path
    num_steps: int = 5
    name: str = "run"
    stops: list[int] = field(default_factory=list)
    exit_code: int | None = None

    def start(self, **cluster) -> "Followed":
        self.folder = RunFolder(self.root / self.name).create()
        words = [sys.executable, PROGRAM, str(self.folder.root), str(self.num_steps)]
        self.script = make_script(config_of(self.root, **cluster), self.folder, words, words)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def _run(self) -> None:
        self.exit_code = run_job(self.script, self.folder, self.stops, POLL_S)

    def wait(self) -> int | None:
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive(), self.text()
        return self.exit_code

    def text(self) -> str:
        return self.folder.slurm_log.read_text() if self.folder.slurm_log.exists() else ""

    def steps(self) -> list[str]:
        path = self.folder.root / "steps"
        return path.read_text().splitlines() if path.exists() else []

    def starts(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted((self.folder.root / "starts").glob("*.json"))]

    def job_id(self) -> str:
        return self.folder.slurm_job.read_text()

    def until_steps(self, num: int = 2) -> "Followed":
        end = time.monotonic() + LIMIT_S
        while len(self.steps()) < num:
            assert time.monotonic() < end and self.thread.is_alive(), f"no {num} steps; log:\n{self.text()}"
            time.sleep(0.05)
        return self


def test_a_job_starts_its_program_once_on_each_node_and_tells_its_exit_code(slurm, tmp_path, capfd):
    run = Followed(tmp_path).start()
    assert run.wait() == 0
    starts = run.starts()
    assert [(s["slot"], s["env"]["SLURMD_NODENAME"]) for s in starts] == [(0, "n1"), (1, "n2"), (2, "n3")]
    assert {s["cwd"] for s in starts} == {os.getcwd()}
    assert len(run.steps()) == 5
    out, err = capfd.readouterr()
    assert out.count("head: a step of attempt 0\n") == 5  # what the job says is shown
    assert f"submitted as job {run.job_id()}" in err and "RUNNING on n[1-3]" in err and "COMPLETED" in err

    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    assert run_job(make_script(config_of(tmp_path), run.folder, failing, SLEEPING), run.folder, [], POLL_S) == 3
    assert "FAILED" in (err := capfd.readouterr().err) and "exit code 3" in err


def test_what_a_user_writes_stays_inert(slurm, tmp_path, monkeypatch, capfd):
    """Names of folders, words with line breaks, and 200 variables with whatever in them arrive as they are."""
    variables = {f"OWN_{i}": f"{i}\nline two\t{HOSTILE}" for i in range(200)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    run = Followed(tmp_path, name=HOSTILE).start(sbatch={"comment": HOSTILE})
    assert run.wait() == 0, run.text()
    for start in run.starts():
        assert {name: start["env"].get(name) for name in variables} == variables
    assert len(run.starts()) == 3 and run.text().count("a step of") == 5
    words = [sys.executable, "-c", "import sys, time; print(sys.argv[1:], flush=True); time.sleep(3)", "a\nb", HOSTILE]
    assert run_job(make_script(config_of(tmp_path), run.folder, words, words), run.folder, [], POLL_S) == 0
    assert run.text().count(str(words[3:])) == 3
    assert not list(tmp_path.rglob("pwned"))


def scripts(tmp_path):
    folder, words = RunFolder(tmp_path / HOSTILE), ["python", "-m", "agent", "--run-folder", HOSTILE, "a\nb"]
    yield make_script(config_of(tmp_path, num_nodes=1), folder, words, words)
    yield make_script(config_of(tmp_path, num_cores=None, num_nodes=64, num_gpus_per_node=8), folder, words, words)
    own = {"partition": "gpu", "time": "04:00:00", "comment": HOSTILE, "requeue": False, "exclusive": True}
    mixed = config_of(
        tmp_path, num_nodes=5, sbatch=own, server_sbatch={"partition": "small"}, job_setup=["module load x"]
    )
    yield make_script(mixed, folder, words, words, num_server_nodes=3)


def test_a_script_is_short_and_clean(tmp_path):
    for number, script in enumerate(scripts(tmp_path)):
        assert len(script.replace("a\nb", "a b").splitlines()) <= 40
        (path := tmp_path / f"{number}.sh").write_text(script)
        subprocess.run(["bash", "-n", path], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--exclude=SC2016", path], check=True)
    first, second = script.split("#SBATCH hetjob")
    assert "--partition=gpu " in first and "--partition=small\n" in second and "--requeue" not in script
    assert (
        "--nodes=2 " in first
        and "--nodes=3 " in second
        and "--het-group=0 --relative=1 --nodes=1" in second
        and "--het-group=1 --nodes=3" in second
    )
    assert script.index("module load x") < script.index("srun")


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        ({"num_gpus_per_node": None}, "cluster.num_gpus_per_node is missing"),
        ({"sbatch": {"nodes": 3}}, "'nodes' follows from other fields"),
        ({"sbatch": {"-p": "gpu"}}, "'-p' is no long name"),
        ({"sbatch": {"x=1 --wrap": "ls"}}, "'x=1 --wrap' is no long name"),
        ({"sbatch": {"partition": ["a", "b"]}}, "expected one line"),
        ({"sbatch": {"comment": "a\n#SBATCH --array=0-9"}}, "expected one line"),
    ],
)
def test_options_that_cannot_be_are_refused(cluster, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        make_script(config_of(tmp_path, **cluster), RunFolder(tmp_path), ["true"], ["true"])


def test_what_slurm_refuses_is_told_in_its_own_words(slurm, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    script = make_script(config_of(tmp_path, sbatch={"mem": "900G"}), folder, ["true"], ["true"])
    with pytest.raises(ConfigError, match="(?s)Slurm refused the job.*[Mm]emory.*cluster.sbatch"):
        run_job(script, folder, [])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch here"):
        run_job(script, folder, [])


def test_a_stop_lets_the_step_end_and_a_second_one_cancels(slurm, tmp_path, capfd):
    run = Followed(tmp_path, num_steps=1000).start().until_steps()
    run.stops.append(2)
    assert run.wait() == 130
    assert "head: SIGTERM" in run.text() and "ends after this step" in capfd.readouterr().err
    assert slurm("squeue", "-h") == ""

    deaf = [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)",
    ]
    stops: list[int] = []
    script = make_script(config_of(tmp_path), run.folder, deaf, deaf)
    begin = len(run.text())

    def ask_twice() -> None:
        slurm.until(lambda: run.text().count("deaf", begin) == 3, "start")
        stops.append(2)
        time.sleep(1)
        stops.append(2)

    asking = threading.Thread(target=ask_twice)
    asking.start()
    assert run_job(script, run.folder, stops, POLL_S) == 130
    asking.join()


def test_a_job_in_the_queue_says_why_it_waits_and_can_be_cancelled(slurm, tmp_path, capfd):
    blocker = slurm("sbatch", "--parsable", "--exclusive", "--nodes=3", "--output=none", "--wrap=sleep 60")
    run = Followed(tmp_path).start()
    said = ""

    def is_told() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return reason in said

    reason = "PENDING (Resources)"
    slurm.until(is_told, "reason")
    slurm("scontrol", "update", "nodename=n3", "state=drain", "reason=its fan is loud")
    reason = "PENDING (Resources); of its partition's nodes are not to be had: n3 is draining (its fan is loud)"
    slurm.until(is_told, "name of the node", 10)
    slurm("scontrol", "update", "nodename=n3", "state=resume")
    # The same command once more follows this job, and submits no second.
    again = threading.Thread(target=run_job, args=(run.script, run.folder, [], POLL_S), daemon=True)
    again.start()
    run.stops.append(15)
    assert run.wait() == 143 and run.starts() == []
    again.join(LIMIT_S)
    assert len(slurm("squeue", "-h", "-o", "%i").splitlines()) == 1
    slurm("scancel", blocker)


def test_a_job_that_is_queued_again_goes_on_in_its_log(slurm, tmp_path, capfd):
    run = Followed(tmp_path, num_steps=12).start().until_steps()
    slurm("scontrol", "requeue", run.job_id())
    assert run.wait() == 0
    assert {s["attempt"] for s in run.starts()} == {0, 1}
    assert "step of attempt 0" in run.text() and "step of attempt 1" in run.text() and len(run.steps()) == 12
    assert "after 1 requeues" in capfd.readouterr().err


def test_the_wall_limit_is_warned_of_and_the_job_goes_on_by_itself(slurm, tmp_path):
    run = Followed(tmp_path, num_steps=200).start(sbatch={"time": 1, "signal": "B:USR1@20"})
    assert run.wait() == 0
    assert "head: SIGUSR2" in run.text() and len(run.steps()) == 200
    assert {s["attempt"] for s in run.starts()} >= {0, 1}


def test_a_killed_head_or_agent_is_started_again_in_its_allocation(slurm, tmp_path):
    run = Followed(tmp_path, num_steps=40).start().until_steps()
    os.kill(*[s["pid"] for s in run.starts() if s["slot"] == 0], 9)
    run.until_steps(15)
    os.kill(*[s["pid"] for s in run.starts() if s["slot"] == 2], 9)
    assert run.wait() == 0 and len(run.steps()) == 40
    # One agent's end ends the other, which comes back too.
    assert [(s["attempt"], s["slot"]) for s in run.starts()] == [(0, slot) for slot in (0, 0, 1, 1, 2, 2)]


def test_a_node_that_fails_ends_nothing_on_the_others(slurm, tmp_path):
    run = Followed(tmp_path, num_steps=220).start().until_steps()
    slurm.fail("n2")
    slurm.until(lambda: slurm.states()["n2"].startswith("down"), "loss of n2")
    assert {p.environ()["SLURMD_NODENAME"] for p in slurm.processes() if p.name() == "python"} == {"n1", "n3"}
    assert run.wait() == 0, run.text()
    assert len(run.steps()) == 220 and len(run.starts()) == 3


def test_the_first_node_fails_and_an_agent_has_the_job_queued_again(slurm, tmp_path):
    """Nothing of the job's script is left then, and Slurm keeps the job for the other nodes."""
    run = Followed(tmp_path, num_steps=40).start().until_steps()
    slurm.fail("n1")
    slurm.until(lambda: slurm.states()["n1"].startswith("down"), "loss of n1")
    slurm.start_node("n1")
    (run.folder.root / "no_head").touch()  # agents see that themselves, in time
    assert run.wait() == 0
    assert {s["attempt"] for s in run.starts()} == {0, 1} and len(run.steps()) == 40


def test_programs_of_slurm_that_fail_for_a_while_change_nothing(slurm, tmp_path, monkeypatch, capfd):
    """No accounting; then neither controller nor queue answers, three times each."""
    assert subprocess.run(["sacct", "-n", "-j", "1"], env=slurm.env, capture_output=True).returncode != 0
    for name in ("scontrol", "squeue"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        real = shutil.which(name, path=slurm.env["PATH"])
        program.write_text(
            f'#!/bin/sh\necho . >> "$0.calls"\n[ "$(wc -l < "$0.calls")" -gt 3 ] || exit 1\nexec {real} "$@"\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{slurm.env['PATH']}")
    run = Followed(tmp_path, num_steps=15).start()
    assert run.wait() == 0
    assert (tmp_path / "bin" / "squeue.calls").read_text().count(".") == 3


def test_a_job_that_nobody_knows_is_given_up_with_a_sentence(slurm, tmp_path, capfd):
    job = SlurmJob(RunFolder(tmp_path), "4000000")
    assert job.state() is None and job.follow([], poll_s=0.1, silence_s=1) == 1
    assert "has not known job 4000000 for 1 s" in capfd.readouterr().err


def test_two_runs_share_the_nodes(slurm, tmp_path):
    runs = [Followed(tmp_path, name=name, num_steps=40).start(num_cores=3, sbatch={"mem": "1G"}) for name in ("a", "b")]
    for run in runs:
        run.until_steps()
    runs[0].stops.append(2)
    assert [run.wait() for run in runs] == [130, 0]
    assert len(runs[1].steps()) == 40


def test_nodes_of_two_kinds_are_one_job(slurm, tmp_path):
    """Trainers on two with GPUs, servers on one with fewer; slots count through both."""
    run = Followed(tmp_path)
    run.folder = RunFolder(tmp_path / "run").create()
    config = config_of(tmp_path, num_gpus_per_node=2, server_sbatch={"gpus-per-node": 1})
    words = [sys.executable, PROGRAM, str(run.folder.root), "10"]
    script = make_script(config, run.folder, words, words, num_server_nodes=1)
    assert run_job(script, run.folder, [], POLL_S) == 0
    starts = run.starts()
    assert [(s["slot"], s["env"]["CUDA_VISIBLE_DEVICES"]) for s in starts] == [(0, "0,1"), (1, "0,1"), (2, "0")]
    assert {s["env"]["SLURMD_NODENAME"] for s in starts} == {"n1", "n2", "n3"}
