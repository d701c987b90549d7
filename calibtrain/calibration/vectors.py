"""Calibrators of the whole vector of options: vector and matrix scaling, fitted to which option is right.

softmax(W z + b) over the log-probs z of C options: W diagonal (vector scaling, Guo et al. 2017, arXiv 1706.04599) or full
with off-diagonal and intercept regularisation (matrix scaling, ODIR of Kull et al. 2019, arXiv 1910.12656). The answer
given stays the likeliest option of z; what comes out is its probability under the calibrated vector, also where that makes
another option the likeliest: certificates are about the answers that are given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from calibtrain.calibration.scores import Array, Scores, softmax
from calibtrain.errors import UserError

Parameters = dict[str, Any]
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
"""ODIR's, to choose from: of the mean squares of off-diagonal weights and of intercepts, beside the summed log loss."""
FOLDS = 3
_PRECISION = 0.01
"""A Gaussian prior of standard deviation 10 about the identity keeps separable answers finite."""


def fit_vector_scaling(scores: Scores, correct: Array, weight: Array) -> Parameters:
    """softmax(w * z + b) of least log loss of the right option. UserError without options, or which are right."""
    z, right = _given(scores, "vector_scaling")
    return _named(_fit(z, right, weight, None), z.shape[1], None)


def refit_vector_scaling(scores: Scores, correct: Array, weights: Array) -> list[Parameters]:
    """The same for each row of weights (R, N)."""
    z, right = _given(scores, "vector_scaling")
    start = _fit(z, right, np.ones(len(z)), None)
    return [_named(_fit(z, right, weight, None, start), z.shape[1], None) for weight in weights]


def fit_matrix_scaling(scores: Scores, correct: Array, weight: Array) -> Parameters:
    """softmax(W z + b), its regularisation chosen of STRENGTHS by cross-validated log loss. UserError as above."""
    z, right = _given(scores, "matrix_scaling")
    strength = _chosen(z, right, weight)
    return _named(_fit(z, right, weight, strength), z.shape[1], strength)


def refit_matrix_scaling(scores: Scores, correct: Array, weights: Array) -> list[Parameters]:
    """The same for each row of weights (R, N), at the strength that all answers choose."""
    z, right = _given(scores, "matrix_scaling")
    everyone = np.ones(len(z))
    strength = _chosen(z, right, everyone)
    start = _fit(z, right, everyone, strength)
    return [_named(_fit(z, right, weight, strength, start), z.shape[1], strength) for weight in weights]


def apply_scaling(parameters: Parameters, scores: Scores) -> Array:
    """Probability (N,) of the answer given, the likeliest option before scaling."""
    z = _options(scores, "vector_scaling" if np.ndim(parameters["scale"]) == 1 else "matrix_scaling")
    return np.asarray(scaled(parameters, z)[np.arange(len(z)), z.argmax(1)])


def scaled(parameters: Parameters, options: Array) -> Array:
    """Calibrated probabilities (N, C) of options with log-probs (N, C). UserError for another number of options."""
    scale, bias = np.asarray(parameters["scale"], dtype=np.float64), np.asarray(parameters["bias"], dtype=np.float64)
    if options.shape[1] != len(bias):
        raise UserError(
            f"calibrator: fitted on {len(bias)} options, given {options.shape[1]}; it holds for as many alone, take "
            "calibration.method: temperature"
        )
    return softmax((options * scale if scale.ndim == 1 else options @ scale.T) + bias)


def _fit(
    z: Array, right: NDArray[np.bool_], weight: Array, strength: float | None, start: Array | None = None
) -> Array:
    """Scales and intercepts, (2C,) without a strength, (C² + C,) with one."""
    count = z.shape[1]
    full = strength is not None
    eye = np.eye(count)
    identity = np.concatenate([eye.ravel() if full else np.ones(count), np.zeros(count)])
    penalty = np.full(len(identity), _PRECISION)
    if strength is not None:
        penalty[: count * count] += 2 * strength / (count * (count - 1)) * (1 - eye).ravel()
        penalty[count * count :] += 2 * strength / count

    def loss(parameters: Array) -> tuple[float, Array]:
        scale, bias = parameters[:-count], parameters[-count:]
        logits = (z @ scale.reshape(count, count).T if full else z * scale) + bias
        logits -= logits.max(1, keepdims=True)
        exp = np.exp(logits)
        mass = np.maximum((exp * right).sum(1), 1e-300)
        value = weight @ (np.log(exp.sum(1)) - np.log(mass))
        by_logit = weight[:, None] * (exp / exp.sum(1, keepdims=True) - exp * right / mass[:, None])
        by_scale = (by_logit.T @ z).ravel() if full else (by_logit * z).sum(0)
        off = parameters - identity
        return float(value + off @ (penalty * off) / 2), np.concatenate([by_scale, by_logit.sum(0)]) + penalty * off

    options = {"ftol": 1e-12, "gtol": 1e-7, "maxiter": 500}
    begin = identity if start is None else start
    return np.asarray(scipy.optimize.minimize(loss, begin, jac=True, method="L-BFGS-B", options=options).x)


def _chosen(z: Array, right: NDArray[np.bool_], weight: Array) -> float:
    """The strength of least log loss on answers left out of the fit; folds by row number."""
    fold = np.arange(len(z)) % FOLDS
    losses = []
    for strength in STRENGTHS:
        total = 0.0
        for one in range(FOLDS):
            held = fold == one
            if not held.any() or held.all():
                continue
            found = _named(_fit(z[~held], right[~held], weight[~held], strength), z.shape[1], strength)
            mass = (scaled(found, z[held]) * right[held]).sum(1)
            total -= float(weight[held] @ np.log(np.maximum(mass, 1e-300)))
        losses.append(total)
    return STRENGTHS[int(np.argmin(losses))]


def _named(parameters: Array, count: int, strength: float | None) -> Parameters:
    scale = parameters[:-count]
    named = {"scale": (scale if strength is None else scale.reshape(count, count)).tolist()}
    named["bias"] = parameters[-count:].tolist()
    return named if strength is None else {**named, "regularisation": strength}


def _given(scores: Scores, method: str) -> tuple[Array, NDArray[np.bool_]]:
    """Log-probs (N, C) of the options and which are right."""
    z = _options(scores, method)
    if scores.right is None or not scores.right.any(1).all():
        raise UserError(f"{method} calibrator: needs a right option of every answer: scores_of(options=..., right=...)")
    return z, scores.right


def _options(scores: Scores, method: str) -> Array:
    if scores.options is None:
        raise UserError(
            f"{method} calibrator: needs answers chosen by likelihood among equally many options: task.kind: label, or "
            "choice with as many options for every question, and task.answer_by: likelihood; else take "
            "calibration.method: temperature"
        )
    return scores.options
