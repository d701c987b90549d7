"""A calibrator and a certificate of city questions, used on other facts: do they hold, and what do 128 grades buy?

    python benchmarks/shift.py --json benchmarks/results/shift.json                      # the embedded model, few-shot
    python benchmarks/shift.py --model out/model --config out/config.yaml --json PATH    # a fine-tuned one

"In which country is the city of X?" fits the temperature and certifies the threshold; capitals, currencies and continents
of countries are asked next, all three pooled as "other facts" too. A certificate is said to be broken where the exact 95 %
interval of the risk above its threshold lies above the certified one, to hold where it lies below, and else to be undecided.
The alarm is fed the other facts' given answers in random order.

Refitting draws 128 of a family's answers at random, 200 times, and measures on the rest: a temperature fitted on them, a
shift of the accuracy estimated from them without their grades, and a certificate from them (with the cities' temperature,
so that no answer serves twice).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import print_table, write_json
from numpy.typing import NDArray

from calibtrain.abstention.certificate import certify
from calibtrain.abstention.monitor import RiskAlarm
from calibtrain.calibration import metrics
from calibtrain.calibration.calibrators import Calibrator, fit_calibrator
from calibtrain.calibration.intervals import clopper_pearson
from calibtrain.calibration.scores import TEMPERATURE_GRID, UNSCALED
from calibtrain.calibration.state import state_of
from calibtrain.calibration.unlabelled import fit_label_shift
from calibtrain.confidence.answer import Answer
from calibtrain.pipeline.measurement import Measurement

Array = NDArray[Any]
HASHES = {"template_hash": "benchmark", "weights_hash": "benchmark"}
ALARM_ORDERS = 200
POOLED = "other facts"


def measure(model: Path | None, config_path: str) -> dict[str, Measurement]:
    """The splits of the cities and each family of other facts, answered by one model, few-shot where it is raw."""
    from forgetting import other_facts

    from calibtrain.config_file import load_config
    from calibtrain.pipeline.evaluate import Loaded, with_progress
    from calibtrain.pipeline.prepare import prepare

    config = load_config(config_path)
    prepared, loaded = prepare(config), Loaded(config, model)
    shots = () if model is not None else prepared.shots
    found = {
        name: with_progress(loaded, prepared.splits[name], shots, name)
        for name in ("temperature", "certification", "test")
    }
    for name, records in other_facts().items():
        # Examples of the family's own: a family is another question, not another format.
        found[name] = with_progress(loaded, records[4:], records[:4], name)
    return found


def made_up(seed: int = 0) -> dict[str, Measurement]:
    """Answers between two options, overconfident by another factor in each family: does the benchmark run."""
    sizes = {"temperature": (300, 1.5), "certification": (600, 1.5), "test": (600, 1.5)}
    sizes |= {"capitals": (150, 6.0), "currencies": (150, 9.0), "continents": (150, 1.5)}
    rng, found = np.random.default_rng(seed), {}
    for name, (n, heat) in sizes.items():
        logit = np.abs(rng.normal(0, 5, n))
        table = -np.log1p(np.exp(-logit[:, None] / np.array(TEMPERATURE_GRID)))
        right = rng.random(n) < 1 / (1 + np.exp(-logit / heat))
        answers = [Answer(f"{name}-{i}", "?", "", (float(table[i, UNSCALED]),), bool(right[i])) for i in range(n)]
        found[name] = Measurement(answers, table)
    return found


def pooled(parts: Sequence[Measurement]) -> Measurement:
    """All answers of several families."""
    return Measurement(
        [answer for one in parts for answer in one.answers], np.concatenate([one.table for one in parts])
    )


def taken(measurement: Measurement, rows: Array) -> Measurement:
    """Some of the answers."""
    return Measurement([measurement.answers[row] for row in rows], measurement.table[rows])


def verdict(low: float, high: float, claimed: float) -> str:
    """Whether an interval of the risk agrees with the certified one."""
    if low > claimed:
        return "BROKEN"
    return "holds" if high <= claimed else "undecided"


def carried_over(
    family: str, measured: Measurement, calibrator: Calibrator, threshold: float, risk: float, delta: float, seed: int
) -> dict[str, Any]:
    """The cities' temperature and threshold on a family."""
    q, correct = calibrator.apply(measured.scores()), measured.correct
    state = state_of(torch.from_numpy(q), torch.from_numpy(correct))
    answered = q >= threshold
    n, wrong = int(answered.sum()), int((answered & ~correct).sum())
    low, high = clopper_pearson(wrong, n) if n else (0.0, 1.0)
    return {
        "part": "carried over",
        "family": family,
        "n": len(q),
        "accuracy": float(correct.mean()),
        "confidence": float(q.mean()),
        "ece_debiased": metrics.ece_debiased(state),
        "coverage": n / len(q),
        "risk": wrong / n if n else float("nan"),
        "risk_low": low,
        "risk_high": high,
        "certified_risk": risk,
        "certificate": verdict(low, high, risk),
        **alarms(~correct[answered], risk, delta, seed),
    }


def alarms(wrong: Array, risk: float, delta: float, seed: int) -> dict[str, float]:
    """How often the alarm fires within the given answers, over random orders, and after how many (median)."""
    rng, fired = np.random.default_rng(seed), []
    for _ in range(ALARM_ORDERS):
        alarm = RiskAlarm(risk, delta)
        alarm.observe_all(rng.permutation(wrong).tolist())
        fired.append(np.inf if alarm.fired_at is None else alarm.fired_at)
    median = float(np.median(fired))
    return {"alarm": float(np.isfinite(fired).mean()), "alarm_after": median if np.isfinite(median) else float("nan")}


