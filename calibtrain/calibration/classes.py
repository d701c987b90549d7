"""What the numbers of all answers hide where they are one of given options: a place that is preferred, a class that is not
calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from calibtrain.calibration.intervals import wilson
from calibtrain.errors import UserError

Array = NDArray[np.float64]
FEW = 100
"""Answers at another place than the right one; with fewer the p-value is that of random swaps."""
SWAPS = 20_000


@dataclass(frozen=True, slots=True)
class PlaceBias:
    """How often each place was the answer and how often the right one, (C,) counts of `n` questions."""

    n: int
    answered: tuple[int, ...]
    right: tuple[int, ...]
    p_value: float  # of no place being preferred; NaN where every answer is at the right place


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class among N questions."""

    n: int  # questions whose right answer it is
    answered: int  # questions that were answered with it
    accuracy: float  # share of its questions answered with it; NaN without any
    low: float  # Wilson's 95% interval of the accuracy
    high: float
    confidence: float  # its mean probability over all questions; should be its share of them
    share: float  # of the questions, that it is right of
    ece: float  # of its probability as a forecast of being right


def place_bias(given: ArrayLike, right: ArrayLike, places: int, seed: int = 0) -> PlaceBias:
    """Whether answers prefer a place: marginal homogeneity of given and right places (N,) of the same questions.

    The Stuart-Maxwell statistic (1955, 1970), its p-value by chi-square, or exact but for drawing, by swapping given and
    right at random, where fewer than FEW answers are wrong.
    """
    a, b = np.asarray(given, dtype=np.int64), np.asarray(right, dtype=np.int64)
    if a.shape != b.shape or (len(a) and not (min(a.min(), b.min()) >= 0 and max(a.max(), b.max()) < places)):
        raise UserError(f"place bias: {a.shape} answers and {b.shape} right ones must be places below {places}")
    answered, wanted = (np.bincount(one, minlength=places) for one in (a, b))
    apart = np.eye(places)[a[a != b]] - np.eye(places)[b[a != b]]
    p_value = float("nan")
    if len(apart):
        inverse = np.linalg.pinv(apart.T @ apart)
        total = apart.sum(0)
        statistic = float(total @ inverse @ total)
        rank = int(np.linalg.matrix_rank(apart.T @ apart))
        p_value = float(scipy.stats.chi2.sf(statistic, rank))
        if len(apart) < FEW:
            signs = np.random.default_rng(seed).choice((-1.0, 1.0), (SWAPS, len(apart)))
            sums = signs @ apart
            drawn = np.einsum("ri,ij,rj->r", sums, inverse, sums)
            p_value = (1 + int((drawn >= statistic - 1e-9).sum())) / (1 + SWAPS)
    return PlaceBias(len(a), tuple(answered.tolist()), tuple(wanted.tolist()), p_value)


def classwise_ece(probabilities: ArrayLike, right: ArrayLike, bins: int = 15) -> Array:
    """Calibration error (C,) of each option's probability (N, C) as a forecast of its being right (N, C) bool.

    Over `bins` equal bins of [0, 1], |mean probability - share right| weighed by answers (Kull et al. 2019, arXiv
    1910.12656); their classwise ECE is the mean over the classes.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(right, dtype=np.float64)
    place = np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = [
        sum(abs(np.bincount(place[:, c], p[:, c] - y[:, c], minlength=bins))) / max(len(p), 1)
        for c in range(p.shape[1])
    ]
    return np.array(gaps, dtype=np.float64)


def class_rows(probabilities: ArrayLike, right: ArrayLike, answer: ArrayLike | None = None) -> list[ClassRow]:
    """Every class of N questions, from the probabilities (N, C) of the classes and which are right (N, C) bool.

    answer (N,): the classes that were given, where they are not the likeliest ones.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(right, dtype=bool)
    given = p.argmax(1) if answer is None else np.asarray(answer, dtype=np.int64)
    rows = []
    for place, ece in enumerate(classwise_ece(p, y).tolist()):
        n, hits = int(y[:, place].sum()), int((y[:, place] & (given == place)).sum())
        low, high = wilson(hits, n)
        rows.append(
            ClassRow(
                n=n,
                answered=int((given == place).sum()),
                accuracy=hits / n if n else float("nan"),
                low=low,
                high=high,
                confidence=float(p[:, place].mean()) if len(p) else float("nan"),
                share=n / len(p) if len(p) else float("nan"),
                ece=ece,
            )
        )
    return rows
