"""Label shift: the same kind of questions, but harder or easier ones, so that the share of right answers has moved.

With p calibrated at accuracy pi, and answers of each kind (right, wrong) looking as they did, the probability at
accuracy pi' is sigma(logit p + logit pi' - logit pi) (Saerens, Latinne, Decaestecker 2002).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from calibtrain.calibration.maps import UNCLIPPED, log_odds_as_fitted
from calibtrain.calibration.scores import LEAST_DOUBT, Array, Scores, logit, sigmoid
from calibtrain.errors import UserError

_EDGE = 1e-6


def fit_shift(scores: Scores, correct: Array, weight: Array) -> dict[str, Any]:
    """The shift of the logit that graded answers of the new questions ask for: one parameter, so few answers do.

    At its maximum likelihood the mean probability is the accuracy. Half a right and half a wrong answer more keep it finite.
    """
    z = scores.log_odds
    accuracy = (weight @ correct + 0.5) / (weight.sum() + 1)
    total = weight.sum()
    reach = float(np.abs(z).max()) + float(abs(logit(accuracy))) + 1
    return {
        "shift": float(
            scipy.optimize.brentq(lambda shift: weight @ sigmoid(z + shift) / total - accuracy, -reach, reach)
        ),
        **UNCLIPPED,
    }


def apply_shift(parameters: dict[str, Any], scores: Scores) -> Array:
    """Probabilities (N,) with their logit shifted."""
    return sigmoid(log_odds_as_fitted(parameters, scores) + parameters["shift"])


def target_accuracy(probability: ArrayLike, source_accuracy: float, level: float = 0.95) -> tuple[float, float, float]:
    """Accuracy on new, ungraded questions: maximum likelihood with the ends of its profile-likelihood interval.

    probability (N,): calibrated where accuracy was `source_accuracy`. Answers of each kind must look as they did there:
    nothing in ungraded answers can show that they do not. The likelihood is that of Saerens' EM, of which this is the
    fixed point. Raises UserError for no answers or an accuracy of 0 or 1.
    """
    p = np.clip(np.asarray(probability, dtype=np.float64), LEAST_DOUBT, 1 - LEAST_DOUBT)
    if p.ndim != 1 or len(p) == 0 or not 0 < source_accuracy < 1:
        raise UserError(
            f"label shift: {p.size} answers, accuracy {source_accuracy}; needs answers and 0 < accuracy < 1 at the source"
        )
    right, wrong = p / source_accuracy, (1 - p) / (1 - source_accuracy)

    def loss(share: float) -> float:
        return -float(np.log(share * right + (1 - share) * wrong).sum())

    # The likelihood is concave in the share, so that a bounded search finds its one maximum.
    best = float(
        scipy.optimize.minimize_scalar(loss, bounds=(_EDGE, 1 - _EDGE), method="bounded", options={"xatol": 1e-9}).x
    )
    allowed = loss(best) + float(scipy.stats.chi2.ppf(level, 1)) / 2
    low = scipy.optimize.brentq(lambda share: loss(share) - allowed, _EDGE, best) if loss(_EDGE) > allowed else 0.0
    high = (
        scipy.optimize.brentq(lambda share: loss(share) - allowed, best, 1 - _EDGE)
        if loss(1 - _EDGE) > allowed
        else 1.0
    )
    return best, float(low), float(high)


def shift_between(source_accuracy: float, target_accuracy: float) -> float:
    """Log-odds of the new accuracy minus logit of the old, the new kept off 0 and 1."""
    target = min(max(target_accuracy, _EDGE), 1 - _EDGE)
    return math.log(target / (1 - target)) - math.log(source_accuracy / (1 - source_accuracy))
