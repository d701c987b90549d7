"""Calibrating maps of a confidence: Platt, beta, isotonic, histogram; and vector scaling of multiple-choice options.

Each is two pure functions: `fit_*(scores, correct, weight) -> parameters` (plain numbers and lists, for JSON) and
`apply_*(parameters, scores) -> probabilities (N,)`. `weight` (N,) counts how often each answer is taken, as bootstrap
draws do. `calibtrain.calibration.calibrators` adds intervals, guards and JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from calibtrain.calibration.scores import LEAST_DOUBT, Array, Scores, logit, sigmoid, softmax
from calibtrain.errors import UserError

Parameters = dict[str, Any]
HISTOGRAM_BINS = 15
_BETA_PRECISION = 0.01
_VECTOR_PRECISION = 1.0


def fit_platt(scores: Scores, correct: Array, weight: Array) -> Parameters:
    """sigma(slope * logit(q) + intercept) of least log loss against Platt's smoothed targets (Platt 1999).

    The targets (n_right + 1) / (n_right + 2) and 1 / (n_wrong + 2) keep the slope finite on separable answers.
    """
    right, wrong = float(weight @ correct), float(weight @ (1 - correct))
    targets = np.where(correct > 0, (right + 1) / (right + 2), 1 / (wrong + 2))
    x = np.stack([logit(scores.confidence), np.ones(len(scores))], axis=1)
    slope, intercept = _logistic(x, targets, weight, start=(1.0, 0.0), precision=1e-6)
    return {"slope": float(slope), "intercept": float(intercept)}


def apply_platt(parameters: Parameters, scores: Scores) -> Array:
    """Probabilities (N,) of `fit_platt`'s parameters."""
    return sigmoid(parameters["slope"] * logit(scores.confidence) + parameters["intercept"])


def fit_beta(scores: Scores, correct: Array, weight: Array) -> Parameters:
    """sigma(a ln q - b ln(1 - q) + c) with a, b >= 0 (Kull, Silva Filho, Flach 2017); the identity at a = b = 1, c = 0.

    A Gaussian prior of standard deviation 10 about the identity keeps separable answers finite.
    """
    bounds = ((0.0, None), (0.0, None), (None, None))
    a, b, c = _logistic(
        _beta_features(scores), correct, weight, start=(1.0, 1.0, 0.0), precision=_BETA_PRECISION, bounds=bounds
    )
    return {"a": float(a), "b": float(b), "c": float(c)}


def apply_beta(parameters: Parameters, scores: Scores) -> Array:
    """Probabilities (N,) of `fit_beta`'s parameters."""
    return sigmoid(_beta_features(scores) @ np.array([parameters["a"], parameters["b"], parameters["c"]]))


def fit_isotonic(scores: Scores, correct: Array, weight: Array) -> Parameters:
    """Monotone map of least squared error (Zadrozny, Elkan 2002), linear between its knots.

    One answer more, right, at the lowest confidence and one, wrong, at the highest keep its ends off 0 and 1. Flat
    stretches tie answers that differed before, which changes AUROC.
    """
    from sklearn.isotonic import IsotonicRegression

    q = scores.confidence
    used = weight > 0
    ends = [q[used].min(), q[used].max()]
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(
        np.append(q[used], ends), np.append(correct[used], [1.0, 0.0]), sample_weight=np.append(weight[used], [1, 1])
    )
    return {"x": fitted.X_thresholds_.tolist(), "y": fitted.y_thresholds_.tolist()}


def apply_isotonic(parameters: Parameters, scores: Scores) -> Array:
    """Probabilities (N,) of `fit_isotonic`'s parameters."""
    return np.interp(scores.confidence, parameters["x"], parameters["y"])


def isotonic_at_knots(parameters: Parameters, reference: Parameters) -> Parameters:
    """The map's values at another fit's knots, so that bootstrap draws can be compared."""
    return {"y": np.interp(reference["x"], parameters["x"], parameters["y"]).tolist()}


