"""Graders of mathematics side by side on tests/math_pairs.jsonl: ours, math-verify alone, TRL's accuracy_reward.

    python benchmarks/math_graders.py [--pairs tests/math_pairs.jsonl]

Each gets the same completion (the given answer in a box, or the completion as written) and answer. TRL is in no extra
of ours (pip install trl). The labels are this repository's conventions, and ours was made to meet them: the columns of
peers show where conventions differ as well as faults. A grader that raises or reads nothing counts as "no".
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Pair = dict[str, Any]
Grader = Callable[[str, str], bool]


def ours(completion: str, answer: str) -> bool:
    from arealite.reward.math import math_reward

    return math_reward("", completion, [], [], answer=answer) == 1


def math_verify_alone(completion: str, answer: str) -> bool:
    from math_verify import parse, verify

    return verify(parse(f"${answer}$"), parse(completion))


def trl_accuracy(completion: str, answer: str) -> bool:
    from trl.rewards import accuracy_reward

    return accuracy_reward([[{"content": completion}]], [f"${answer}$"])[0] == 1


def graded(grader: Grader, pairs: list[Pair]) -> dict[str, float]:
    """Shares and counts of one grader over all pairs."""
    counts = {"right": 0, "false_positives": 0, "false_negatives": 0, "adversarial_false_positives": 0, "errors": 0}
    slowest_s, start = 0.0, time.perf_counter()
    for pair in pairs:
        before = time.perf_counter()
        try:
            verdict = grader(pair.get("completion", rf"\boxed{{{pair.get('given')}}}"), pair["answer"])
        except Exception:  # any grader's, to be counted
            counts["errors"] += 1
            verdict = False
        slowest_s = max(slowest_s, time.perf_counter() - before)
        counts["right"] += verdict == pair["equal"]
        counts["false_positives"] += verdict and not pair["equal"]
        counts["false_negatives"] += not verdict and pair["equal"]
        counts["adversarial_false_positives"] += verdict and pair["kind"] == "adversarial"
    total_s = time.perf_counter() - start
    rates = {
        "share_right": counts["right"] / len(pairs),
        "ms_per_pair": 1e3 * total_s / len(pairs),
        "slowest_s": slowest_s,
    }
    return counts | {name: round(value, 4) for name, value in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=Path(__file__).parents[1] / "tests" / "math_pairs.jsonl")
    pairs = [json.loads(line) for line in parser.parse_args().pairs.read_text().splitlines()]
    logging.disable(logging.WARNING)  # math-verify tells of each answer that it cannot read
    results: dict[str, Any] = {"num_pairs": len(pairs)}
    for name, grader in (("arealite", ours), ("math-verify", math_verify_alone), ("trl", trl_accuracy)):
        results[name] = graded(grader, pairs)
        print(f"{name:12} " + "  ".join(f"{key} {value}" for key, value in results[name].items()), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
