"""Full precision against quantised on the same questions: what answers, order and certificates cost, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from calibtrain.abstention.certificate import Certification, certify
from calibtrain.calibration import metrics, ranking
from calibtrain.calibration.intervals import NOISE_BIASED, Interval, paired_bootstrap, sample_ids, wilson
from calibtrain.calibration.state import CalibrationState
from calibtrain.confidence.answer import Answer
from calibtrain.errors import UserError

Floats = NDArray[np.float64]
REPLICATES, CERTIFICATE_REPLICATES = 400, 200


@dataclass(frozen=True, slots=True)
class Side:
    """One model on the held-out questions. Of the full-precision model `old` and `own` are the same."""

    answers: Sequence[Answer]  # to the test questions
    old: Floats  # (n,) confidence by the full-precision model's calibrator
    own: Floats  # (n,) by the calibrator that was fitted on this model's own answers
    certifying: tuple[Sequence[Answer], Floats]  # answers to the certification questions, and `own` of these
    certification: Certification  # by these


@dataclass(frozen=True, slots=True)
class Named:
    """How a row is told."""

    key: str
    name: str
    hint: str
    percent: bool
    better: int  # 1: higher is better, -1: lower, 0: neither


ROWS = (
    Named("accuracy", "Accuracy", "share of all answers that are right", True, 1),
    Named("mean_confidence_old", "Confidence, old calibrator", "its mean; should equal the accuracy", True, 0),
    Named("mean_confidence", "Confidence, refitted", "its mean; should equal the accuracy", True, 0),
    Named("ece_old", "ECE, old calibrator", "mean gap between stated and real, 15 bins", True, -1),
    Named("ece_debiased_old", "Debiased ECE, old calibrator", "ECE minus what pure chance gives", True, -1),
    Named("ece", "ECE, refitted", "mean gap between stated and real, 15 bins", True, -1),
    Named("ece_debiased", "Debiased ECE, refitted", "ECE minus what pure chance gives", True, -1),
    Named("brier", "Brier score", "squared error of the confidence, refitted", False, -1),
    Named("auroc", "AUROC", "how well confidence tells right from wrong; 0.5 is a coin", False, 1),
    Named("aurc", "AURC", "mean share wrong over all thresholds", False, -1),
    Named("coverage", "Coverage at the risk, test", "largest share with so few wrong, seen afterwards", True, 1),
    Named("certified_coverage", "Certified coverage", "share that the certificate lets it answer", True, 1),
)  # fmt: skip


def compare(
    before: Side, after: Side, *, risk: float, delta: float, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Any]:
    """The comparison as plain values: `questions`, `rows` by key, `changed`, `kept_threshold`.

    before, after: answers to the same graded questions in the same order; risk, delta: of the run's certificate. Of each
    row: before, after, difference, and low and high of its 95% interval, from resampling questions with both models'
    answers together. Raises UserError where the questions are not the same.
    """
    _check_pairs(before.answers, after.answers)
    ids = sample_ids(one.question_id for one in before.answers)
    right = [_correct(side.answers) for side in (before, after)]
    old = _paired(before.old, after.old, right, ids, risk, replicates, seed, calibration_alone=True)
    own = _paired(before.own, after.own, right, ids, risk, replicates, seed)
    rows = {key: own[key] for key in ("accuracy", "mean_confidence", "ece", "ece_debiased", "brier", "auroc", "aurc")}
    rows |= {f"{key}_old": old[key] for key in ("mean_confidence", "ece", "ece_debiased")}
    rows |= {"coverage": own["coverage"], "certified_coverage": _certified(before, after, risk, delta, seed)}
    changed = changes(before.answers, after.answers)
    rows["changed"] = changed["row"]
    return {
        "questions": len(before.answers),
        "risk": risk,
        "delta": delta,
        "rows": rows,
        "changed": {key: value for key, value in changed.items() if key != "row"},
        "kept_threshold": kept_threshold(before, after),
    }


def changes(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, Any]:
    """How many answers are others than before, by what became of them, and McNemar's exact p of the grades.

    Answers are compared as their task compares them.
    """
    pairs = [
        (bool(one.correct), bool(other.correct))
        for one, other in zip(before, after, strict=True)
        if one.meaning != other.meaning or bool(one.correct) != bool(other.correct)
    ]
    n, counts = len(before), {}
    for name, pair in (
        ("right_to_wrong", (True, False)),
        ("wrong_to_right", (False, True)),
        ("wrong_to_wrong", (False, False)),
        ("right_to_right", (True, True)),
    ):
        counts[name] = pairs.count(pair)
    turned = counts["right_to_wrong"] + counts["wrong_to_right"]
    low, high = wilson(len(pairs), n)
    share = len(pairs) / n if n else math.nan
    return {
        "n": n,
        "changed": len(pairs),
        **counts,
        "mcnemar_p": float(scipy.stats.binomtest(counts["right_to_wrong"], turned).pvalue) if turned else 1.0,
        "row": {"before": None, "after": share, "difference": share, "low": low, "high": high},
    }


def kept_threshold(before: Side, after: Side) -> dict[str, Any] | None:
    """What the old calibrator and threshold do to the test questions, of both models; None without a threshold."""
    certificate = before.certification.certificate
    if certificate is None:
        return None
    found: dict[str, Any] = {"threshold": certificate.threshold, "promised": certificate.risk_bound}
    for name, side in (("before", before), ("after", after)):
        answered = side.old >= certificate.threshold
        wrong = int((answered & ~_correct(side.answers)).sum())
        low, high = wilson(wrong, int(answered.sum()))
        found[name] = {"answered": int(answered.sum()), "wrong": wrong, "low": low, "high": high}
    return found


def _paired(
    before: Floats,
    after: Floats,
    right: Sequence[NDArray[np.bool_]],
    ids: NDArray[np.uint64],
    risk: float,
    replicates: int,
    seed: int,
    *,
    calibration_alone: bool = False,
) -> dict[str, dict[str, float | None]]:
    """Rows of both models' metrics with the paired interval of their difference."""

    def chosen(state: CalibrationState) -> dict[str, float]:
        found = {
            "mean_confidence": metrics.mean_confidence(state),
            "ece": metrics.ece(state),
            "ece_debiased": metrics.ece_debiased(state),
        }
        if calibration_alone:
            return found
        return found | {
            "accuracy": metrics.accuracy(state),
            "brier": metrics.brier(state),
            "auroc": ranking.auroc(state),
            "aurc": ranking.aurc(state),
            "coverage": ranking.coverage_at_risk(state, risk),
        }

    pair = [(before, right[0]), (after, right[1])]
    found = paired_bootstrap(
        chosen, pair[0], pair[1], ids, replicates=replicates, seed=seed, centred=NOISE_BIASED | {"ece"}
    )
    first, second = (chosen(_state(*one)) for one in pair)
    return {key: row(first[key], second[key], found[key]) for key in first}


