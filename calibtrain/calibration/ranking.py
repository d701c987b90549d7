"""How well confidence ranks right above wrong: AUROC, risk against coverage and the areas under it.

Every function takes a `CalibrationState` and treats the samples of one cell as tied, which is exact for real ties and
for cells that hold one grade only. What the ties of distinct confidences can change is returned as an error bound. Where all
samples are at hand, `Distinct.of` has a cell for each distinct value, and the same functions are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import digamma
from torch import Tensor

from calibtrain.calibration.state import EDGES, CalibrationState

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distinct:
    """Samples by ascending confidence, a cell for each distinct one; `count`, `correct` (K,) int64."""

    count: Tensor
    correct: Tensor

    @classmethod
    def of(cls, order: ArrayLike, correct: ArrayLike) -> Distinct:
        """Of any values (M,) that rank the samples, confidences or log-probs, and grades (M,) bool or 0/1."""
        values, place = np.unique(np.asarray(order, dtype=np.float64), return_inverse=True)
        right = np.bincount(place, np.asarray(correct, dtype=np.float64), minlength=len(values))
        count = np.bincount(place, minlength=len(values))
        return cls(torch.from_numpy(count.astype(np.int64)), torch.from_numpy(right.astype(np.int64)))

    @property
    def n(self) -> int:
        """Number of samples."""
        return int(self.count.sum())


Cells = CalibrationState | Distinct
"""What ranks: samples in cells by ascending confidence."""


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Selective risk at each threshold, from the most confident cell down to full coverage; all (K,)."""

    threshold: Array  # answer when confidence >= threshold
    coverage: Array  # answered / all
    risk: Array  # wrong / answered
    num_answered: NDArray[np.int64]
    num_wrong: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RefusalCurve:
    """What a threshold costs and saves, for ascending thresholds; all (K,), NaN where a denominator is 0."""

    threshold: Array  # answer when confidence >= threshold
    refusal: Array  # refused / all
    hallucination: Array  # answered and wrong / all
    over_refusal: Array  # refused although right / right
    risk: Array  # wrong / answered


def auroc(state: Cells) -> float:
    """Probability that a right answer is more confident than a wrong one, ties counting half; NaN with one class."""
    wrong, right = _wrong_right(state)
    pairs = wrong.sum() * right.sum()
    if pairs == 0:
        return math.nan
    below = np.cumsum(wrong) - wrong
    return float((right * (below + 0.5 * wrong)).sum() / pairs)


def auroc_error(state: Cells) -> float:
    """Largest difference between `auroc` and the AUROC of the samples themselves; NaN with one class only."""
    wrong, right = _wrong_right(state)
    pairs = wrong.sum() * right.sum()
    return float((wrong * right).sum() / (2 * pairs)) if pairs else math.nan


def augrc(state: Cells) -> float:
    """Area under the generalised risk-coverage curve (Traub et al. 2024, arXiv 2407.01032).

    By its identity with AUROC: (1 - AUROC) acc (1 - acc) + (1 - acc)**2 / 2, whose last part is the best value. NaN
    without samples.
    """
    accuracy = _accuracy(state)
    ranking = auroc(state)
    spread = 0.0 if math.isnan(ranking) else (1 - ranking) * accuracy * (1 - accuracy)
    return spread + (1 - accuracy) ** 2 / 2


def augrc_error(state: Cells) -> float:
    """Largest difference between `augrc` and that of the samples themselves; NaN without samples."""
    accuracy, error = _accuracy(state), auroc_error(state)
    return accuracy * (1 - accuracy) * (0.0 if math.isnan(error) else error)


def aurc(state: Cells) -> float:
    """Area under the risk-coverage curve: mean of the selective risk of the k most confident samples, k = 1..n.

    Samples of one cell are taken in random order (the mean over orders). Geifman, Uziel, El-Yaniv 2019, arXiv
    1805.08206. NaN without samples.
    """
    wrong, right = _wrong_right(state)
    return _aurc(wrong[::-1], (wrong + right)[::-1])


def aurc_error(state: Cells) -> float:
    """Largest difference between `aurc` and that of the samples themselves under any order within cells."""
    wrong, right = (values[::-1] for values in _wrong_right(state))
    none = np.zeros_like(wrong)
    best = _aurc(np.stack([none, wrong], 1).ravel(), np.stack([right, wrong], 1).ravel())
    worst = _aurc(np.stack([wrong, none], 1).ravel(), np.stack([wrong, right], 1).ravel())
    return max(worst - aurc(state), aurc(state) - best)


