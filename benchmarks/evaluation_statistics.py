"""How true the statistics of evaluations are, by simulation: coverage of the intervals, wrong verdicts, samples saved.

    python benchmarks/evaluation_statistics.py --scale 1

Each table has one line per setting; the last line is JSON. Called by people; tests/test_evaluation_statistics.py has
the same claims on a small scale.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from arealite.evaluation.statistics import (
    ALPHA,
    Estimate,
    estimate,
    estimate_difference,
    is_decided,
    looks,
    order,
    p_value,
    pass_at_k,
)

RATES = (0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)
CONCENTRATIONS = (
    0.5,
    2.0,
    10.0,
)  # of the Beta distribution that problems are drawn from; small: solved always or never


def chances(rng: np.random.Generator, size: int, rate: float, concentration: float) -> np.ndarray:
    return rng.beta(rate * concentration, (1 - rate) * concentration, size)


def wald(values: np.ndarray) -> Estimate:
    """What is mostly published: mean +- 1.96 standard errors."""
    mean, error = float(values.mean()), 1.96 * float(values.std(ddof=1) / len(values) ** 0.5)
    return Estimate(mean, mean - error, mean + error, len(values))


def coverage(rng: np.random.Generator, scale: float) -> dict[str, float]:
    """Means over rates; `worst` is over single settings."""
    print("problems  n   concentration  coverage  worst rate  width   mean +- 1.96 se   pass@4")
    ours, worst = [], 1.0
    for num_problems in (10, 30, 100, 300):
        for n in (1, 8, 32):
            for concentration in CONCENTRATIONS:
                hits, plain, width, of_pass = [], [], [], []
                for rate in RATES:
                    true_pass = float(np.mean(1 - (1 - chances(rng, 200_000, rate, concentration)) ** 4))
                    for _ in range(int(100 * scale)):
                        correct = rng.binomial(n, chances(rng, num_problems, rate, concentration))
                        found, usual = estimate(correct / n), wald(correct / n)
                        hits.append(found.low <= rate <= found.high)
                        plain.append(usual.low <= rate <= usual.high)
                        width.append(found.high - found.low)
                        if n >= 4:
                            passed = estimate([pass_at_k(n, int(c), 4) for c in correct])
                            of_pass.append(passed.low <= true_pass <= passed.high)
                by_rate = np.mean(np.reshape(hits, (len(RATES), -1)), axis=1)
                ours.append(float(np.mean(hits)))
                worst = min(worst, float(by_rate.min()))
                told = f"{np.mean(of_pass):.3f}" if of_pass else "-"
                print(
                    f"{num_problems:<9} {n:<3} {concentration:<14} {ours[-1]:.3f}     {by_rate.min():.3f}"
                    f"       {np.mean(width):.3f}   {np.mean(plain):.3f}             {told}",
                    flush=True,
                )
    return {"coverage_mean": float(np.mean(ours)), "coverage_min": min(ours), "coverage_max": max(ours), "worst": worst}


def coverage_of_differences(rng: np.random.Generator, scale: float) -> dict[str, float]:
    print("problems  n   coverage of the difference of equally good models, paired on the same or on other strengths")
    found = []
    for num_problems in (20, 50, 200):
        for n in (1, 8, 32):
            hits = []
            for i in range(int(600 * scale)):
                rate, concentration = RATES[i % len(RATES)], CONCENTRATIONS[i % 3]
                first = chances(rng, num_problems, rate, concentration)
                second = first if i % 2 else chances(rng, num_problems, rate, concentration)
                change = estimate_difference((rng.binomial(n, second) - rng.binomial(n, first)) / n)
                hits.append(change.low <= 0 <= change.high)
            found.append(float(np.mean(hits)))
            print(f"{num_problems:<9} {n:<3} {found[-1]:.3f}", flush=True)
    return {"difference_coverage_min": min(found), "difference_coverage_mean": float(np.mean(found))}


def wrong_verdicts(rng: np.random.Generator, scale: float) -> dict[str, float]:
    wrong = []
    for _ in range(int(1000 * scale)):
        size, n = int(rng.choice([10, 40, 200])), int(rng.choice([1, 8, 32]))
        same = chances(rng, size, rng.uniform(0.03, 0.97), float(rng.choice(CONCENTRATIONS)))
        wrong.append(p_value((rng.binomial(n, same) - rng.binomial(n, same)) / n) <= ALPHA)
    print(f"wrong verdicts on equal pairs: {sum(wrong)} of {len(wrong)}")
    return {"wrong_verdicts": float(np.mean(wrong))}


def sequential(rng: np.random.Generator, scale: float) -> dict[str, float]:
    result = {}
    plan = list(order(200, 32, seed=0))
    problem, sample = np.array(plan).T
    for points in (0, 5, 10, 20):
        verdicts, shares, fixed = [], [], []
        for _ in range(int(100 * scale)):
            first = np.clip(chances(rng, 200, rng.uniform(0.2, 0.7), 2), 0, 1 - points / 100)
            right = [rng.random((200, 32)) < c[:, None] for c in (first, first + points / 100)]
            apart = (right[1].astype(float) - right[0])[problem, sample]
            stops = looks(len(plan))
            for stop in stops:
                counts = np.bincount(problem[:stop], minlength=200)
                sums = np.bincount(problem[:stop], weights=apart[:stop], minlength=200)
                if is_decided(sums[counts > 0] / counts[counts > 0], len(stops)):
                    verdicts.append(float(np.sign(sums.sum())))
                    break
            else:
                verdicts.append(0.0)
            shares.append(stop / len(plan))
            whole = np.bincount(problem, weights=apart, minlength=200) / 32
            fixed.append(float(np.sign(whole.sum())) if p_value(whole) <= ALPHA else 0.0)
        same = float(np.mean(np.equal(verdicts, fixed)))
        print(
            f"true difference of {points} points: samples {np.mean(shares):.1%} of the fixed design's, same verdict"
            f" {same:.1%}, second better {np.mean(np.equal(verdicts, 1)):.1%}, first better"
            f" {np.mean(np.equal(verdicts, -1)):.1%}"
        )
        result |= {f"share_{points}": float(np.mean(shares)), f"same_verdict_{points}": same}
        if points == 0:
            result["sequential_wrong"] = float(np.mean(np.not_equal(verdicts, 0)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="how many simulations; 1 takes some minutes")
    parser.add_argument("--only", choices=["coverage", "differences", "verdicts", "sequential"], help="one part")
    given = parser.parse_args()
    parts = {
        "coverage": coverage,
        "differences": coverage_of_differences,
        "verdicts": wrong_verdicts,
        "sequential": sequential,
    }
    figures: dict[str, float] = {}
    for name, part in parts.items():
        if given.only in (None, name):
            figures |= part(np.random.default_rng(0), given.scale)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
