"""Temperature for answer confidences: dividing the token logits by T, with T fitted on held-out graded answers.

An answer's confidence is q = prod_t softmax(z_t)[y_t]. Temperature rescales every token's logits,
q_T = prod_t softmax(z_t / T)[y_t], so q_T is no function of q: the fit needs the answers' log-probs at several T. They
come as a table (N, K) on a grid of K temperatures, interpolated by a cubic spline in log T.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicSpline

from calibtrain.calibration.intervals import poisson_weights
from calibtrain.errors import UserError

Array = NDArray[np.float64]

TEMPERATURE_GRID: tuple[float, ...] = tuple(float(t) for t in np.geomspace(1 / 8, 8, 25))
"""Temperatures at which answers are scored for a fit; the spline between them is good to about 1e-4 in log-prob."""
_FIT_STEP = 0.005
"""Spacing in log T of the candidates the likelihood is computed at, before a parabola through the best three."""
_LEAST_DOUBT = 1e-9
"""Confidences are at most 1 minus this in the likelihood, so that one wrong answer at 1 does not decide the fit."""


@dataclass(frozen=True, slots=True)
class TemperatureCalibrator:
    """A fitted temperature, what it was fitted on and for which model and prompt template it holds."""

    temperature: float
    low: float  # bootstrap interval at `level`
    high: float
    level: float
    n: int
    nll_before: float  # mean log loss in nats of right/wrong given q_1, on the fitted answers
    nll_after: float  # the same given q_T
    template_hash: str
    weights_hash: str

    @classmethod
    def fit(
        cls,
        logprob_table: ArrayLike,
        correct: ArrayLike,
        temperatures: Sequence[float] = TEMPERATURE_GRID,
        *,
        template_hash: str,
        weights_hash: str,
        ids: ArrayLike | None = None,
        replicates: int = 500,
        level: float = 0.95,
        seed: int = 0,
    ) -> TemperatureCalibrator:
        """Maximum a posteriori T of right/wrong given q_T, with log T ~ N(0, 1), which decides when the data is
        separable.

        logprob_table (N, K): log-prob of each answer at each of the K ascending `temperatures`, which must reach
        across 1; correct (N,) bool or 0/1; ids (N,) integers for the bootstrap (answers of one id are resampled
        together), by default the row numbers. Raises UserError for malformed input.
        """
        table, grades, grid = _checked(logprob_table, correct, temperatures)
        log_t = np.linspace(grid[0], grid[-1], math.ceil((grid[-1] - grid[0]) / _FIT_STEP) + 1)
        losses = _log_loss(_interpolate(table, grid, log_t), grades)  # (N, len(log_t))
        prior = log_t**2 / 2
        best = _minimum(log_t, losses.sum(0) + prior)
        keys = np.arange(len(grades)) if ids is None else np.asarray(ids)
        draws = [
            _minimum(log_t, poisson_weights(keys, replicate, seed) @ losses + prior) for replicate in range(replicates)
        ]
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) if draws else (math.nan, math.nan)
        before, after = (float(_log_loss(_interpolate(table, grid, np.array([x])), grades).mean()) for x in (0.0, best))
        return cls(
            temperature=math.exp(best),
            low=float(np.exp(low)),
            high=float(np.exp(high)),
            level=level,
            n=len(grades),
            nll_before=before,
            nll_after=after,
            template_hash=template_hash,
            weights_hash=weights_hash,
        )

    def apply(self, logprob_table: ArrayLike, temperatures: Sequence[float] = TEMPERATURE_GRID) -> Array:
        """Calibrated confidences (N,) float64 of answers whose log-probs (N, K) at `temperatures` are given."""
        table, grid = _checked_table(logprob_table, temperatures)
        at = math.log(self.temperature)
        if not grid[0] - 1e-9 <= at <= grid[-1] + 1e-9:
            raise UserError(
                f"temperature {self.temperature:.3g} is outside the table's {temperatures[0]:g}..{temperatures[-1]:g}: "
                "score the answers on a wider grid"
            )
        return np.asarray(np.exp(_interpolate(table, grid, np.array([at]))[:, 0]))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """JSON text that `from_json` reads."""
        return json.dumps(self.as_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, template_hash: str, weights_hash: str) -> TemperatureCalibrator:
        """Calibrator of `as_dict()` values; UserError when it was fitted with another template or other weights."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError(
                f"temperature calibrator: expected the keys {sorted(names)}; run `calibtrain calibrate` again"
            )
        calibrator = cls(**values)
        given = {"prompt template": template_hash, "weights": weights_hash}
        fitted = {"prompt template": calibrator.template_hash, "weights": calibrator.weights_hash}
        for what, value in given.items():
            if value != fitted[what]:
                raise UserError(
                    f"temperature calibrator: fitted with {what} {fitted[what][:12]}, used with {value[:12]}; "
                    "run `calibtrain calibrate` for this model and template"
                )
        return calibrator

    @classmethod
    def from_json(cls, text: str, *, template_hash: str, weights_hash: str) -> TemperatureCalibrator:
        """Calibrator of `to_json()` text; raises UserError as `from_dict`, and for text that is no JSON."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"temperature calibrator: not JSON ({error}); run `calibtrain calibrate` again") from error
        return cls.from_dict(values, template_hash=template_hash, weights_hash=weights_hash)


def optimal_temperature(
    logprob_table: ArrayLike,
    correct: ArrayLike,
    temperatures: Sequence[float] = TEMPERATURE_GRID,
    *,
    score: Literal["log", "brier"] = "log",
) -> float:
    """T at which the answers' proper score is least, with log T ~ N(0, 1) as in `TemperatureCalibrator.fit`.

    Arguments and errors are those of that method.
    """
    table, grades, grid = _checked(logprob_table, correct, temperatures)
    log_t = np.linspace(grid[0], grid[-1], math.ceil((grid[-1] - grid[0]) / _FIT_STEP) + 1)
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
    return np.asarray(_interpolate(table, grid, np.array([math.log(temperature)]))[:, 0])


def _interpolate(table: Array, grid: Array, at: Array) -> Array:
    """Table (N, K) at other log temperatures (L,): (N, L), never above log 1."""
    return np.minimum(CubicSpline(grid, table, axis=1)(at), 0.0)


def _log_loss(logprob: Array, correct: Array) -> Array:
    """-[c log q + (1 - c) log(1 - q)] for log q (N, L) and grades (N,)."""
    doubt = np.maximum(-np.expm1(logprob), _LEAST_DOUBT)
    return np.where(correct[:, None] > 0, -logprob, -np.log(doubt))


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
    if not np.isin(grades, (0, 1)).all():
        raise UserError("temperature fit: grades must be 0 or 1; leave ungraded answers out")
    if not grid[0] < 0 < grid[-1]:
        raise UserError(f"temperatures {temperatures[0]:g}..{temperatures[-1]:g} must reach across 1")
    return table, grades, grid
