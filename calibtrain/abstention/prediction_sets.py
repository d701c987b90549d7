"""Conformal prediction sets: of a question's options, those that hold the right one in a stated share of the questions.

Split conformal prediction (Vovk, Gammerman, Shafer 2005): with a threshold from n graded questions, the set of a further
one of the same kind holds its right option with probability at least 1 - alpha, over both draws. Scores: LAC, 1 - p
(Sadinle, Lei, Wasserman 2019), which makes the smallest sets, and APS, the mass of all options down to this one (Romano,
Sesia, Candes 2020, arXiv 2006.02544), here without randomisation, which is on the safe side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibtrain.errors import UserError

Array = NDArray[np.float64]
Score = Literal["lac", "aps"]
_SLACK = 1e-12
"""Sums of the same probabilities in another order are the same score."""


@dataclass(frozen=True, slots=True)
class PredictionSets:
    """A fitted threshold on the score; an option at or below it is in the set."""

    score: Score
    alpha: float  # share of sets that may miss the right option, in expectation
    threshold: float | None  # None: too few questions for this alpha, every option is in the set
    n: int
    mean_size: float  # on the questions it was fitted to

    def members(self, probabilities: ArrayLike) -> NDArray[np.bool_]:
        """Which of C options, of probabilities (C,) or (N, C) that sum to 1, are in the set."""
        p = np.atleast_2d(np.asarray(probabilities, dtype=np.float64))
        threshold = math.inf if self.threshold is None else self.threshold
        found = scores_of_options(p, self.score) <= threshold + _SLACK
        return np.asarray(found if np.ndim(probabilities) == 2 else found[0])

    def of(self, options: Sequence[str], logprobs: Sequence[float]) -> tuple[str, ...]:
        """The options in the set, the likeliest first."""
        inside = self.members(np.exp(np.asarray(logprobs, dtype=np.float64)))
        order = sorted(range(len(options)), key=lambda place: -logprobs[place])
        return tuple(options[place] for place in order if inside[place])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PredictionSets:
        """Of `as_dict()` values. Raises TypeError for others."""
        return cls(**values)


def scores_of_options(probabilities: Array, score: Score) -> Array:
    """Score (N, C) of each option; the smaller, the sooner it is in the set."""
    if score == "lac":
        return 1.0 - probabilities
    order = np.argsort(-probabilities, axis=1, kind="stable")
    mass = np.cumsum(np.take_along_axis(probabilities, order, axis=1), axis=1)
    found = np.empty_like(mass)
    np.put_along_axis(found, order, mass, axis=1)
    return found


def fit_prediction_sets(
    probabilities: Sequence[ArrayLike], right: Sequence[ArrayLike], alpha: float, score: Score = "lac"
) -> PredictionSets:
    """The threshold on N graded questions used for nothing that made the model: the ceil((n + 1)(1 - alpha))-th score.

    probabilities: of each question's options (C,), which may differ in number; right: which of them are right (C,), of
    several the one with the least score counts. Raises UserError for a question without a right option.
    """
    if not 0 < alpha < 1:
        raise UserError(f"prediction sets: alpha is {alpha}; give a share between 0 and 1")
    rows = [np.asarray(one, dtype=np.float64)[None] for one in probabilities]
    known = [np.asarray(one, dtype=bool) for one in right]
    if len(rows) != len(known) or not rows:
        raise UserError(f"prediction sets: {len(rows)} questions with {len(known)} grades; give some, and one for each")
    if not all(one.any() for one in known):
        raise UserError("prediction sets: a question without a right option; leave it out")
    scored = [scores_of_options(one, score)[0] for one in rows]
    found = np.sort([one[mask].min() for one, mask in zip(scored, known, strict=True)])
    n = len(found)
    rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)  # 10 * (1 - 0.1) is 9, not 9.000000000000002
    threshold = float(found[rank - 1]) if rank <= n else None
    limit = math.inf if threshold is None else threshold
    return PredictionSets(score, alpha, threshold, n, float(np.mean([(one <= limit + _SLACK).sum() for one in scored])))
