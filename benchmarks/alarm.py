"""How often the alarm in service is false, over long streams, and how soon it comes after a shift.

    python benchmarks/alarm.py --json benchmarks/results/alarm.json

Null streams keep the chance of a wrong answer at or below the certified risk, at every answer and whatever came before:
at the risk, below it, in waves below it, and set by an adversary who sees the stream. Shifted streams keep it at the
certified risk until a change, then raise it. `false_alarm_rate` is the worst over null streams.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _report import print_table, write_json
from numpy.typing import NDArray

from calibtrain.abstention.monitor import log_evidence, start_capital, step
from calibtrain.calibration.intervals import clopper_pearson

Chance = Callable[[int, NDArray[np.float64]], NDArray[np.float64] | float]
"""(answer number from 1, log evidence so far of each stream) -> chance of a wrong answer."""


def fired_at(
    chance: Chance, target_risk: float, delta: float, streams: int, length: int, seed: int
) -> NDArray[np.int64]:
    """The answer at which each stream's alarm fired, `length` + 1 where it did not."""
    rng = np.random.default_rng(seed)
    capital, evidence = start_capital((streams,)), np.zeros(streams)
    found = np.full(streams, length + 1, dtype=np.int64)
    for t in range(1, length + 1):
        capital = step(capital, t, rng.random(streams) < chance(t, evidence), target_risk)
        evidence = log_evidence(capital, t)
        found = np.where((evidence >= -math.log(delta)) & (found > length), t, found)
    return found


def shifted_stream(before: float, after: float, change: int) -> Chance:
    return lambda t, evidence: after if t > change else before


def null_streams(risk: float) -> dict[str, Chance]:
    return {
        "at the certified risk": lambda t, evidence: risk,
        "90% of it": lambda t, evidence: 0.9 * risk,
        "waves below it": lambda t, evidence: risk * (0.75 + 0.25 * math.sin(t / 50)),
        # Goes as far as the null allows while luck is with it, and lies low after a loss.
        "adversary": lambda t, evidence: np.where(evidence > -0.5, risk, 0.5 * risk),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--target-risk", type=float, nargs="+", default=[0.05, 0.2])
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--length", type=int, default=20_000, help="audited answers of a null stream")
    parser.add_argument("--changes", type=int, nargs="+", default=[0, 1000, 10_000], help="answers before the shift")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.25, 1.5, 2.0], help="of the risk at the shift")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    false_alarms: list[dict[str, Any]] = []
    delays: list[dict[str, Any]] = []
    for risk in args.target_risk:
        for name, chance in null_streams(risk).items():
            fired = fired_at(chance, risk, args.delta, args.streams, args.length, args.seed)
            count = int((fired <= args.length).sum())
            low, high = clopper_pearson(count, args.streams)
            false_alarms.append(
                {"null": name, "target_risk": risk, "answers": args.length, "streams": args.streams}
                | {"false_alarm_rate": count / args.streams, "low": low, "high": high}
            )
        for change in args.changes:
            for factor in args.factors:
                length, streams = change + 5000, max(1, args.streams // 10)
                shifted = shifted_stream(risk, factor * risk, change)
                fired = fired_at(shifted, risk, args.delta, streams, length, args.seed + 1)
                after = fired[fired > change] - change
                delays.append(
                    {"target_risk": risk, "shifted_to": factor * risk, "answers_before": change, "streams": streams}
                    | {"found_within_5000": float((after <= 5000).mean()) if len(after) else math.nan}
                    | {f"delay_p{p}": float(np.percentile(after, p)) if len(after) else math.nan for p in (50, 90)}
                )
    worst = max(false_alarms, key=lambda row: row["false_alarm_rate"])
    print_table(f"False alarms at delta {args.delta:g}", false_alarms)
    print_table("Answers from the shift to the alarm (5001: not found)", delays)
    summary = {
        "false_alarm_rate": worst["false_alarm_rate"],
        "false_alarm_high": worst["high"],
        "worst_null": worst["null"],
        "delta": args.delta,
    }
    print(f"worst false-alarm rate {summary['false_alarm_rate']:.4f} ({worst['null']}), delta {args.delta:g}")
    if args.json:
        write_json(args.json, [*false_alarms, *delays], summary)


if __name__ == "__main__":
    main()