def row(before: float, after: float, difference: Interval) -> dict[str, float | None]:
    """One row, with None for what is not known, as JSON has it."""
    values = {"before": before, "after": after, "difference": difference.estimate}
    values |= {"low": difference.low, "high": difference.high}
    return {key: float(one) if math.isfinite(one) else None for key, one in values.items()}


def _certified(before: Side, after: Side, risk: float, delta: float, seed: int) -> dict[str, float | None]:
    """Certified coverage of both, 0 without a certificate; the interval by certifying resampled questions anew."""
    coverage = [
        0.0 if side.certification.certificate is None else side.certification.certificate.coverage
        for side in (before, after)
    ]
    ends = (math.nan, math.nan)
    sides = [(q, _correct(answers)) for answers, q in (before.certifying, after.certifying)]
    if [one.question_id for one in before.certifying[0]] == [one.question_id for one in after.certifying[0]]:
        draws, rng, n = [], np.random.default_rng(seed), len(sides[0][0])
        for _ in range(CERTIFICATE_REPLICATES):
            drawn = rng.integers(0, n, n)
            # Repeated answers are no ties: the resample stands for new ones that are nearly as confident.
            shift = rng.random(n) * 1e-9
            found = [certify(np.clip(q[drawn] - shift, 0.0, 1.0), y[drawn], risk, delta).certificate for q, y in sides]
            first, second = (0.0 if one is None else one.coverage for one in found)
            draws.append(second - first)
        ends = (float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975)))
    return row(coverage[0], coverage[1], Interval(coverage[1] - coverage[0], *ends))


def _state(confidence: Floats, correct: NDArray[np.bool_]) -> CalibrationState:
    import torch

    from calibtrain.calibration.state import state_of

    return state_of(torch.from_numpy(confidence), torch.from_numpy(correct))


def _correct(answers: Sequence[Answer]) -> NDArray[np.bool_]:
    return np.array([bool(one.correct) for one in answers], dtype=bool)


def _check_pairs(before: Sequence[Answer], after: Sequence[Answer]) -> None:
    if [one.question_id for one in before] != [one.question_id for one in after]:
        raise UserError("the two models did not answer the same test questions in the same order; delete both answers")
    if any(one.correct is None for one in (*before, *after)):
        raise UserError("a test question has no grade; give it accepted answers or leave it out")


def told_rows(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[Named, Mapping[str, Any]]]:
    """The rows that are there, in the order of the table."""
    return [(one, rows[one.key]) for one in ROWS if one.key in rows]
