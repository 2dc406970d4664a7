"""`arealite prove` passes on a sound engine, on all layouts of two ranks, and fails where something is broken."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import ConfigError
from arealite.api.load_config import load_config_file
from arealite.api.types import Completion, Dims
from arealite.engine import determinism, recover
from arealite.engine.ppo import actor as actor_module
from arealite.gateway.asks import Ask
from arealite.gateway.forest import Turn
from arealite.prove import step as steps
from arealite.prove.command import Prover, engine, table
from arealite.prove.rollouts import check_rollouts
from arealite.prove.sessions import faults_of

CONFIG = "examples/arealite/quickstart.yaml"


@pytest.fixture
def config(tiny_llama, tmp_path, repository, monkeypatch):
    monkeypatch.chdir(repository)
    words = [f"actor.path={tiny_llama}", f"cluster.fileroot={tmp_path}", "actor.dtype=float32"]
    return load_config_file(CONFIG, words, GRPOConfig)


def test_a_sound_engine_passes_on_all_layouts_of_two_ranks(tiny_llama, tmp_path, repository):
    command = [sys.executable, "-m", "arealite.cli", "prove", CONFIG, "--quick", f"actor.path={tiny_llama}"]
    command += ["allocation_mode=native:d1+fsdp:d4", f"cluster.fileroot={tmp_path}", "--ranks", "2"]
    ran = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    findings = [
        steps.Finding(**f) for f in json.loads((tmp_path / "quickstart" / "addition" / "prove.json").read_text())
    ]
    by_check = {}
    for finding in findings:
        by_check.setdefault(finding.check, []).append(finding)
    assert {f.compared.partition(" ")[0]: f.outcome for f in by_check["layout"]} == {
        "d2": "pass", "d1t2": "pass", "d1c2": "pass", "d1p2": "pass", "d4": "skipped",
    }  # fmt: skip
    assert "--ranks 4" in by_check["layout"][0].reason and "--ranks 4" in ran.stdout
    assert "float32: logprobs absolute 0.0002, loss 1e-05" in ran.stdout  # the tolerances
    for check in (
        "micro-batches",
        "share_prompts",
        "packing order",
        "samples in rows",
        "gradient checkpointing",
        "Hugging Face",
    ):
        assert any(f.check.startswith(check) and f.outcome == "pass" for f in findings), check
    assert all(f.outcome == "pass" for f in by_check["resumed from a recovery point"])
    assert all(f.outcome == "pass" for f in by_check["same step twice, deterministic"])


def mean_per_micro_batch(monkeypatch):
    """The classic mistake: each micro-batch's own mean, instead of one over the whole mini-batch."""
    monkeypatch.setattr(
        actor_module,
        "token_weights",
        lambda sample_tokens, *_: torch.full((len(sample_tokens),), 1 / max(len(sample_tokens), 1)),
    )


def forgetful_resume(monkeypatch):
    load = recover.load_state

    def half_moments(path, parameters, optimizer, *args, **kwargs):
        counters = load(path, parameters, optimizer, *args, **kwargs)
        for moments in optimizer.state.values():
            moments["exp_avg"].mul_(0.5)
        return counters

    monkeypatch.setattr(recover, "load_state", half_moments)


@pytest.mark.parametrize(
    "broken, failing",
    [
        (mean_per_micro_batch, {"micro-batches", "packing order"}),
        (forgetful_resume, {"resumed from a recovery point"}),
    ],
)
def test_what_is_broken_on_purpose_fails(config, monkeypatch, broken, failing):
    broken(monkeypatch)
    findings = list(Prover(config, quick=True, ranks=1).findings())
    assert {f.check for f in findings if f.outcome == "FAIL"} == failing
    assert table(findings).row_count == len(findings)
    assert {f.compared for f in findings if f.check == "layout"} == {"d2", "d1t2", "d1c2", "d1p2"}  # too few ranks
    assert not torch.are_deterministic_algorithms_enabled()


def test_rollouts_without_staleness_are_the_same(config):
    prover = Prover(config)
    with engine(steps.proof_config(config.actor, "float32")) as actor:
        findings = check_rollouts(config, prover.tasks, prover.prompt, actor, prover.tokenizer)
    assert [f.outcome for f in findings] == ["pass"] * 6, findings
    sessions = [f for f in findings if f.check.startswith("sessions")]
    assert [f.worst in (steps.MISMATCH, "logprobs") for f in sessions] == [False, True] * 2


