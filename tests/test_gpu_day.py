"""The script for a day with a card, on a machine without one: its checks start and give a line each."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 280


def test_each_check_gives_a_line_and_none_ends_the_others(tmp_path):
    only = "environment,quickstart,decode"  # of which the second is given what no configuration has
    words = ["--device", "cpu", "--only", only, "--overrides", "no_such_key=1", "--out", str(tmp_path)]
    script = [sys.executable, "benchmarks/gpu_day.py", *words]
    ran = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    lines = [json.loads(line) for line in (tmp_path / "gpu_day.jsonl").read_text().splitlines()]
    found = {line["check"]: line for line in lines}
    assert list(found) == only.split(","), ran.stderr
    assert found["environment"]["ok"] and found["environment"]["torch"]
    assert not found["quickstart"]["ok"] and found["quickstart"]["error"]
    assert "no_such_key" in ran.stdout  # the end of what failed
    assert found["decode"]["ok"] and found["decode"]["results"][0]["tokens_per_s"] > 0
    assert json.loads(ran.stdout.splitlines()[-1]) == {"passed": 2, "of": 3}
