"""What Kubernetes, SkyPilot and others are given for a run."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from arealite.api.errors import ConfigError
from arealite.api.load_config import load_run_config
from arealite.launcher.print_plan import HEAD_PORT, name_of, print_plan
from arealite.observe.run_folder import RunFolder

CONFIG = "examples/arealite/quickstart.yaml"
NODES = ["launcher.type=print", "cluster.num_nodes=3", "cluster.num_gpus_per_node=8", "cluster.num_cores_per_node=64"]
WORDS = ["arealite", "run", "my script.py", "--config", "$(c).yaml", "gconfig.stop=['a\nb']", "launcher.type=local"]


def printed(tmp_path, *overrides):
    folder = RunFolder(tmp_path / "a run")
    said = print_plan(load_run_config(CONFIG, [*NODES, *overrides]), folder, WORDS)
    return said, *((folder.root / f"{kind}.yaml").read_text() for kind in ("kubernetes", "skypilot"))


def test_kubernetes_has_a_pod_for_each_node_that_finds_the_first(tmp_path):
    said, text, _ = printed(tmp_path)
    service, job = yaml.safe_load_all(text)
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    name = job["metadata"]["name"]
    assert (job["apiVersion"], job["kind"], service["kind"]) == ("batch/v1", "Job", "Service")
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 3
    assert pod["subdomain"] == service["metadata"]["name"] == service["spec"]["selector"]["job-name"] == name
    assert service["spec"]["clusterIP"] == "None" and pod["restartPolicy"] == "Never"
    env = {variable["name"]: variable for variable in container["env"]}
    assert env["AREALITE_HEAD"]["value"] == f"{name}-0.{name}:{HEAD_PORT}"
    assert env["AREALITE_RUN_KEY"]["valueFrom"]["secretKeyRef"] == {"name": name, "key": "key"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "cpu": 64}
    assert container["command"] == ["python", "-m", "arealite.launcher.agent", "--", *WORDS]
    assert f"kubectl create secret generic {name} " in said


def test_skypilot_runs_the_same_words_on_each_node(tmp_path):
    _, _, text = printed(tmp_path)
    task = yaml.safe_load(text)
    assert task["num_nodes"] == 3 and task["secrets"] == {"AREALITE_RUN_KEY": None}
    show = task["run"].replace("exec python", "printf '%s\\0' \"$AREALITE_HEAD\"")
    env = {**os.environ, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3"}
    ran = subprocess.run(["bash", "-c", show], env=env, capture_output=True, text=True, check=True)
    head, *words, _ = ran.stdout.split("\0")
    assert head == f"10.0.0.1:{HEAD_PORT}" and words == ["-m", "arealite.launcher.agent", "--", *WORDS]


def test_others_are_told_a_command_for_each_node(tmp_path):
    lines = [line for line in printed(tmp_path)[0].replace("a\nb", "a b").splitlines() if "AREALITE_SLOT=" in line]
    assert [shlex.split(line)[0] for line in lines] == [f"AREALITE_SLOT={slot}" for slot in range(3)]


@pytest.mark.parametrize("trial", ["x" * 99, "Ünï and $(rm)", "Ü-", "a_b.c"])
def test_names_are_those_that_kubernetes_takes(trial):
    name = name_of(load_run_config(CONFIG, [f"trial_name={trial!r}"]))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 50


def test_nodes_have_to_be_described(tmp_path):
    with pytest.raises(ConfigError, match="cluster.num_gpus_per_node"):
        printed(tmp_path, "cluster.num_gpus_per_node=null")


def test_the_command_prints_and_starts_nothing(tmp_path, tiny_llama):
    command = [
        sys.executable,
        "-m",
        "arealite.cli",
        "run",
        "examples/arealite/quickstart.py",
        "--config",
        CONFIG,
        *NODES,
    ]
    command += [f"cluster.fileroot={tmp_path}", f"actor.path={tiny_llama}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "kubectl apply" in ran.stdout and "sky launch" in ran.stdout
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["kubernetes.yaml", "skypilot.yaml"]