def test_a_session_that_is_not_what_the_server_saw_is_a_fault():
    completion = Completion([5, 6], [0.0, 0.0], [0, 0], "stop")
    turn = Turn(0, None, [1, 2], Ask(), "first", completion)
    session, witness = SimpleNamespace(id="s", turns={0: turn}), SimpleNamespace(seen={0: [1, 2, 5, 6]}, num_sampled=2)
    assert faults_of(session, witness) == []
    witness.seen[0], witness.num_sampled = [1, 3, 5, 6], 4
    assert [fault.partition(":")[2][:20] for fault in faults_of(session, witness)] == [
        " the row of turns (0",
        " of 4 sampled tokens",
    ]


def test_ranks_that_die_are_a_failure_with_their_error(config):
    prover = Prover(config)
    with engine(steps.proof_config(config.actor, "float32")) as actor:
        reference = steps.take_step(actor, steps.with_logprobs(prover.batch, actor, np.random.default_rng(0)))
    # As many as a model of 30 layers has: the ranks must get them all, to fail for the reason that is meant.
    reference.gradients |= {f"layer {i}": torch.zeros(1) for i in range(300)}
    broken = steps.replace(config.actor, max_tokens_per_mb=None)
    finding = steps.check_layout(broken, reference, Dims())
    assert finding.outcome == "FAIL" and "TypeError" in finding.reason and "rank 0" in finding.reason


def test_a_layout_that_is_refused_fails_if_it_is_the_users_own(config):
    config.allocation_mode = "native:d1+fsdp:p3"  # of 2 layers
    prover = Prover(config, quick=True, ranks=3)
    finding = next(prover._check_layouts(config.actor, steps.Step(prover.batch)))
    assert finding.outcome == "FAIL" and "layers" in finding.reason, finding


def test_candidates_and_judgement():
    every = [Dims(d=2, t=2), Dims(d=2), Dims(t=2), Dims(c=2), Dims(p=2), Dims(d=2, e=2)]
    assert steps.candidates(Dims(d=2, t=2), has_experts=True) == every
    assert steps.candidates(Dims(), has_experts=False) == every[1:-1]
    near, far = {"logprobs": (1e-4, 9.0)}, {"gradients": (0.0, float("nan"))}
    assert steps.judge("c", "x", near, "float32").outcome == "pass"
    found = steps.judge("c", "x", near | far, "bfloat16")
    assert (found.worst, found.outcome, found.compared) == ("gradients", "FAIL", "x, bfloat16")
    assert steps.judge("c", "x", {"weights": (1e-45, 0.0)}, "float32").outcome == "FAIL"


def test_distances_are_the_largest_and_relative_to_the_reference():
    mask = np.asarray([0.0, -2.0, -1.0], np.float32)
    gradients = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    reference = steps.Step(None, mask, loss=0.5, grad_norm=5.0, gradients=gradients, scale=2.0)
    step = steps.Step(None, np.asarray([0.0, -2.5, -1.1], np.float32), loss=0.4, grad_norm=4.0, scale=9.0)
    step.squared_distance, step.largest = 0.25, 0.4
    found = steps.distances(step, reference)
    expected = {"logprobs": (0.5, 0.25), "loss": (0.1, 0.05), "gradient norm": (1.0, 0.2), "gradients": (0.4, 0.1)}
    assert {name: pytest.approx(apart, rel=1e-5) for name, apart in expected.items()} == found
    assert steps.judge("c", "x", {"logprobs": (3e-4, 0.0)}, "float32").outcome == "FAIL"
    assert steps.judge("c", "x", {"loss": (1.0, 9e-6)}, "float32").outcome == "pass"


def test_determinism_is_refused_where_it_cannot_be(monkeypatch):
    monkeypatch.setenv(determinism.WORKSPACE_VARIABLE, ":0:0")
    with pytest.raises(ConfigError, match="cuBLAS"):
        determinism.be_deterministic()
    monkeypatch.delenv(determinism.WORKSPACE_VARIABLE)
    try:
        determinism.be_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        monkeypatch.delenv(determinism.WORKSPACE_VARIABLE)
