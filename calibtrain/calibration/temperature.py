"""Temperature for answer confidences: dividing the token logits by T, with T fitted on held-out graded answers.

An answer's confidence is q = prod_t softmax(z_t)[y_t]. Temperature rescales every token's logits,
q_T = prod_t softmax(z_t / T)[y_t], so q_T is no function of q: the fit needs the answers' log-probs at several T. They
come as a table (N, K) on a grid of K temperatures, interpolated by a cubic spline in log T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike

from calibtrain.calibration.scores import LEAST_DOUBT, TEMPERATURE_GRID, Array, Scores
from calibtrain.errors import UserError

_FIT_STEP = 0.005
"""Spacing in log T of the candidates the likelihood is computed at, before a parabola through the best three."""


def fit_temperature(scores: Scores, correct: Array, weight: Array) -> dict[str, Any]:
    """Maximum a posteriori T of right/wrong given q_T, with log T ~ N(0, 1), which decides when the data is separable.

    correct (N,) in [0, 1]: grades, or another model's confidences to be matched; weight (N,).
    """
    log_t, losses = loss_curve(table_of(scores), correct)
    return {"temperature": math.exp(_minimum(log_t, weight @ losses + log_t**2 / 2))}


def refit_temperature(scores: Scores, correct: Array, weights: Array) -> list[dict[str, Any]]:
    """`fit_temperature` for each row of weights (R, N), at the cost of little more than one fit."""
    log_t, losses = loss_curve(table_of(scores), correct)
    return [{"temperature": math.exp(_minimum(log_t, total))} for total in weights @ losses + log_t**2 / 2]


def apply_temperature(parameters: dict[str, Any], scores: Scores) -> Array:
    """Confidences (N,) at the fitted temperature."""
    return np.asarray(np.exp(interpolate_logprobs(table_of(scores), parameters["temperature"])))


def table_of(scores: Scores) -> Array:
    """The answers' log-prob table (N, K); UserError where only confidences are given."""
    if scores.table is None:
        raise UserError(
            "temperature calibrator: needs the answers' log-probs at each temperature, not only their confidence; "
            "give a log-prob table, or take platt, beta, isotonic or histogram"
        )
    return scores.table


def loss_curve(
    logprob_table: ArrayLike, correct: ArrayLike, temperatures: Sequence[float] = TEMPERATURE_GRID
) -> tuple[Array, Array]:
    """Log temperatures (L,), evenly spaced, and each answer's log loss (N, L) of right/wrong at them.

    correct (N,) in [0, 1]. Raises UserError for malformed input.
    """
    table, grades, grid = _checked(logprob_table, correct, temperatures)
    log_t = _candidates(grid)
    return log_t, _log_loss(_interpolate(table, grid, log_t), grades)


def optimal_temperature(
    logprob_table: ArrayLike,
    correct: ArrayLike,
    temperatures: Sequence[float] = TEMPERATURE_GRID,
    *,
    score: Literal["log", "brier"] = "log",
) -> float:
    """T at which the answers' proper score is least, with log T ~ N(0, 1) as in `fit_temperature`.

    logprob_table (N, K): log-prob of each answer at each of the K ascending `temperatures`, which must reach across 1;
    correct (N,) bool or 0/1. Raises UserError for malformed input.
    """
    table, grades, grid = _checked(logprob_table, correct, temperatures)
    log_t = _candidates(grid)
    logprob = _interpolate(table, grid, log_t)
    losses = _log_loss(logprob, grades) if score == "log" else (np.exp(logprob) - grades[:, None]) ** 2
    return math.exp(_minimum(log_t, losses.sum(0) + log_t**2 / 2))


def tabulate(logprob_at: Callable[[float], ArrayLike], temperatures: Sequence[float] = TEMPERATURE_GRID) -> Array:
    """Log-prob table (N, K) float64 from a function that gives the answers' log-probs (N,) at one temperature."""
    return np.stack([np.asarray(logprob_at(t), dtype=np.float64) for t in temperatures], axis=1)


