"""How often a certified answer/abstain threshold is wrong, over random re-splits of pools whose true risk is known.

    python benchmarks/certificate_validity.py --json benchmarks/results/certificate_validity.json
    python benchmarks/certificate_validity.py --answers answers.jsonl --json out.json
    python benchmarks/certificate_validity.py --run out/quantized/w4a16-awq --splits 200 --json out.json

Each split draws n graded answers from a pool, certifies a threshold on them and asks for the true risk of answering
above it: the share of wrong answers above the threshold in the pool, which is the population the split was drawn from
(with replacement). A split without a certificate violates nothing, but is counted. The same for the hallucination rate,
wrong answers among all questions, controlled with probability 1 - delta. `violation_rate` is the worst over all rows:
where the claim is exact it is delta itself, and the worst of many rows lies above it by chance. `rows_beyond_chance` says
how many lie further above than that: at 95% for all rows together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _report import print_table, write_json
from numpy.typing import NDArray
from scipy.stats import binom

from calibtrain.abstention.certificate import certify
from calibtrain.abstention.hallucination import control_hallucinations
from calibtrain.calibration.intervals import clopper_pearson
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.lines import lines_of
from calibtrain.pipeline.calibration_file import read_calibration
from calibtrain.pipeline.measurement import read_measurement

Array = NDArray[Any]
Pool = tuple[Array, Array]  # confidences, whether correct
POOL_SIZE = 200_000


def synthetic_pools(target_risk: float, rng: np.random.Generator) -> dict[str, Pool]:
    """Pools whose chance of being wrong is a known function of the confidence, chosen to be hard on the certificate."""

    def pool(confidence: Array, wrong: Callable[[Array], Array]) -> Pool:
        return confidence, rng.random(POOL_SIZE) >= wrong(confidence)

    uniform, bimodal = rng.random(POOL_SIZE), rng.beta(0.6, 0.8, POOL_SIZE)
    just_above = target_risk * 1.02
    return {
        "calibrated": pool(bimodal, lambda q: 1 - q),
        "overconfident": pool(bimodal, lambda q: (1 - q) ** 0.4),
        "risk just above target everywhere": pool(uniform, lambda q: np.full_like(q, just_above)),
        "risk just below target everywhere": pool(uniform, lambda q: np.full_like(q, target_risk * 0.98)),
        "three confidences, top one bad": pool(
            rng.choice([0.3, 0.6, 0.9], POOL_SIZE),
            lambda q: np.where(q > 0.8, just_above, np.where(q > 0.5, 0.05, 0.5)),
        ),
        "ties of tenths": pool(np.round(bimodal, 1), lambda q: 1 - q),
        "most confident are worst": pool(uniform, lambda q: q * 2 * target_risk),
        "cliff": pool(uniform, lambda q: np.where(q > 0.7, target_risk / 2, 0.9)),
        "waves about the target": pool(uniform, lambda q: target_risk * (1 + 0.9 * np.sin(12 * q))),
        "comb about the target": pool(uniform, lambda q: np.where((q * 50).astype(int) % 2, 2 * target_risk, 0.02)),
        "one confidence for all": pool(np.full(POOL_SIZE, 0.7), lambda q: np.full_like(q, just_above)),
    }


def read_answers(path: Path) -> Pool:
    """Confidences and grades of a JSONL file with `confidence` and `correct`; ungraded answers are left out."""
    confidence, correct = [], []
    for number, line in enumerate(lines_of(path.read_text(encoding="utf-8")), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row["correct"] is not None:
                confidence.append(float(row["confidence"]))
                correct.append(bool(row["correct"]))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}:{number}: expected keys confidence (0..1) and correct (bool): {error}") from error
    if not confidence:
        raise UserError(f"{path}: no graded answers")
    return np.array(confidence), np.array(correct)


def read_run(output_dir: Path) -> Pool:
    """Graded answers of a run, or of a quantised one, to questions that its calibrator has not seen."""
    config, calibrated = load_config(output_dir / "config.yaml"), read_calibration(output_dir)
    found = [read_measurement(output_dir / "answers" / f"{split}.jsonl") for split in ("certification", "test")]
    confidence = [calibrated.calibrator.apply(one.scores(config.calibration.domain)) for one in found]
    return np.concatenate(confidence), np.concatenate([one.correct for one in found])


def resplits(output_dir: Path, splits: int = 200, seed: int = 0) -> dict[str, Any]:
    """Certificates at the run's own risk and delta over `splits` draws as large as its certification set: see `measure`."""
    pool, config = read_run(output_dir), load_config(output_dir / "config.yaml")
    certificate, abstention = read_calibration(output_dir).certification.certificate, config.abstention
    risk, delta = (abstention.target_risk, abstention.delta)
    if certificate is not None:
        risk, delta = certificate.target_risk, certificate.delta
    n = len(read_measurement(output_dir / "answers" / "certification.jsonl").answers)
    return measure(f"run {output_dir.name}", pool, n, splits, risk, delta, seed) | {"delta": delta}


