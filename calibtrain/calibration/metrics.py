"""Calibration metrics as pure functions of a `CalibrationState`: NaN where undefined, never a crash.

Bins are (lo, hi], of equal width, exact because they are unions of the state's cells. Ranking metrics (AUROC, AURC and
their kin) live in `calibtrain.calibration.ranking`; `summary` gathers both under the names that trackers show.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import scipy
import torch
from numpy.typing import ArrayLike, NDArray

from calibtrain.calibration import ranking
from calibtrain.calibration.intervals import wilson
from calibtrain.calibration.state import UNIFORM_CELLS, UNIFORM_INDEX, CalibrationState, state_of
from calibtrain.errors import UserError

Array = NDArray[np.float64]
_NORMAL_VARIANCE = 64.0
"""From this variance of a sum of Bernoulli variables on, its mean absolute deviation is that of a normal to 0.2%."""


@dataclass(frozen=True, slots=True)
class BrierDecomposition:
    """brier = reliability - resolution + uncertainty + within_variance - 2 * within_covariance, exactly."""

    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within_variance: float
    within_covariance: float


@dataclass(frozen=True, slots=True)
class ReliabilityRow:
    """One non-empty bin (lo, hi] of a reliability diagram, with the Wilson interval of its accuracy."""

    bin: int
    lo: float
    hi: float
    n: int
    confidence: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


def accuracy(state: CalibrationState) -> float:
    """Share of correct samples."""
    return int(state.correct.sum()) / state.n if state.n else math.nan


def mean_confidence(state: CalibrationState) -> float:
    """Mean confidence."""
    return float(state.confidence.sum()) / state.n if state.n else math.nan


def gap(state: CalibrationState) -> float:
    """Mean confidence minus accuracy: above 0 is overconfident on the whole."""
    return mean_confidence(state) - accuracy(state)


def brier(state: CalibrationState) -> float:
    """Mean of (confidence - correct)**2 (Brier 1950)."""
    return float(state.moments[1]) / state.n if state.n else math.nan


def brier_skill(state: CalibrationState) -> float:
    """1 - Brier / Brier of always stating the accuracy; NaN with one class only."""
    share = accuracy(state)
    return 1 - brier(state) / (share * (1 - share)) if 0 < share < 1 else math.nan


def nll(state: CalibrationState) -> float:
    """Mean log loss in nats of the confidence as probability of being correct, clipped to [1e-6, 1 - 1e-6]."""
    return float(state.moments[2]) / state.n if state.n else math.nan


def ece(state: CalibrationState, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of n_b / n |conf_b - acc_b| (Naeini, Cooper, Hauskrecht 2015)."""
    count, gaps, _ = _bins(state, bins)
    return float((count * np.abs(gaps)).sum() / count.sum()) if len(count) else math.nan


def rms_calibration_error(state: CalibrationState, bins: int = 15) -> float:
    """Root of the mean over samples of their bin's squared gap."""
    count, gaps, _ = _bins(state, bins)
    return math.sqrt((count * gaps**2).sum() / count.sum()) if len(count) else math.nan


def max_calibration_error(state: CalibrationState, bins: int = 15) -> float:
    """Largest |conf_b - acc_b| over non-empty bins; decided by the smallest bins, so mind their n."""
    _, gaps, _ = _bins(state, bins)
    return float(np.abs(gaps).max()) if len(gaps) else math.nan


def overconfidence_error(state: CalibrationState, bins: int = 15) -> float:
    """The part of the ECE that comes from bins whose confidence is above their accuracy."""
    count, gaps, _ = _bins(state, bins)
    return float((count * gaps.clip(min=0)).sum() / count.sum()) if len(count) else math.nan


def squared_ece_debiased(state: CalibrationState, bins: int = 15) -> float:
    """Unbiased estimate of the mean squared gap, signed: noise can make it negative.

    Kumar, Liang, Ma 2019, arXiv 1909.10155. Bins of one sample, whose noise cannot be
    estimated, are left out. NaN when no bin has two samples.
    """
    count, gaps, accuracies = _bins(state, bins)
    several = count > 1
    count, gaps, accuracies = count[several], gaps[several], accuracies[several]
    if not len(count):
        return math.nan
    return float((count * (gaps**2 - accuracies * (1 - accuracies) / (count - 1))).sum() / count.sum())


def rms_ece_debiased(state: CalibrationState, bins: int = 15) -> float:
    """Root of `squared_ece_debiased`, 0 where that is negative."""
    squared = squared_ece_debiased(state, bins)
    return squared if math.isnan(squared) else math.sqrt(max(squared, 0.0))