def interpolate_logprobs(
    logprob_table: ArrayLike, temperature: float, temperatures: Sequence[float] = TEMPERATURE_GRID
) -> Array:
    """Answer log-probs (N,) at any temperature within the grid of the table (N, K)."""
    table, grid = _checked_table(logprob_table, temperatures)
    at = math.log(temperature)
    if not grid[0] - 1e-9 <= at <= grid[-1] + 1e-9:
        raise UserError(
            f"temperature {temperature:.3g} is outside the table's {temperatures[0]:g}..{temperatures[-1]:g}: "
            "score the answers on a wider grid"
        )
    return np.asarray(_interpolate(table, grid, np.array([at]))[:, 0])


def _interpolate(table: Array, grid: Array, at: Array) -> Array:
    """Table (N, K) at other log temperatures (L,): (N, L), never above log 1."""
    return np.minimum(scipy.interpolate.CubicSpline(grid, table, axis=1)(at), 0.0)


def _log_loss(logprob: Array, correct: Array) -> Array:
    """-[c log q + (1 - c) log(1 - q)] for log q (N, L) and grades (N,) in [0, 1]."""
    c = correct[:, None]
    return -(c * logprob + (1 - c) * np.log(np.maximum(-np.expm1(logprob), LEAST_DOUBT)))


def _candidates(grid: Array) -> Array:
    """Evenly spaced log temperatures over the grid."""
    return np.linspace(grid[0], grid[-1], math.ceil((grid[-1] - grid[0]) / _FIT_STEP) + 1)


def _minimum(x: Array, values: Array) -> float:
    """Where `values` on the even grid `x` are least, refined by a parabola through the least and its neighbours."""
    i = int(np.argmin(values))
    if i in (0, len(x) - 1):
        return float(x[i])
    left, middle, right = values[i - 1 : i + 2]
    curvature = left - 2 * middle + right
    return float(x[i] + ((x[1] - x[0]) * (left - right) / (2 * curvature) if curvature > 0 else 0.0))


def _checked_table(logprob_table: ArrayLike, temperatures: Sequence[float]) -> tuple[Array, Array]:
    """Table (N, K) and log temperatures (K,); UserError for what cannot be interpolated."""
    table, grid = np.asarray(logprob_table, dtype=np.float64), np.asarray(temperatures, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 4 or (grid <= 0).any() or (np.diff(grid) <= 0).any():
        raise UserError("temperatures: give at least 4 positive ones in ascending order")
    if table.ndim != 2 or table.shape[1] != len(grid):
        raise UserError(f"log-prob table has shape {table.shape}, expected (answers, {len(grid)} temperatures)")
    bad = ~np.isfinite(table) | (table > 1e-4)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise UserError(
            f"log-prob table: answer {row} at temperature {grid[column]:.3g} has log-prob {table[row, column]}; "
            "expected finite natural logarithms of probabilities"
        )
    return table, np.log(grid)


def _checked(logprob_table: ArrayLike, correct: ArrayLike, temperatures: Sequence[float]) -> tuple[Array, Array, Array]:
    """Table, grades and log temperatures of a fit; UserError for malformed ones."""
    table, grid = _checked_table(logprob_table, temperatures)
    grades = np.asarray(correct, dtype=np.float64)
    if grades.shape != (len(table),) or len(grades) == 0:
        raise UserError(f"temperature fit: {len(table)} answers with {grades.size} grades; give one grade per answer")
    if not ((grades >= 0) & (grades <= 1)).all():
        raise UserError("temperature fit: grades must lie between 0 and 1; leave ungraded answers out")
    if not grid[0] < 0 < grid[-1]:
        raise UserError(f"temperatures {temperatures[0]:g}..{temperatures[-1]:g} must reach across 1")
    return table, grades, grid
