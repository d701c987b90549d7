"""Means by a judge's grades, corrected by an audited sample; and how far judge and auditors agree.

Prediction-powered inference (Angelopoulos et al. 2023, arXiv 2301.09633) with power tuning (Angelopoulos, Duchi, Zrnic 2023,
arXiv 2311.01453): the mean of the judge's grades on the answers that were not audited, times a weight, plus the mean by
which the audited grades differ from the weighted judge's. A useless judge gets weight 0, and the audited mean is left.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from calibtrain.calibration.intervals import Interval, wilson
from calibtrain.errors import UserError

BINS = 5
"""Of the reliability table: an audited sample fills no more."""


def ppi_mean(
    audited: ArrayLike,
    judged: ArrayLike,
    judged_alone: ArrayLike,
    *,
    level: float = 0.95,
    weight: float | None = None,
    careful: bool = False,
) -> Interval:
    """Mean of what people would say, with its normal interval.

    audited, judged (m,): a person's and the judge's values of a random sample; judged_alone (N,): the judge's of others.
    weight: of the judge, 1 in the paper of 2023; None: the one of least variance. careful, for grades 0 and 1: the variance
    counts one more disagreement of each kind, since a few audits without any do not show that there is none. NaN for m = 0.
    """
    y, f, others = (np.asarray(one, dtype=np.float64) for one in (audited, judged, judged_alone))
    if y.ndim != 1 or y.shape != f.shape or others.ndim != 1:
        raise UserError(f"prediction-powered mean: {y.size} audited values and {f.size} of the judge's; give one each")
    m, n = len(y), len(others)
    if m == 0:
        return Interval(math.nan, math.nan, math.nan)
    weight = (_weight(y, f, others) if weight is None else weight) if n else 0.0
    difference = y - weight * f
    estimate = float(difference.mean()) + (weight * float(others.mean()) if n else 0.0)
    spread = np.append(difference, [1.0, -weight]) if careful else difference
    variance = float(spread.var()) / m + (weight**2 * float(others.var()) / n if n else 0.0)
    half = float(scipy.stats.norm.ppf((1 + level) / 2)) * math.sqrt(variance)
    return Interval(estimate, estimate - half, estimate + half)


def _weight(y: NDArray[np.float64], f: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """The judge's weight of least variance, in [0, 1]."""
    variance = float(np.append(f, others).var())
    if len(y) < 2 or variance == 0:
        return 0.0
    covariance = float(np.mean((y - y.mean()) * (f - f.mean())))
    return float(np.clip(covariance / variance / (1 + len(y) / len(others)), 0.0, 1.0))


@dataclass(frozen=True, slots=True)
class Agreement:
    """A judge against the person who audited a random sample of answers; intervals are Wilson's at 95 %."""

    n: int  # audited
    both_right: int
    judge_right: int  # called right, and wrong
    judge_wrong: int  # called wrong, and right
    both_wrong: int

    @property
    def accuracy(self) -> Interval:
        """Share of the audited answers on which they agree."""
        return _share(self.both_right + self.both_wrong, self.n)

    @property
    def sensitivity(self) -> Interval:
        """Share of the right answers that the judge calls right."""
        return _share(self.both_right, self.both_right + self.judge_wrong)

    @property
    def specificity(self) -> Interval:
        """Share of the wrong answers that the judge calls wrong."""
        return _share(self.both_wrong, self.both_wrong + self.judge_right)

    @property
    def kappa(self) -> float:
        """Cohen's: agreement above that of two who call as many right at random; NaN where both always say the same."""
        if self.n == 0:
            return math.nan
        judge, person = (self.both_right + self.judge_right) / self.n, (self.both_right + self.judge_wrong) / self.n
        chance = judge * person + (1 - judge) * (1 - person)
        return (self.accuracy.estimate - chance) / (1 - chance) if chance < 1 else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None where there is no number."""
        shares = {name: as_plain(getattr(self, name)) for name in ("accuracy", "sensitivity", "specificity")}
        return {**asdict(self), **shares, "kappa": None if math.isnan(self.kappa) else self.kappa}


def agreement(audited: ArrayLike, judged: ArrayLike) -> Agreement:
    """Of audited and the judge's grades (m,), 0 or 1."""
    y, j = np.asarray(audited, dtype=np.float64) > 0, np.asarray(judged, dtype=np.float64) > 0
    return Agreement(len(y), *(int(one.sum()) for one in (y & j, ~y & j, y & ~j, ~y & ~j)))


def corrected(
    confidence: ArrayLike, judged: ArrayLike, audited: ArrayLike, threshold: float | None = None
) -> dict[str, Any]:
    """What the audited grades make of the judge's, as plain values.

    confidence, judged (n,), audited (n,) with NaN where none: accuracy, mean confidence less accuracy, the risk at the
    threshold where there is one, and accuracy by BINS bins of as many answers each. Every one is a mean, with its interval.
    """
    q, j, y = (np.asarray(one, dtype=np.float64) for one in (confidence, judged, audited))
    order = np.argsort(q, kind="stable")
    bins = [_row(q[one], j[one], y[one]) for one in np.array_split(order, BINS) if len(one)]
    whole = _mean(j, y)
    gap = float(q.mean())
    found = {
        "accuracy": as_plain(whole),
        "judged_accuracy": float(j.mean()),
        "overconfidence": as_plain(Interval(gap - whole.estimate, gap - whole.high, gap - whole.low)),
        "bins": bins,
    }
    if threshold is not None:
        answered = q >= threshold
        found["risk"] = as_plain(_mean(1 - j[answered], 1 - y[answered]))
    return found


def as_plain(one: Interval) -> dict[str, float | None]:
    """For JSON; None where there is no number."""
    return {name: None if math.isnan(value) else value for name, value in asdict(one).items()}


def _row(q: NDArray[np.float64], j: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, Any]:
    audited = int((~np.isnan(y)).sum())
    numbers = {"n": len(q), "audited": audited, "confidence": float(q.mean()), "judged_accuracy": float(j.mean())}
    return {**numbers, "accuracy": as_plain(_mean(j, y))}


def _mean(judged: NDArray[np.float64], audited: NDArray[np.float64]) -> Interval:
    """Of grades, within [0, 1]."""
    has = ~np.isnan(audited)
    found = ppi_mean(audited[has], judged[has], judged[~has], careful=True)
    return Interval(*(float(np.clip(value, 0.0, 1.0)) for value in (found.estimate, found.low, found.high)))


def _share(count: int, n: int) -> Interval:
    return Interval(count / n if n else math.nan, *wilson(count, n))