def ece_null(state: CalibrationState, bins: int = 15) -> float:
    """Expected ECE of a perfectly calibrated model with these confidences: what sampling noise alone gives.

    Under perfect calibration the correct answers of a bin are a sum of independent Bernoulli(confidence) variables; its
    mean absolute deviation comes from the characteristic function, or from the normal limit for a large variance.
    """
    if state.n == 0:
        return math.nan
    count = state.count.numpy()
    cells = np.flatnonzero(count)
    probability = (state.confidence.numpy()[cells] / count[cells]).clip(0.0, 1.0)
    index = _bin_of_cell(bins)[cells]
    total = sum(_mean_absolute_deviation(count[cells][index == b], probability[index == b]) for b in np.unique(index))
    return float(total / state.n)


def ece_debiased(state: CalibrationState, bins: int = 15) -> float:
    """ECE minus its null, signed: its mean is 0 for a calibrated model.

    Noise adds less to bins that are truly off than to calibrated ones, so for a miscalibrated model this errs low, by
    at most the null; `rms_ece_debiased` is free of that.
    """
    return ece(state, bins) - ece_null(state, bins)


def smooth_ece(state: CalibrationState) -> float:
    """Smooth ECE with a reflected Gaussian kernel, at the width equal to its value.

    Blasiok, Nakkiran 2023, arXiv 2309.12236. NaN without samples.
    """
    if state.n == 0:
        return math.nan
    spectrum = _residual_spectrum(state)
    low, high = 0.0, 1.0
    while high - low > 1e-6:  # the value falls and the width rises with the width: one crossing
        middle = (low + high) / 2
        low, high = (middle, high) if _smoothed(spectrum, middle) > middle else (low, middle)
    return _smoothed(spectrum, high)


def smooth_ece_at(state: CalibrationState, width: float) -> float:
    """Smooth ECE at a fixed kernel width (standard deviation, in units of confidence)."""
    return _smoothed(_residual_spectrum(state), width) if state.n else math.nan


def brier_decomposition(state: CalibrationState, bins: int = 15) -> BrierDecomposition:
    """Murphy's decomposition with the within-bin terms that make it exact (Stephenson, Coelho, Jolliffe 2008)."""
    if state.n == 0:
        return BrierDecomposition(*[math.nan] * 6)
    n, share = state.n, accuracy(state)
    count, gaps, accuracies = _bins(state, bins)
    confidences = gaps + accuracies
    squares, squared_error = float(state.moments[0]), float(state.moments[1])
    products = (squares + int(state.correct.sum()) - squared_error) / 2  # sum of confidence * correct
    return BrierDecomposition(
        brier=squared_error / n,
        reliability=float((count * gaps**2).sum() / n),
        resolution=float((count * (accuracies - share) ** 2).sum() / n),
        uncertainty=share * (1 - share),
        within_variance=(squares - float((count * confidences**2).sum())) / n,
        within_covariance=(products - float((count * confidences * accuracies).sum())) / n,
    )


def reliability_table(state: CalibrationState, bins: int = 15, level: float = 0.95) -> list[ReliabilityRow]:
    """The non-empty bins of a reliability diagram, by ascending confidence."""
    count, confidence, correct = _bin_sums(state, bins)
    rows = []
    for b in np.flatnonzero(count):
        n, right = int(count[b]), int(correct[b])
        low, high = wilson(right, n, level)
        rows.append(ReliabilityRow(int(b), b / bins, (b + 1) / bins, n, confidence[b] / n, right / n, low, high))
    return rows


def summary_of(confidence: ArrayLike, correct: ArrayLike, order: ArrayLike | None = None) -> dict[str, float]:
    """`summary` of samples that are all at hand: how they are ranked is exact, and its `*_err` are 0.

    confidence (M,) in [0, 1]; correct (M,) bool or 0/1; order (M,): what ranks them, where confidences as small as theirs
    may be equal, such as their log-probs.
    """
    q, y = np.asarray(confidence, dtype=np.float64), np.asarray(correct)
    ranked = ranking.Distinct.of(q if order is None else order, y)
    exact = {name: 0.0 for name, value in _ranked(ranked).items() if name.endswith("_err") and not math.isnan(value)}
    return {**summary(state_of(torch.from_numpy(q), torch.from_numpy(y))), **_ranked(ranked), **exact}