def e_aurc(state: Cells) -> float:
    """AURC minus that of a perfect ranking of the same answers, so 0 is best; NaN without samples."""
    wrong, right = _wrong_right(state)
    perfect = _aurc(np.array([0.0, wrong.sum()]), np.array([right.sum(), wrong.sum()]))
    return aurc(state) - perfect


def risk_coverage(state: CalibrationState) -> RiskCoverage:
    """The risk-coverage curve at the thresholds between non-empty cells; empty arrays without samples."""
    filled, answered, wrong = _answered(state)
    return RiskCoverage(_thresholds(filled), answered / max(state.n, 1), wrong / answered, answered, wrong)


def coverage_at_risk(state: Cells, risk: float) -> float:
    """Largest share of answers that a threshold can give with at most `risk` of them wrong, on these samples.

    An observed share without any guarantee: see `calibtrain.abstention.certificate` for one. 0 where no threshold does.
    """
    if state.n == 0:
        return math.nan
    _, answered, wrong = _answered(state)
    return float(answered[wrong <= risk * answered + 1e-9].max(initial=0)) / state.n


def selective_accuracy(state: Cells, coverage: float) -> float:
    """Accuracy of the ceil(coverage * n) most confident answers, ties taken in random order; NaN without samples."""
    if state.n == 0:
        return math.nan
    wanted = min(max(math.ceil(coverage * state.n - 1e-9), 1), state.n)
    _, answered, wrong = _answered(state)
    return float(1 - np.interp(wanted, np.append(0, answered), np.append(0, wrong)) / wanted)


def refusal_curve(state: CalibrationState, thresholds: int = 101) -> RefusalCurve:
    """Refusals and hallucinations at `thresholds` equally spaced thresholds from 0 to 1, rounded to cell edges."""
    wanted = np.linspace(0.0, 1.0, thresholds)
    first = np.searchsorted(EDGES.numpy()[1:-1], wanted, side="left")  # first cell above each threshold, (lo, hi]
    first = np.where(wanted > 0, first + 1, 0)
    count, correct = (np.append(0, np.cumsum(x.numpy())).astype(np.float64) for x in (state.count, state.correct))
    n, right = count[-1], correct[-1]
    refused, lost = count[first], correct[first]
    answered = n - refused
    wrong = answered - (right - lost)
    with np.errstate(invalid="ignore", divide="ignore"):
        return RefusalCurve(_thresholds(first), refused / n, wrong / n, lost / right, wrong / answered)


def _thresholds(cells: NDArray[np.int64]) -> Array:
    """Thresholds that answer these cells and those above: a cell is (lo, hi], so its least confidence follows lo."""
    return np.where(cells > 0, np.nextafter(EDGES.numpy()[cells], 2.0), 0.0)


def _answered(state: Cells) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The non-empty cells, from the most confident one, and how many are answered, and wrong, down to each."""
    filled = np.flatnonzero(state.count.numpy())[::-1]
    wrong = np.cumsum((state.count - state.correct).numpy()[filled])
    return filled, np.cumsum(state.count.numpy()[filled]), wrong


def _wrong_right(state: Cells) -> tuple[Array, Array]:
    """Wrong and right answers of each cell, float64, by ascending confidence."""
    right = state.correct.numpy().astype(np.float64)
    return state.count.numpy() - right, right


def _accuracy(state: Cells) -> float:
    return int(state.correct.sum()) / state.n if state.n else math.nan


def _aurc(wrong: Array, count: Array) -> float:
    """AURC of groups in descending confidence, each in random order inside; NaN without samples."""
    wrong, count = wrong[count > 0], count[count > 0]
    if not len(count):
        return math.nan
    ahead, ahead_wrong = np.cumsum(count) - count, np.cumsum(wrong) - wrong
    rate = wrong / count
    # Sum over i = 1..count of (ahead_wrong + i rate) / (ahead + i), by the digamma function.
    harmonic = digamma(ahead + count + 1) - digamma(ahead + 1)
    return float((count * rate + (ahead_wrong - ahead * rate) * harmonic).sum() / count.sum())
