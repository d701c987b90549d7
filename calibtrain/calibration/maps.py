"""Calibrating maps of a confidence: Platt, beta, isotonic, histogram; and vector scaling of multiple-choice options.

Each is two pure functions: `fit_*(scores, correct, weight) -> parameters` (plain numbers and lists, for JSON) and
`apply_*(parameters, scores) -> probabilities (N,)`. `weight` (N,) counts how often each answer is taken, as bootstrap
draws do. `calibtrain.calibration.calibrators` adds intervals, guards and JSON.

Confidences are read by their logarithm, since those of long answers are 1e-30 and less. Files of earlier versions kept them
LEAST_DOUBT away from 0 (no `least` beside slope or a, b, c), or hold confidences (`x`, `edges`): they tell what they told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from calibtrain.calibration.scores import LEAST_DOUBT, Array, Scores, logit, scores_of, sigmoid, softmax
from calibtrain.errors import UserError

Parameters = dict[str, Any]
HISTOGRAM_BINS = 15
UNCLIPPED: Parameters = {"least": 0}
"""Marks parameters that were fitted to confidences as small as they are."""
_BETA_PRECISION = 0.01
_VECTOR_PRECISION = 1.0


def fit_platt(scores: Scores, correct: Array, weight: Array) -> Parameters:
    """sigma(slope * logit(q) + intercept) of least log loss against Platt's smoothed targets (Platt 1999).

    The targets (n_right + 1) / (n_right + 2) and 1 / (n_wrong + 2) keep the slope finite on separable answers.
    """
    right, wrong = float(weight @ correct), float(weight @ (1 - correct))
    targets = np.where(correct > 0, (right + 1) / (right + 2), 1 / (wrong + 2))
    x = np.stack([scores.log_odds, np.ones(len(scores))], axis=1)
    slope, intercept = _logistic(x, targets, weight, prior=(1.0, 0.0), precision=1e-6)
    return {"slope": float(slope), "intercept": float(intercept), **UNCLIPPED}


def apply_platt(parameters: Parameters, scores: Scores) -> Array:
    """Probabilities (N,) of `fit_platt`'s parameters."""
    return sigmoid(parameters["slope"] * log_odds_as_fitted(parameters, scores) + parameters["intercept"])


def log_odds_as_fitted(parameters: Parameters, scores: Scores) -> Array:
    """Log-odds (N,) of the confidences, clipped where the fit, of an earlier version, had clipped them."""
    return scores.log_odds if "least" in parameters else logit(scores.confidence)


def without_marks(parameters: Parameters, estimate: Parameters) -> Parameters:
    """The fitted numbers alone."""
    return {name: value for name, value in parameters.items() if name not in UNCLIPPED}


def fit_beta(scores: Scores, correct: Array, weight: Array) -> Parameters:
    """sigma(a ln q - b ln(1 - q) + c) with a, b >= 0 (Kull, Silva Filho, Flach 2017); the identity at a = b = 1, c = 0.

    A Gaussian prior of standard deviation 10 about the identity keeps separable answers finite.
    """
    bounds = ((0.0, None), (0.0, None), (None, None))
    a, b, c = _logistic(
        _beta_features(scores), correct, weight, prior=(1.0, 1.0, 0.0), precision=_BETA_PRECISION, bounds=bounds
    )
    return {"a": float(a), "b": float(b), "c": float(c), **UNCLIPPED}


def apply_beta(parameters: Parameters, scores: Scores) -> Array:
    """Probabilities (N,) of `fit_beta`'s parameters."""
    if "least" not in parameters:
        scores = scores_of(np.clip(scores.confidence, LEAST_DOUBT, 1 - LEAST_DOUBT))
    return sigmoid(_beta_features(scores) @ np.array([parameters["a"], parameters["b"], parameters["c"]]))


def fit_isotonic(scores: Scores, correct: Array, weight: Array) -> Parameters:
    """Monotone map of least squared error (Zadrozny, Elkan 2002), linear between its knots.

    One answer more, right, at the lowest confidence and one, wrong, at the highest keep its ends off 0 and 1. Flat
    stretches tie answers that differed before, which changes AUROC.
    """
    from sklearn.isotonic import IsotonicRegression

    x = scores.log_confidence  # scikit-learn ties what differs by less than 1e-15, as confidences of long answers do
    used = weight > 0
    ends = [x[used].min(), x[used].max()]
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(
        np.append(x[used], ends), np.append(correct[used], [1.0, 0.0]), sample_weight=np.append(weight[used], [1, 1])
    )
    return {"log_x": fitted.X_thresholds_.tolist(), "y": fitted.y_thresholds_.tolist()}


