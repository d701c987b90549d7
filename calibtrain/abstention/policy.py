"""The answer/abstain policy of a threshold, and what it does to graded answers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibtrain.calibration.intervals import wilson
from calibtrain.errors import UserError


@dataclass(frozen=True, slots=True)
class SelectiveStatistics:
    """What answering iff confidence >= threshold does; rates are NaN where their denominator is 0."""

    threshold: float
    n: int
    n_answered: int
    n_wrong: int  # of the answered
    coverage: float  # answered / all
    refusal_rate: float  # refused / all
    hallucination_rate: float  # answered and wrong / all
    risk: float  # wrong / answered
    risk_low: float  # Wilson interval of the risk, 95%
    risk_high: float
    over_refusal: float  # refused although right / right

    def as_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


def policy(confidence: ArrayLike, threshold: float) -> NDArray[np.bool_]:
    """True (n,) where the model should answer: confidence >= threshold. Raises UserError for a NaN."""
    q = np.asarray(confidence, dtype=np.float64)
    if np.isnan(q).any() or math.isnan(threshold):
        raise UserError("abstention policy: a confidence or the threshold is NaN; nothing can be decided by it")
    return np.asarray(q >= threshold)


def selective_statistics(confidence: ArrayLike, correct: ArrayLike, threshold: float) -> SelectiveStatistics:
    """Refusals, hallucinations and over-refusals of a threshold on forced answers (n,) with bool or 0/1 grades."""
    answered, right = policy(confidence, threshold), np.asarray(correct, dtype=np.float64) > 0
    if answered.shape != right.shape:
        raise UserError(f"abstention: {answered.size} confidences and {right.size} grades; give one grade per answer")
    n, n_answered, n_wrong = right.size, int(answered.sum()), int((answered & ~right).sum())
    low, high = wilson(n_wrong, n_answered)
    return SelectiveStatistics(
        threshold=threshold,
        n=n,
        n_answered=n_answered,
        n_wrong=n_wrong,
        coverage=_share(n_answered, n),
        refusal_rate=_share(n - n_answered, n),
        hallucination_rate=_share(n_wrong, n),
        risk=_share(n_wrong, n_answered),
        risk_low=low,
        risk_high=high,
        over_refusal=_share(int((~answered & right).sum()), int(right.sum())),
    )


def threshold_from_costs(cost_wrong: float, cost_refusal: float, gain_right: float = 0.0) -> float:
    """Threshold of least expected cost for calibrated confidences (Chow 1970), in [0, 1].

    Answering at q costs (1 - q) cost_wrong - q gain_right, refusing costs cost_refusal: answer from
    q = (cost_wrong - cost_refusal) / (cost_wrong + gain_right) on. All in any one unit; 0, always answer, where refusing
    costs as much as a wrong answer. Raises UserError unless the costs are positive and the gain is 0 or more.
    """
    costs = (cost_wrong, cost_refusal, gain_right)
    if not all(math.isfinite(cost) for cost in costs) or cost_wrong <= 0 or cost_refusal <= 0 or gain_right < 0:
        raise UserError(
            f"costs must be positive numbers and the gain 0 or more, got wrong {cost_wrong}, refusal {cost_refusal}, "
            f"gain {gain_right}"
        )
    return max(0.0, (cost_wrong - cost_refusal) / (cost_wrong + gain_right))


def cost_per_question(
    statistics: SelectiveStatistics, cost_wrong: float, cost_refusal: float, gain_right: float = 0.0
) -> float:
    """Mean cost of a threshold on graded answers, in the unit of the costs; NaN for none."""
    if not statistics.n:
        return math.nan
    right = statistics.n_answered - statistics.n_wrong
    refused = statistics.n - statistics.n_answered
    return (cost_wrong * statistics.n_wrong + cost_refusal * refused - gain_right * right) / statistics.n


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
