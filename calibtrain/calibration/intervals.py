"""Intervals: Wilson and Clopper-Pearson for shares, and a bootstrap for any metric of a `CalibrationState`.

The bootstrap weighs each sample by Poisson(1) draws that are a pure function of (seed, replicate, sample id). So the
result depends neither on the order of the samples nor on which rank holds them, replicates of shards merge by adding,
samples that share an id (several answers to one question) are resampled together, and two models measured on the same
items get the same draws, which makes their difference a paired one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import pdtr

from calibtrain.calibration.state import CalibrationState, state_of
from calibtrain.errors import UserError

Metrics = Callable[[CalibrationState], Mapping[str, float]]

NOISE_BIASED = frozenset(
    {"ece10", "ece15", "ece20", "ece_debiased", "ece_over", "ece_max", "smece", "rel"}
    | {"ece_rms", "ece_rms_debiased", "ece_squared_debiased"}
)
"""Metrics of `calibtrain.calibration.metrics.summary` that sampling noise raises: they get the centred interval,
which is the estimate +- z standard deviations of the replicates.

Resampling adds the noise of the bins a second time, so that percentiles lie too high; mirroring them at the estimate
(the basic interval) goes as far wrong the other way near calibration, where the absolute value has its kink.
"""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the ends of its interval."""

    estimate: float
    low: float
    high: float


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided Wilson score interval of a share (Wilson 1927); (0, 1) for n = 0."""
    _check_counts(successes, n)
    if n == 0:
        return 0.0, 1.0
    z2 = float(scipy.stats.norm.ppf((1 + level) / 2)) ** 2
    centre = (successes + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (successes * (n - successes) / n + z2 / 4)) / (n + z2)
    # At 0 and n successes the ends are exactly 0 and 1; the formula misses them by a rounding error.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided exact interval of a share (Clopper, Pearson 1934); (0, 1) for n = 0."""
    _check_counts(successes, n)
    tail = (1 - level) / 2
    low = float(scipy.stats.beta.ppf(tail, successes, n - successes + 1)) if successes > 0 else 0.0
    return low, clopper_pearson_upper(successes, n, tail)


def clopper_pearson_upper(successes: int, n: int, delta: float) -> float:
    """One-sided exact upper bound: a larger share has less than `delta` chance of so few successes. 1 for n = 0."""
    _check_counts(successes, n)
    return float(scipy.stats.beta.ppf(1 - delta, successes + 1, n - successes)) if successes < n else 1.0


def sample_ids(names: Iterable[str]) -> NDArray[np.uint64]:
    """64-bit ids (M,) of names (question ids): the same in every process and run."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def poisson_weights(ids: ArrayLike, replicate: int, seed: int = 0) -> NDArray[np.int64]:
    """Poisson(1) draws (M,), one for each integer id (M,): a pure function of (seed, replicate, id)."""
    key = _mix(np.array([seed], dtype=np.uint64))
    key = _mix(key + np.array([replicate], dtype=np.uint64))
    mixed = _mix(_mix(np.asarray(ids).astype(np.uint64)) + key)
    uniform = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.searchsorted(_POISSON_CDF, uniform, side="right").astype(np.int64)


def bootstrap(
    metrics: Metrics,
    confidence: ArrayLike,
    correct: ArrayLike,
    ids: ArrayLike,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    centred: Collection[str] = NOISE_BIASED,
) -> dict[str, Interval]:
    """Bootstrap interval of every metric that `metrics(state)` returns.

    confidence, correct, ids (M,): samples and their integer ids (`sample_ids` makes them of names). Names in `centred`
    get the centred interval, others the percentile interval. An interval is NaN where the metric is undefined in a
    tenth of the replicates or more. Raises UserError for what `CalibrationState.update` refuses.
    """
    q, y, key = _samples(confidence, correct, ids)
    estimate = metrics(state_of(q, y))
    draws: dict[str, list[float]] = {name: [] for name in estimate}
    for replicate in range(replicates):
        weight = torch.from_numpy(poisson_weights(key, replicate, seed))
        for name, value in metrics(state_of(q, y, weight)).items():
            draws[name].append(value)
    return {name: _interval(estimate[name], draws[name], level, name in centred) for name in estimate}


def paired_bootstrap(
    metrics: Metrics,
    before: tuple[ArrayLike, ArrayLike],
    after: tuple[ArrayLike, ArrayLike],
    ids: ArrayLike,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    centred: Collection[str] = NOISE_BIASED,
) -> dict[str, Interval]:
    """Interval of metric(after) - metric(before) on the same items.

    before, after: (confidence (M,), correct (M,)) of the same M items in the same order, whose ids are `ids` (M,); each
    replicate weighs both alike. Otherwise as `bootstrap`.
    """
    (q0, y0, key), (q1, y1, _) = _samples(*before, ids), _samples(*after, ids)
    first, second = metrics(state_of(q0, y0)), metrics(state_of(q1, y1))
    draws: dict[str, list[float]] = {name: [] for name in first}
    for replicate in range(replicates):
        weight = torch.from_numpy(poisson_weights(key, replicate, seed))
        old, new = metrics(state_of(q0, y0, weight)), metrics(state_of(q1, y1, weight))
        for name in draws:
            draws[name].append(new[name] - old[name])
    return {name: _interval(second[name] - first[name], draws[name], level, name in centred) for name in draws}


_POISSON_CDF = pdtr(np.arange(20), 1.0)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit integers that scatters neighbours."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _interval(estimate: float, draws: list[float], level: float, centred: bool) -> Interval:
    """Percentile interval of bootstrap draws, or the normal one about the estimate."""
    values = np.asarray(draws)
    values = values[np.isfinite(values)]
    if not math.isfinite(estimate) or len(values) <= 0.9 * len(draws):
        return Interval(estimate, math.nan, math.nan)
    if centred:
        half = float(scipy.stats.norm.ppf((1 + level) / 2) * values.std())
        return Interval(estimate, estimate - half, estimate + half)
    low, high = (float(v) for v in np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))
    return Interval(estimate, low, high)


def _samples(
    confidence: ArrayLike, correct: ArrayLike, ids: ArrayLike
) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.uint64]]:
    """Samples as tensors with their ids; UserError when they are not equally many."""
    q = torch.from_numpy(np.asarray(confidence, dtype=np.float64))
    y = torch.from_numpy(np.asarray(correct, dtype=np.float64))
    key = np.asarray(ids).astype(np.uint64)
    if not q.shape == y.shape == key.shape:
        raise UserError(
            f"bootstrap: {q.numel()} confidences, {y.numel()} grades, {key.size} ids; they must be equally many"
        )
    return q, y, key


def _check_counts(successes: int, n: int) -> None:
    """UserError unless 0 <= successes <= n."""
    if not 0 <= successes <= n:
        raise UserError(f"interval: {successes} of {n} is no share; successes must lie between 0 and n")
