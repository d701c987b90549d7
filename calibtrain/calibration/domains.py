"""A temperature for each domain, shrunk towards the common one by how much the domains truly differ.

log T_d ~ N(log T_0, spread^2), log T_0 ~ N(0, 1), spread half-normal with scale 1/2. A domain of few answers stays near
T_0, one of many is free, and a domain never seen gets T_0. Nothing is sampled: every integral is a sum on the grid of
log T, so estimates are posterior means (of log T) and intervals are posterior quantiles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import logsumexp

from calibtrain.calibration.scores import Array, Scores
from calibtrain.calibration.temperature import interpolate_logprobs, loss_curve, table_of
from calibtrain.errors import UserError

Parameters = dict[str, Any]
_SPREADS = np.geomspace(0.02, 1.5, 16)
_SPREAD_SCALE = 0.5
_STRIDE = 4
"""Every so many of the temperature fit's candidates, 0.02 apart in log T, are enough here."""


def fit_domains(scores: Scores, correct: Array, weight: Array) -> Parameters:
    """Posterior mean of log T for every domain and for all; parameters for `apply_domains`."""
    log_t, common, spread, per_domain = _posterior(scores, correct, weight)
    return {
        "temperature": math.exp(common @ log_t),
        "spread": float(spread @ _SPREADS),
        "names": list(per_domain),
        "temperatures": [math.exp(p @ log_t) for p in per_domain.values()],
    }


def domain_intervals(scores: Scores, correct: Array, weight: Array, level: float) -> tuple[Parameters, Parameters]:
    """Lower and upper ends of the credible intervals of `fit_domains`'s parameters."""
    log_t, common, spread, per_domain = _posterior(scores, correct, weight)
    low, high = (
        {
            "temperature": math.exp(_quantile(log_t, common, share)),
            "spread": _quantile(_SPREADS, spread, share),
            "temperatures": [math.exp(_quantile(log_t, p, share)) for p in per_domain.values()],
        }
        for share in ((1 - level) / 2, (1 + level) / 2)
    )
    return low, high


def apply_domains(parameters: Parameters, scores: Scores) -> Array:
    """Confidences (N,), each at its domain's temperature, or at the common one where the domain was never seen."""
    table, names = table_of(scores), np.array(_domains(scores), dtype=str)
    known: dict[str, float] = dict(zip(parameters["names"], parameters["temperatures"], strict=True))
    common = float(parameters["temperature"])
    found = np.empty(len(table))
    for name in np.unique(names):
        rows = np.flatnonzero(names == name)
        found[rows] = np.exp(interpolate_logprobs(table[rows], known.get(str(name), common)))
    return found


def _posterior(scores: Scores, correct: Array, weight: Array) -> tuple[Array, Array, Array, dict[str, Array]]:
    """The grid of log T (L,), and the posteriors of log T_0 (L,), of the spread (S,) and of every domain's log T (L,)."""
    log_t, losses = loss_curve(table_of(scores), correct)
    log_t, losses = log_t[::_STRIDE], losses[:, ::_STRIDE]
    names = np.array(_domains(scores), dtype=str)
    # kernel[s, i, j]: chance of a domain's log T_j given the common log T_i and spread s.
    distance = (log_t[None, :, None] - log_t[None, None, :]) / _SPREADS[:, None, None]
    kernel = np.exp(-(distance**2) / 2)
    kernel /= kernel.sum(2, keepdims=True)
    likelihood = {str(name): _relative(weight[names == name] @ losses[names == name]) for name in np.unique(names)}
    evidence = {name: np.maximum(kernel @ one, 1e-300) for name, one in likelihood.items()}  # (S, L)
    # The spreads are spaced evenly in their logarithm: a spread's cell is as wide as the spread is large.
    prior = -(log_t[None, :] ** 2) / 2 + (np.log(_SPREADS) - (_SPREADS / _SPREAD_SCALE) ** 2 / 2)[:, None]
    joint = prior + sum(np.log(one) for one in evidence.values())
    joint = np.exp(joint - logsumexp(joint))
    per_domain = {
        name: _normalized(likelihood[name] * np.einsum("si,sij->j", joint / evidence[name], kernel))
        for name in evidence
    }
    return log_t, joint.sum(0), joint.sum(1), per_domain


def _relative(loss: Array) -> Array:
    return np.asarray(np.exp(loss.min() - loss))


def _normalized(weights: Array) -> Array:
    return np.asarray(weights / weights.sum())


def _quantile(values: Array, probability: Array, share: float) -> float:
    return float(np.interp(share, np.cumsum(probability) - probability / 2, values))


def _domains(scores: Scores) -> tuple[str, ...]:
    if scores.domains is None:
        raise UserError("domain temperature: needs the domain of each answer: scores_of(..., domains=...)")
    return scores.domains