def refitted(
    family: str,
    measured: Measurement,
    calibrator: Calibrator,
    source_accuracy: float,
    settings: argparse.Namespace,
) -> list[dict[str, Any]]:
    """What `settings.samples` answers of the family buy, measured on the rest."""
    rng = np.random.default_rng(settings.seed)
    eces: dict[str, list[float]] = {"cities' temperature": [], "no grades: shift": [], "refitted temperature": []}
    risks, coverages = [], []
    for _ in range(settings.draws):
        order = rng.permutation(len(measured.answers))
        small, rest = (taken(measured, part) for part in (order[: settings.samples], order[settings.samples :]))
        own = fit_calibrator("temperature", small.scores(), small.correct, replicates=0, **HASHES)
        shift = fit_label_shift(calibrator, small.scores(), source_accuracy)
        for name, one in zip(eces, (calibrator, shift, own), strict=True):
            applied = torch.from_numpy(one.apply(rest.scores()))
            eces[name].append(metrics.ece_debiased(state_of(applied, torch.from_numpy(rest.correct))))
        found = certify(calibrator.apply(small.scores()), small.correct, settings.target_risk, settings.delta)
        limit = np.inf if found.certificate is None else found.certificate.threshold
        answered = calibrator.apply(rest.scores()) >= limit
        coverages.append(float(answered.mean()))
        if answered.any():
            risks.append(float((~rest.correct[answered]).mean()))
    common = {"part": "refitted", "family": family, "samples": settings.samples, "n_rest": len(rest.answers)}
    rows = [
        common | {"what": name, "ece_debiased": float(np.mean(values)), "ece_sd": float(np.std(values, ddof=1))}
        for name, values in eces.items()
    ]
    return [
        *rows,
        common
        | {
            "what": "refitted certificate",
            "certified": len(risks) / settings.draws,
            "coverage": float(np.mean(coverages)),
            "risk": float(np.mean(risks)) if risks else float("nan"),
        },
    ]


def summary(carried: Sequence[Mapping[str, Any]], refits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What changed between the cities and the pooled other facts."""
    city, other = (next(row for row in carried if row["family"] == name) for name in ("cities", POOLED))
    by_name = {row["what"]: row for row in refits if row["family"] == POOLED}
    return {
        "ece_cities": city["ece_debiased"],
        "ece_other": other["ece_debiased"],
        "ece_other_refitted": by_name["refitted temperature"]["ece_debiased"],
        "risk_cities": city["risk"],
        "risk_other": other["risk"],
        "certified_risk": city["certified_risk"],
        "certificate_other": other["certificate"],
        "alarm_after": other["alarm_after"],
        "refitted_certified": by_name["refitted certificate"]["certified"],
        "refitted_coverage": by_name["refitted certificate"]["coverage"],
    }


def say(found: Mapping[str, Any], samples: int) -> None:
    """The finding in plain words."""
    held = {"BROKEN": "no longer holds", "holds": "still holds", "undecided": "is neither confirmed nor refuted"}
    print(
        f"On other facts the certificate (at most {found['certified_risk']:.0%} wrong) "
        f"{held[found['certificate_other']]}: {found['risk_other']:.1%} of the given answers are wrong, of the cities' "
        f"{found['risk_cities']:.1%}. The cities' temperature leaves a debiased ECE of {found['ece_other']:.3f}, on cities "
        f"{found['ece_cities']:.3f}; one refitted on {samples} answers {found['ece_other_refitted']:.3f}. A certificate "
        f"from {samples} answers exists in {found['refitted_certified']:.0%} of draws; it answers "
        f"{found['refitted_coverage']:.1%}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write machine, versions, rows and summary here")
    parser.add_argument("--model", type=Path, help="a fine-tuned Hugging Face directory; default: the config's model")
    parser.add_argument("--config", default="demo", help="whose cities, splits and template are used")
    parser.add_argument("--target-risk", type=float, default=0.2)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--samples", type=int, default=128, help="graded answers of the other family")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="made-up answers and few draws: does it run")
    settings = parser.parse_args()
    if settings.smoke:
        settings.draws = 5
    measured = made_up() if settings.smoke else measure(settings.model, settings.config)
    fitting, held_out = measured.pop("temperature"), measured.pop("certification")
    calibrator = fit_calibrator("temperature", fitting.scores(), fitting.correct, **HASHES)
    made = certify(calibrator.apply(held_out.scores()), held_out.correct, settings.target_risk, settings.delta)
    if made.certificate is None:
        raise SystemExit(f"the cities give no certificate to carry over: {made.reason}")
    families = {"cities": measured.pop("test"), **measured, POOLED: pooled(list(measured.values()))}
    certificate = made.certificate
    claim = (certificate.threshold, certificate.risk_bound, settings.delta, settings.seed)
    carried = [carried_over(name, one, calibrator, *claim) for name, one in families.items()]
    accuracy = float(fitting.correct.mean())
    refits = [
        row
        for name, one in families.items()
        if name != "cities" and len(one.answers) >= 2 * settings.samples
        for row in refitted(name, one, calibrator, accuracy, settings)
    ]
    print_table("The cities' temperature and certificate, carried over", carried)
    print_table(f"Refitted on {settings.samples} answers", [row for row in refits if "ece_debiased" in row])
    print_table("Certified anew", [row for row in refits if "certified" in row])
    found = summary(carried, refits)
    say(found, settings.samples)
    if settings.json:
        write_json(settings.json, [*carried, *refits], found)


if __name__ == "__main__":
    main()
