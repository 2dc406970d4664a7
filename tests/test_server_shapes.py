"""The built-in server on an accelerator without numbers: its steps, and tensors that stay on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 120


@pytest.fixture(scope="module")
def found():
    """By a process that has the accelerator."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "server_shapes.py")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_requests_run_to_their_end(found):
    lengths = [6, 6, 4]
    assert [len(tokens) for tokens, _ in found["answers"]] == lengths
    assert [reason for _, reason in found["answers"]] == [{"type": "length", "length": n} for n in lengths]
    assert found["decoded"] >= 2 * sum(n - 1 for n in lengths)  # of two layers, all but the first tokens


@pytest.mark.parametrize("left", ["places", "inputs", "sampler"])
def test_what_stays_on_the_cpu_is_found(found, left):
    assert "shapes" in found[left] and "cpu" in found[left]
