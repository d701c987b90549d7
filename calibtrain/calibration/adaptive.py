"""A temperature for each token, read off the hidden state that predicts it (adaptive temperature scaling).

After Xie, Chen, Lee, Mitchell, Finn 2024 (arXiv 2409.19817): log T_t = w . h_t + b. There the head is fitted to
the tokens of a corpus; here to whether the model's own whole answers are right, so that the answer's probability
q = prod_t softmax(z_t / T_t)[y_t] is what gets calibrated. w lies in the span of the hidden states' leading principal
components, each of which may move log T by a standard deviation of 1/4 a priori: some hundred answers cannot fit
hundreds of weights.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy

from calibtrain.calibration.scores import LEAST_DOUBT, TEMPERATURE_GRID, Array, Scores, TokenScores
from calibtrain.errors import UserError

Parameters = dict[str, Any]
COMPONENTS = 16
_COMPONENT_SCALE = 0.25
_REACH = math.log(TEMPERATURE_GRID[-1])
"""log T is squashed into the range of the grid, +- this, where the log-probs are known."""


def fit_adaptive(scores: Scores, correct: Array, weight: Array) -> Parameters:
    """Weights (H,) and bias of the head, of largest posterior given right or wrong."""
    tokens = _tokens(scores)
    hidden = np.asarray(tokens.hidden, dtype=np.float64)
    centre = hidden.mean(0)
    axes = _whitening(hidden - centre)
    features = (hidden - centre) @ axes
    spline = scipy.interpolate.CubicSpline(np.log(TEMPERATURE_GRID), tokens.table, axis=1)

    def loss(parameters: Array) -> tuple[float, Array]:
        raw = features @ parameters[1:] + parameters[0]
        logprob, slope = _token_logprobs(spline, _squash(raw))
        answer = np.minimum(np.bincount(tokens.answer, logprob, minlength=len(scores)), 0.0)
        doubt = np.maximum(-np.expm1(answer), LEAST_DOUBT)
        value = -(weight * (correct * answer + (1 - correct) * np.log(doubt))).sum()
        by_answer = weight * ((1 - correct) * np.exp(answer) / doubt - correct)
        by_raw = by_answer[tokens.answer] * slope * (1 - np.tanh(raw / _REACH) ** 2)
        prior = parameters * np.append(1.0, np.full(features.shape[1], _COMPONENT_SCALE**-2))
        return float(value + parameters @ prior / 2), np.append(by_raw.sum(), features.T @ by_raw) + prior

    found = scipy.optimize.minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B").x
    weights = axes @ found[1:]
    return {"weight": weights.tolist(), "bias": float(found[0] - centre @ weights)}


def apply_adaptive(parameters: Parameters, scores: Scores) -> Array:
    """Confidences (N,) at the head's temperatures."""
    tokens = _tokens(scores)
    spline = scipy.interpolate.CubicSpline(np.log(TEMPERATURE_GRID), tokens.table, axis=1)
    logprob, _ = _token_logprobs(spline, np.log(token_temperatures(parameters, tokens)))
    return np.asarray(np.exp(np.minimum(np.bincount(tokens.answer, logprob, minlength=len(scores)), 0.0)))


def token_temperatures(parameters: Parameters, tokens: TokenScores) -> Array:
    """The head's temperature (T,) for each token. UserError for hidden states of another width."""
    weights = np.asarray(parameters["weight"], dtype=np.float64)
    if tokens.hidden.shape[1] != len(weights):
        raise UserError(
            f"adaptive temperature: fitted on hidden states of width {len(weights)}, given {tokens.hidden.shape[1]}"
        )
    return np.asarray(np.exp(_squash(np.asarray(tokens.hidden, dtype=np.float64) @ weights + parameters["bias"])))


def _whitening(centred: Array) -> Array:
    """Axes (H, R) on which the centred hidden states (T, H) have variance 1: their leading principal components."""
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    kept = min(COMPONENTS, int((singular > 1e-6 * singular[0]).sum())) if singular[0] > 0 else 0
    return np.asarray(axes[:kept].T * (math.sqrt(len(centred)) / singular[:kept]))


def _token_logprobs(spline: scipy.interpolate.CubicSpline, log_t: Array) -> tuple[Array, Array]:
    """Each token's log-prob (T,) at its own log temperature, and its slope there."""
    place = np.clip(np.searchsorted(spline.x, log_t, side="right") - 1, 0, len(spline.x) - 2)
    a, b, c, d = spline.c[:, place, np.arange(len(log_t))]
    x = log_t - spline.x[place]
    return ((a * x + b) * x + c) * x + d, (3 * a * x + 2 * b) * x + c


def _squash(raw: Array) -> Array:
    return np.asarray(_REACH * np.tanh(raw / _REACH))


def _tokens(scores: Scores) -> TokenScores:
    if scores.tokens is None:
        raise UserError("adaptive temperature: needs the answers' tokens: scores_of(..., tokens=TokenScores(...))")
    return scores.tokens