def measure(name: str, pool: Pool, n: int, splits: int, target_risk: float, delta: float, seed: int) -> dict[str, Any]:
    """Violations over `splits` draws of n answers from the pool, with the 95% interval of their rate."""
    rng = np.random.default_rng(seed)
    confidence, correct = pool
    order = np.argsort(-confidence, kind="stable")
    descending, wrong_ahead = -confidence[order], np.append(0, np.cumsum(~correct[order]))
    above_bound = above_target = certified = 0
    coverage = []
    for _ in range(splits):
        drawn = rng.integers(0, len(confidence), n)
        certificate = certify(confidence[drawn], correct[drawn], target_risk, delta).certificate
        coverage.append(certificate.coverage if certificate else 0.0)
        if certificate is None:
            continue
        certified += 1
        answered = int(np.searchsorted(descending, -certificate.threshold, side="right"))
        true_risk = wrong_ahead[answered] / answered
        above_bound += true_risk > certificate.risk_bound
        above_target += true_risk > target_risk
    low, high = clopper_pearson(int(above_bound), splits)
    return {
        "claim": "selective risk",
        "pool": name,
        "n": n,
        "target_risk": target_risk,
        "splits": splits,
        "certified": certified / splits,
        "coverage": float(np.mean(coverage)),
        "above_target": int(above_target) / splits,
        "violation_rate": int(above_bound) / splits,
        "violation_low": low,
        "violation_high": high,
    }


def measure_hallucinations(
    name: str, pool: Pool, n: int, splits: int, target_rate: float, delta: float, seed: int
) -> dict[str, Any]:
    """As `measure`, of the share of all questions that are answered wrongly."""
    rng = np.random.default_rng(seed)
    confidence, correct = pool
    wrong = np.sort(confidence[~correct])
    above, certified, coverage = 0, 0, []
    for _ in range(splits):
        drawn = rng.integers(0, len(confidence), n)
        found = control_hallucinations(confidence[drawn], correct[drawn], target_rate, delta)
        coverage.append(found.coverage if found else 0.0)
        if found is None:
            continue
        certified += 1
        true_rate = (len(wrong) - int(np.searchsorted(wrong, found.threshold))) / len(confidence)
        above += true_rate > target_rate
    low, high = clopper_pearson(above, splits)
    return {
        "claim": "hallucination rate",
        "pool": name,
        "n": n,
        "target_risk": target_rate,
        "splits": splits,
        "certified": certified / splits,
        "coverage": float(np.mean(coverage)),
        "above_target": above / splits,
        "violation_rate": above / splits,
        "violation_low": low,
        "violation_high": high,
    }


def _beyond_chance(row: dict[str, Any], delta: float, rows: int) -> bool:
    """Whether so many violations would be seen in less than 5% of runs, any of the rows counted, if delta held."""
    return bool(binom.sf(round(row["violation_rate"] * row["splits"]) - 1, row["splits"], delta) < 0.05 / rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--answers", type=Path, help="JSONL of graded answers, used as one more pool")
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="output_dirs, also quantised: more pools")
    parser.add_argument("--n", type=int, nargs="+", default=[59, 300, 1000], help="graded answers in a split")
    parser.add_argument("--splits", type=int, default=2000, help="splits per pool; 200 leave 3 points of noise")
    parser.add_argument("--target-risk", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = []
    for target_risk in args.target_risk:
        pools = synthetic_pools(target_risk, np.random.default_rng(args.seed))
        if args.answers:
            pools[f"answers of {args.answers.name}"] = read_answers(args.answers)
        pools |= {f"run {one.name}": read_run(one) for one in args.run}
        rows += [
            claim(name, pool, n, args.splits, target_risk, args.delta, args.seed)
            for claim in (measure, measure_hallucinations)
            for n in args.n
            for name, pool in pools.items()
        ]
    worst = max(rows, key=lambda row: row["violation_rate"])
    summary = {
        "violation_rate": worst["violation_rate"],
        "violation_low": worst["violation_low"],
        "violation_high": worst["violation_high"],
        "worst_pool": worst["pool"],
        "worst_claim": worst["claim"],
        "worst_n": worst["n"],
        "rows": len(rows),
        "rows_beyond_chance": sum(_beyond_chance(row, args.delta, len(rows)) for row in rows),
        "above_target": max(row["above_target"] for row in rows),
        "delta": args.delta,
    }
    print_table(f"Certificates at delta {args.delta:g}", rows)
    print(f"worst violation rate {summary['violation_rate']:.4f} ({worst['pool']}), delta {args.delta:g}")
    print(f"{summary['rows_beyond_chance']} of {len(rows)} rows above delta by more than chance")
    if args.json:
        write_json(args.json, rows, summary)


if __name__ == "__main__":
    main()