def apply_isotonic(parameters: Parameters, scores: Scores) -> Array:
    """Probabilities (N,) of `fit_isotonic`'s parameters."""
    if "log_x" not in parameters:
        return np.interp(scores.confidence, parameters["x"], parameters["y"])
    return _interpolated(scores.log_confidence, parameters["log_x"], parameters["y"])


def _interpolated(log_q: Array, log_x: Sequence[float], y: Sequence[float]) -> Array:
    """np.interp(q, x, y) of logarithms: linear in q between knots that may all lie below the smallest number."""
    knots, values = np.asarray(log_x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(knots) == 1:
        return np.full(len(log_q), values[0])
    at = np.clip(np.asarray(log_q), knots[0], knots[-1])
    above = np.clip(np.searchsorted(knots, at, side="left"), 1, len(knots) - 1)
    low, high = knots[above - 1], knots[above]
    # (q - x0) / (x1 - x0), all over x1.
    share = np.exp(at - high) * np.expm1(low - at) / np.expm1(low - high)
    return np.asarray(values[above - 1] + np.clip(share, 0.0, 1.0) * (values[above] - values[above - 1]))


def isotonic_at_knots(parameters: Parameters, reference: Parameters) -> Parameters:
    """The map's values at another fit's knots, so that bootstrap draws can be compared."""
    return {"y": _interpolated(np.asarray(reference["log_x"]), parameters["log_x"], parameters["y"]).tolist()}


def fit_histogram(scores: Scores, correct: Array, weight: Array, bins: int = HISTOGRAM_BINS) -> Parameters:
    """Accuracy in bins of equally many answers (Zadrozny, Elkan 2001), ties together.

    An accuracy is kept at least 1 / (n + 2) from 0 and 1, n being the answers in the bin: a few right answers are no
    certainty.
    """
    q = scores.log_confidence
    # Edges lie at confidences: an answer is in the bin of the last edge below or at it.
    edges = np.unique(np.quantile(q, np.arange(1, bins) / bins, method="higher"))
    edges = edges[edges > q.min()]
    place = np.searchsorted(edges, q, side="right")
    count = np.bincount(place, weight, minlength=len(edges) + 1)
    right = np.bincount(place, weight * correct, minlength=len(edges) + 1)
    # A bootstrap draw may leave a bin without answers: it then says what all answers say.
    share = np.where(count > 0, right / np.maximum(count, 1), float(weight @ correct) / max(float(weight.sum()), 1.0))
    value = np.clip(share, 1 / (count + 2), (count + 1) / (count + 2))
    return {"log_edges": edges.tolist(), "values": value.tolist()}


def apply_histogram(parameters: Parameters, scores: Scores) -> Array:
    """Probabilities (N,) of `fit_histogram`'s parameters."""
    if "log_edges" in parameters:
        place = np.searchsorted(np.asarray(parameters["log_edges"]), scores.log_confidence, side="right")
    else:
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
    prior: Sequence[float],
    precision: float,
    bounds: Sequence[tuple[float | None, float | None]] | None = None,
) -> Array:
    """Coefficients of logistic regression on targets in [0, 1], with a Gaussian prior; the last column of x is 1.

    Solved for in columns of mean 0 and a curvature of about 1, so that answers of any length are as well told apart. It
    starts where no column but the prior's second says anything: log-odds of -80 as they are leave every sigmoid at 0.
    """
    centre, total = np.array(prior), float(weight.sum())
    mean = np.append(weight @ x[:, :-1] / total, 0.0)
    spread = np.append(weight @ (x[:, :-1] - mean[:-1]) ** 2 / total, 1.0)
    scale = np.sqrt(total / 4 * spread + precision)
    columns = (x - mean) / scale
    # Coefficients of x, of those of `columns`: a shift of a column goes to the intercept.
    back = np.diag(1 / scale)
    back[-1, :-1] = -mean[:-1] / scale[:-1]

    def loss(scaled: Array) -> tuple[float, Array]:
        z = columns @ scaled
        off = back @ scaled - centre
        value = weight @ (np.logaddexp(0.0, z) - targets * z) + precision / 2 * (off @ off)
        return float(value), columns.T @ (weight * (sigmoid(z) - targets)) + precision * (back.T @ off)

    start = centre * scale
    start[0], start[-1] = 0.0, scale[-1] * float(logit(weight @ targets / total))
    options = {"ftol": 1e-12, "gtol": 1e-8, "maxiter": 1000}
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return np.asarray(back @ found.x)


def _beta_features(scores: Scores) -> Array:
    return np.stack([scores.log_confidence, scores.log_doubt, np.ones(len(scores))], axis=1)


def _options(scores: Scores) -> Array:
    if scores.options is None:
        raise UserError("vector calibrator: needs log-probs of the options: scores_of(options=...)")
    return scores.options