def summary(state: CalibrationState) -> dict[str, float]:
    """Every scalar metric by the name it is tracked under; NaN where undefined.

    Bins are 15 unless the name says otherwise. `cov@r` is the largest observed coverage at selective risk r,
    `risk@c` the selective risk at coverage c; `*_err` bounds what the state's cells can change in the metric before it.
    """
    murphy, of_noise = asdict(brier_decomposition(state)), ece_null(state)
    return {
        "n": float(state.n),
        "acc": accuracy(state),
        "mean_conf": mean_confidence(state),
        "gap": gap(state),
        "ece10": ece(state, 10),
        "ece15": ece(state),
        "ece20": ece(state, 20),
        "ece_null": of_noise,
        "ece_debiased": ece(state) - of_noise,  # `ece_debiased`, whose null costs the most of all these
        "ece_over": overconfidence_error(state),
        "ece_rms": rms_calibration_error(state),
        "ece_rms_debiased": rms_ece_debiased(state),
        "ece_squared_debiased": squared_ece_debiased(state),
        "ece_max": max_calibration_error(state),
        "smece": smooth_ece(state),
        "brier": murphy["brier"],
        "brier_skill": brier_skill(state),
        "rel": murphy["reliability"],
        "res": murphy["resolution"],
        "unc": murphy["uncertainty"],
        "nll": nll(state),
        "clip_n": float(state.clipped.sum()),
        **_ranked(state),
    }


def _ranked(cells: ranking.Cells) -> dict[str, float]:
    """Of `summary` what tells right from wrong."""
    return {
        "auroc": ranking.auroc(cells),
        "auroc_err": ranking.auroc_error(cells),
        "aurc": ranking.aurc(cells),
        "aurc_err": ranking.aurc_error(cells),
        "e_aurc": ranking.e_aurc(cells),
        "augrc": ranking.augrc(cells),
        "augrc_err": ranking.augrc_error(cells),
        **{f"cov@{risk}": ranking.coverage_at_risk(cells, risk) for risk in (0.05, 0.1, 0.2)},
        **{f"risk@{coverage}": 1 - ranking.selective_accuracy(cells, coverage) for coverage in (0.5, 0.8)},
    }


def _bin_of_cell(bins: int) -> NDArray[np.int64]:
    """Bin of each cell (NUM_CELLS,); UserError for a number of bins whose edges are not all cell edges."""
    if bins < 1 or UNIFORM_CELLS % bins:
        raise UserError(f"bins={bins}: must divide {UNIFORM_CELLS}, so that bins are exact: 10, 15, 20, 30, 50 or 100")
    return UNIFORM_INDEX.numpy() // (UNIFORM_CELLS // bins)


def _bin_sums(state: CalibrationState, bins: int) -> tuple[Array, Array, Array]:
    """Count, sum of confidence and sum of correct of each bin, float64 (bins,)."""
    index = _bin_of_cell(bins)
    fields = (state.count, state.confidence, state.correct)
    count, confidence, correct = (np.bincount(index, x.double().numpy(), bins).astype(np.float64) for x in fields)
    return count, confidence, correct


def _bins(state: CalibrationState, bins: int) -> tuple[Array, Array, Array]:
    """Count, confidence - accuracy, and accuracy of the non-empty bins."""
    count, confidence, correct = _bin_sums(state, bins)
    filled = count > 0
    count, confidence, correct = count[filled], confidence[filled], correct[filled]
    return count, (confidence - correct) / count, correct / count


def _mean_absolute_deviation(count: NDArray[np.int64], probability: Array, points: int = 256) -> float:
    """E|S - E S| for S the sum of count[i] Bernoulli(probability[i]) variables each, all independent."""
    mean, variance = float((count * probability).sum()), float((count * probability * (1 - probability)).sum())
    if variance >= _NORMAL_VARIANCE:
        return math.sqrt(2 * variance / math.pi)
    # S - floor(mean) on a circle of `points` values: below the variance limit that is more than 15 standard deviations.
    angle = 2 * np.pi * np.arange(points // 2 + 1) / points
    single = 1 + probability[:, None] * (np.exp(-1j * angle) - 1)
    log_modulus = (count[:, None] * np.log(np.maximum(np.abs(single), 1e-300))).sum(0)
    phase = (count[:, None] * np.angle(single)).sum(0) + angle * math.floor(mean)
    mass = np.fft.irfft(np.exp(log_modulus + 1j * phase), points)
    offset = np.fft.fftfreq(points, 1 / points)
    return float((mass * np.abs(offset + math.floor(mean) - mean)).sum())


def _residual_spectrum(state: CalibrationState) -> Array:
    """Cosine coefficients of sum(confidence - correct) / n on the midpoints of the equal cells."""
    residual = state.confidence.numpy() - state.correct.numpy()
    return np.asarray(
        scipy.fft.dct(np.bincount(UNIFORM_INDEX.numpy(), residual, UNIFORM_CELLS) / state.n, norm="ortho")
    )


def _smoothed(spectrum: Array, width: float) -> float:
    """Integral of |residual * kernel|; a reflected Gaussian kernel on [0, 1] only damps the cosine coefficients."""
    damping = np.exp(-((np.pi * width * np.arange(len(spectrum))) ** 2) / 2)
    return float(np.abs(np.asarray(scipy.fft.idct(spectrum * damping, norm="ortho"))).sum())