def fit_histogram(scores: Scores, correct: Array, weight: Array, bins: int = HISTOGRAM_BINS) -> Parameters:
    """Accuracy in bins of equally many answers (Zadrozny, Elkan 2001), ties together.

    An accuracy is kept at least 1 / (n + 2) from 0 and 1, n being the answers in the bin: a few right answers are no
    certainty.
    """
    q = scores.confidence
    # Edges lie at confidences: an answer is in the bin of the last edge below or at it.
    edges = np.unique(np.quantile(q, np.arange(1, bins) / bins, method="higher"))
    edges = edges[edges > q.min()]
    place = np.searchsorted(edges, q, side="right")
    count = np.bincount(place, weight, minlength=len(edges) + 1)
    right = np.bincount(place, weight * correct, minlength=len(edges) + 1)
    # A bootstrap draw may leave a bin without answers: it then says what all answers say.
    share = np.where(count > 0, right / np.maximum(count, 1), float(weight @ correct) / max(float(weight.sum()), 1.0))
    value = np.clip(share, 1 / (count + 2), (count + 1) / (count + 2))
    return {"edges": edges.tolist(), "values": value.tolist()}


def apply_histogram(parameters: Parameters, scores: Scores) -> Array:
    """Probabilities (N,) of `fit_histogram`'s parameters."""
    place = np.searchsorted(np.asarray(parameters["edges"]), scores.confidence, side="right")
    return np.asarray(parameters["values"], dtype=np.float64)[place]


def histogram_values(parameters: Parameters, estimate: Parameters) -> Parameters:
    """The fitted values; the edges depend on the confidences alone, so draws agree in them."""
    return {"values": parameters["values"]}


def fit_vector(scores: Scores, correct: Array, weight: Array) -> Parameters:
    """softmax(w * z + b) over the options of multiple-choice questions (Guo et al. 2017, arXiv 1706.04599).

    The answer given is the likeliest option of z; its probability is fitted to right or wrong, which is all that a
    grade says. log w ~ N(0, 1) and b ~ N(0, 1).
    """
    z = _options(scores)
    options = z.shape[1]
    chosen = z.argmax(1)
    rows = np.arange(len(z))

    def loss(parameters: Array) -> tuple[float, Array]:
        scale, bias = np.exp(parameters[:options]), parameters[options:]
        p = softmax(scale * z + bias)
        own = np.clip(p[rows, chosen], LEAST_DOUBT, 1 - LEAST_DOUBT)
        value = -(weight * (correct * np.log(own) + (1 - correct) * np.log1p(-own))).sum()
        # d loss / d log(own) is -c + (1 - c) own / (1 - own); d log(own) / d logits is onehot - p.
        by_log = weight * ((1 - correct) * own / (1 - own) - correct)
        by_logit = -by_log[:, None] * p
        by_logit[rows, chosen] += by_log
        gradient = np.concatenate([(by_logit * z).sum(0) * scale, by_logit.sum(0)])
        prior = _VECTOR_PRECISION * parameters
        return float(value + parameters @ prior / 2), gradient + prior

    found = scipy.optimize.minimize(loss, np.zeros(2 * options), jac=True, method="L-BFGS-B").x
    return {"scale": np.exp(found[:options]).tolist(), "bias": found[options:].tolist()}


def apply_vector(parameters: Parameters, scores: Scores) -> Array:
    """Probabilities (N,) that the likeliest option is right."""
    z = _options(scores)
    if z.shape[1] != len(parameters["bias"]):
        raise UserError(f"vector calibrator: fitted on {len(parameters['bias'])} options, given {z.shape[1]}")
    p = softmax(np.asarray(parameters["scale"]) * z + np.asarray(parameters["bias"]))
    return np.asarray(p[np.arange(len(z)), z.argmax(1)])


def _logistic(
    x: Array,
    targets: Array,
    weight: Array,
    *,
    start: Sequence[float],
    precision: float,
    bounds: Sequence[tuple[float | None, float | None]] | None = None,
) -> Array:
    """Coefficients of logistic regression on targets in [0, 1], with a Gaussian prior about `start`."""
    centre = np.array(start)

    def loss(coefficients: Array) -> tuple[float, Array]:
        z = x @ coefficients
        off = coefficients - centre
        value = weight @ (np.logaddexp(0.0, z) - targets * z) + precision / 2 * (off @ off)
        return float(value), x.T @ (weight * (sigmoid(z) - targets)) + precision * off

    options = {"ftol": 1e-12, "gtol": 1e-8, "maxiter": 1000}
    return np.asarray(
        scipy.optimize.minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    )


def _beta_features(scores: Scores) -> Array:
    q = np.clip(scores.confidence, LEAST_DOUBT, 1 - LEAST_DOUBT)
    return np.stack([np.log(q), -np.log1p(-q), np.ones(len(q))], axis=1)


def _options(scores: Scores) -> Array:
    if scores.options is None:
        raise UserError("vector calibrator: needs log-probs of the options: scores_of(options=...)")
    return scores.options
