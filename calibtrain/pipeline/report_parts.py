"""The report's section on answers made of parts: fields and their calibration, claims and what is left of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from calibtrain.abstention.claims import ClaimsCertificate, conformal_scores
from calibtrain.calibration import metrics, ranking
from calibtrain.calibration.intervals import Interval, bootstrap, sample_ids, wilson
from calibtrain.calibration.parts import field_name
from calibtrain.calibration.state import CalibrationState
from calibtrain.confidence.answer import Answer
from calibtrain.pipeline.answer_parts import part_probabilities
from calibtrain.pipeline.calibration_file import Calibrated
from calibtrain.pipeline.figures import Axes, Chart, Curve, curves, nice_ceiling

FIELDS, POINTS = 30, 100


@dataclass(frozen=True, slots=True)
class FieldRow:
    """A field's graded values in the test answers: every interval from resampling questions, at 95%."""

    name: str
    n: int
    right: Interval
    stated: float  # mean
    gap: Interval  # right minus stated
    auroc: float


@dataclass(frozen=True, slots=True)
class ClaimsRow:
    """What a promise's threshold does to the test answers."""

    promise: ClaimsCertificate
    kept: int
    claims: int
    silent: int  # replies of which nothing is left
    wrong: int  # replies with a wrong claim among those that are left
    n: int
    low: float  # Wilson interval of the share of these replies
    high: float


@dataclass(frozen=True, slots=True)
class PartsReport:
    """Everything the section shows."""

    fields: Sequence[FieldRow]
    left_out: int  # fields beyond those shown
    not_found: int  # replies that hold no answer
    n: int  # replies
    claims: Sequence[tuple[float, str, Sequence[ClaimsRow]]]  # by risk: why there is none, or the rows of both forms
    promise: ClaimsCertificate | None
    figure: Markup | None


def parts_report(calibrated: Calibrated, answers: Sequence[Answer], replicates: int = 400) -> PartsReport | None:
    """The section on these test answers; None where they are not made of parts."""
    graded = [one for one in answers if one.correct is not None]
    if calibrated.parts is None or not graded:
        return None
    probability = part_probabilities(calibrated.parts, graded)
    fields = _fields(graded, probability, replicates)
    right = [np.array([part.correct is True for part in one.parts], dtype=bool) for one in graded]
    claims = [
        (
            risk,
            found.reason,
            [_row(one, probability, right) for one in (found.certificate, found.confident) if one is not None],
        )
        for risk, found in sorted(calibrated.claims.items())
    ]
    return PartsReport(
        fields=fields[:FIELDS],
        left_out=max(0, len(fields) - FIELDS),
        not_found=sum(not one.found for one in graded),
        n=len(graded),
        claims=claims,
        promise=calibrated.claim,
        figure=_figure(calibrated.claim, probability, right) if calibrated.claims else None,
    )


def _fields(answers: Sequence[Answer], probability: Sequence[Any], replicates: int) -> list[FieldRow]:
    members: dict[str, list[tuple[str, float, bool]]] = {}
    for one, chances in zip(answers, probability, strict=True):
        for part, chance in zip(one.parts, chances.tolist(), strict=True):
            if part.correct is not None:
                members.setdefault(field_name(part.name), []).append((one.question_id, chance, part.correct))
    rows = []
    for name, found in members.items():
        ids, q, y = zip(*found, strict=True)
        numbers = bootstrap(_numbers, q, y, sample_ids(ids), replicates=replicates, centred=())
        rows.append(
            FieldRow(name, len(q), numbers["right"], float(np.mean(q)), numbers["gap"], numbers["auroc"].estimate)
        )
    return rows


def _numbers(state: CalibrationState) -> dict[str, float]:
    right = metrics.accuracy(state)
    return {"right": right, "gap": right - metrics.mean_confidence(state), "auroc": ranking.auroc(state)}


def _row(promise: ClaimsCertificate, probability: Sequence[Any], right: Sequence[Any]) -> ClaimsRow:
    kept = [p >= promise.threshold for p in probability]
    wrong = sum(bool((one & ~y).any()) for one, y in zip(kept, right, strict=True))
    low, high = wilson(wrong, len(kept))
    return ClaimsRow(
        promise,
        kept=int(sum(one.sum() for one in kept)),
        claims=sum(one.size for one in kept),
        silent=sum(bool(one.size and not one.any()) for one in kept),
        wrong=wrong,
        n=len(kept),
        low=low,
        high=high,
    )


def _figure(promise: ClaimsCertificate | None, probability: Sequence[Any], right: Sequence[Any]) -> Markup | None:
    """Share of claims kept against the share of replies with a wrong one among them, over all thresholds."""
    scores, flat = np.sort(conformal_scores(probability, right)), np.sort(np.concatenate([*probability, np.zeros(0)]))
    if not len(flat):
        return None
    thresholds = np.unique(np.append(np.quantile(flat, np.linspace(0, 1, POINTS)), np.nextafter(1.0, 2.0)))[::-1]
    wrong = 1 - np.searchsorted(scores, thresholds, side="left") / len(scores)
    kept = 1 - np.searchsorted(flat, thresholds, side="left") / len(flat)
    axes = Axes(x_range=(0.0, min(1.0, nice_ceiling(float(wrong.max())))))
    chart = Chart("Claims kept against replies with a wrong claim", "replies with a wrong claim", "claims kept")
    mark = None
    if promise is not None:
        row = _row(promise, probability, right)
        mark = (row.wrong / row.n, row.kept / row.claims)
    return curves([Curve(wrong.tolist(), kept.tolist())], chart, axes, certified=mark)
