"""A run for those who have nodes of their own, `launcher.type: print`: a job for Kubernetes, a task for SkyPilot, and
the command that every node runs, whoever starts it. Called by local.py.

Nodes need no shared folder to find the head: its place and the run's key are in their environment. Its port is fixed,
since a pod or a rented machine has all ports to itself.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from arealite.api.cli_args import RunConfig
from arealite.api.errors import ConfigError
from arealite.launcher.rendezvous import HEAD_VARIABLE, KEY_VARIABLE
from arealite.observe.processes import SLOT_VARIABLE
from arealite.observe.run_folder import RunFolder

HEAD_PORT = 29400
MAX_NAME = 50  # characters; Kubernetes adds the index of a pod
NEW_KEY = "$(openssl rand -hex 32)"


def print_plan(config: RunConfig, folder: RunFolder, words: Sequence[str]) -> str:
    """Write both files into the run folder; returns what to do with them, and with nodes of another kind. `words` are
    the head's. Raises ConfigError."""
    if config.cluster.num_gpus_per_node is None:
        raise ConfigError("launcher.type is print: say in cluster.num_gpus_per_node what the nodes have, 0 for CPUs")
    folder.create()
    name, gpus = name_of(config), f" --gpus KIND:{config.cluster.num_gpus_per_node}"
    written = {"kubernetes": yaml.safe_dump_all(kubernetes(config, words), sort_keys=False)}
    written |= {"skypilot": yaml.safe_dump(skypilot(config, words), sort_keys=False)}
    paths = {kind: folder.root / f"{kind}.yaml" for kind in written}
    for kind, text in written.items():
        paths[kind].write_text(text, encoding="utf-8")
    env = f"{HEAD_VARIABLE}=ADDRESS_OF_NODE_0:{HEAD_PORT} {KEY_VARIABLE}=KEY"
    by_hand = [f"{SLOT_VARIABLE}={slot} {env} {shlex.join(on_node(words))}" for slot in range(config.cluster.num_nodes)]
    return "\n".join([
        "# Kubernetes: set `image` to one with all that the script needs, and mount a volume for the run folder",
        f"kubectl create secret generic {name} --from-literal=key={NEW_KEY}",
        f"kubectl apply -f {shlex.quote(str(paths['kubernetes']))}",
        "# SkyPilot: add `setup` or `image_id` for arealite; this folder is copied to the nodes",
        f"sky launch {shlex.quote(str(paths['skypilot']))} --secret {KEY_VARIABLE}={NEW_KEY}"
        + gpus * bool(config.cluster.num_gpus_per_node),
        f"# Anything else: on the nodes, with one KEY={NEW_KEY} for all",
        *by_hand,
    ])  # fmt: skip


def on_node(words: Sequence[str]) -> list[str]:
    """What every node runs; on the first it becomes the head."""
    return ["python", "-m", "arealite.launcher.agent", "--", *words]


def name_of(config: RunConfig) -> str:
    """One that Kubernetes takes, of small letters, digits and dashes."""
    plain = re.sub(r"[^a-z0-9]+", "-", f"run-{config.experiment_name}-{config.trial_name}".lower())
    return plain[:MAX_NAME].strip("-")


def kubernetes(config: RunConfig, words: Sequence[str]) -> list[dict[str, Any]]:
    """A service without an address of its own, by which pods have names, and an Indexed Job with a pod for each node. A
    pod that is lost is made again; one that ends with an error ends the job."""
    name, cluster = name_of(config), config.cluster
    limits = {"nvidia.com/gpu": cluster.num_gpus_per_node, "cpu": cluster.num_cores_per_node}
    container = {
        "name": "node",
        "image": "your-image",
        "command": on_node(words),
        "env": [
            {"name": HEAD_VARIABLE, "value": f"{name}-0.{name}:{HEAD_PORT}"},
            {"name": KEY_VARIABLE, "valueFrom": {"secretKeyRef": {"name": name, "key": "key"}}},
        ],
        "resources": {"limits": {kind: count for kind, count in limits.items() if count}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    job = {
        "completionMode": "Indexed",
        "completions": cluster.num_nodes,
        "parallelism": cluster.num_nodes,
        "backoffLimitPerIndex": config.recover.max_restarts,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}}],
        },
        "template": {"spec": pod},
    }
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}}
    kinds = (("v1", "Service", service), ("batch/v1", "Job", job))
    return [{"apiVersion": api, "kind": kind, "metadata": {"name": name}, "spec": spec} for api, kind, spec in kinds]


def skypilot(config: RunConfig, words: Sequence[str]) -> dict[str, Any]:
    """A task on as many nodes; of which kind their GPUs are is said when it is launched."""
    head = f'export {HEAD_VARIABLE}="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{HEAD_PORT}"'
    cores = config.cluster.num_cores_per_node
    return {
        "name": name_of(config),
        "num_nodes": config.cluster.num_nodes,
        **({"resources": {"cpus": f"{cores}+"}} if cores else {}),
        "workdir": ".",
        "secrets": {KEY_VARIABLE: None},
        "run": f"{head}\nexec {shlex.join(on_node(words))}\n",
    }
