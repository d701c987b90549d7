"""Several sources as one: a regularised logistic regression on their standardised log-odds, kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from calibtrain.calibration.scores import grades_of, sigmoid
from calibtrain.confidence.features import Fingerprint, check_fingerprint
from calibtrain.confidence.source import Array
from calibtrain.errors import UserError

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""scikit-learn's C, chosen by cross-validated log loss."""
FOLDS = 5
LEAST = 1e-4
"""Scores are kept this far from 1, and from 0 where at most RARE of a source's are smaller: one sure mistake is not to
decide a weight."""
RARE = 0.01
"""Of a source whose scores are often smaller, as likelihoods of long answers are, this share is clipped instead."""


@dataclass(frozen=True, slots=True)
class Ensemble:
    """A fitted combination; a weight is the change in log-odds of being right per standard deviation of its source."""

    sources: tuple[str, ...]
    center: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    strength: float
    n: int  # answers it was fitted on
    fingerprint: Fingerprint
    # Of each source, what smaller scores are taken for; (): LEAST, as in earlier versions.
    least: tuple[float, ...] = ()

    def score(self, scores: Mapping[str, ArrayLike]) -> Array:
        """Probability of being right (N,) float64, of each source's scores (N,) in [0, 1] by name."""
        least = self.least or (LEAST,) * len(self.sources)
        z = (_inputs(scores, self.sources, least) - np.array(self.center)) / np.array(self.scale)
        return sigmoid(z @ np.array(self.weights) + self.bias)

    def to_json(self) -> str:
        """JSON text that `from_json` reads."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, fingerprint: Fingerprint) -> Ensemble:
        """Ensemble of `to_json()` text; UserError for other text, weights or template."""
        try:
            values: dict[str, Any] = json.loads(text)
            if {"least", *values} != {field.name for field in fields(cls)}:
                raise ValueError("other keys")
            values["least"] = tuple(values.get("least", ()))
            if values["least"] and len(values["least"]) != len(values["sources"]):
                raise ValueError("least: not one for each source")
            values["fingerprint"] = Fingerprint(**values["fingerprint"])
            for name in ("sources", "center", "scale", "weights"):
                values[name] = tuple(values[name])
                if len(values[name]) != len(values["sources"]):
                    raise ValueError(f"{name}: not one for each source")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"ensemble: not one that can be read ({error}); fit it again") from error
        check_fingerprint("ensemble", values["fingerprint"], fingerprint)
        return cls(**values)


def fit_ensemble(
    scores: Mapping[str, ArrayLike],
    correct: ArrayLike,
    fingerprint: Fingerprint,
    *,
    sources: Sequence[str] | None = None,
    seed: int = 0,
) -> Ensemble:
    """Fit on graded answers that no source of it was fitted on.

    scores: of each source (N,) in [0, 1]; correct (N,) bool or 0/1; sources: which, by default all. Raises UserError for
    fewer than FOLDS right or wrong answers.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    names = tuple(scores if sources is None else sources)
    if not names:
        raise UserError("ensemble: no sources; give at least one")
    least = tuple(_least(scores[name]) for name in names if name in scores)
    x = _inputs(scores, names, least)
    y = grades_of(correct, len(x))
    if min(y.sum(), len(y) - y.sum()) < FOLDS:
        raise UserError(
            f"ensemble: {int(y.sum())} of {len(y)} answers are right; it needs {FOLDS} right and wrong ones"
        )
    center, scale = x.mean(0), x.std(0)
    scale[scale < 1e-9] = 1.0  # a source that never varies says nothing
    z = (x - center) / scale
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    losses = [
        -cross_val_score(LogisticRegression(C=c, max_iter=1000), z, y, cv=folds, scoring="neg_log_loss").mean()
        for c in STRENGTHS
    ]
    strength = STRENGTHS[int(np.argmin(losses))]
    model = LogisticRegression(C=strength, max_iter=1000).fit(z, y)
    return Ensemble(
        names,
        tuple(center.tolist()),
        tuple(scale.tolist()),
        tuple(model.coef_[0].tolist()),
        float(model.intercept_[0]),
        strength,
        len(y),
        fingerprint,
        least,
    )


def cross_scores(
    scores: Mapping[str, ArrayLike],
    correct: ArrayLike,
    fingerprint: Fingerprint,
    *,
    sources: Sequence[str] | None = None,
    seed: int = 0,
) -> Array:
    """Scores (N,) of the fitting answers, each by an ensemble fitted without it: what its calibrator is fitted on.

    Arguments and errors as of `fit_ensemble`; twice as many right and wrong answers are needed.
    """
    from sklearn.model_selection import StratifiedKFold

    names = tuple(scores if sources is None else sources)
    columns = {name: np.asarray(scores[name], dtype=np.float64) for name in names if name in scores}
    y = grades_of(correct, len(_inputs(columns, names, (LEAST,) * len(names))))
    if min(y.sum(), len(y) - y.sum()) < 2 * FOLDS:
        raise UserError(
            f"ensemble: {int(y.sum())} of {len(y)} answers are right; scoring them apart from their fit needs "
            f"{2 * FOLDS} right and wrong ones"
        )
    found = np.empty(len(y))
    for fitted, held in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(y[:, None], y):
        made = fit_ensemble(
            {name: one[fitted] for name, one in columns.items()}, y[fitted], fingerprint, sources=names, seed=seed
        )
        found[held] = made.score({name: one[held] for name, one in columns.items()})
    return found


def _least(scores: ArrayLike) -> float:
    """What smaller scores of a source are taken for; LEAST where it has hardly any."""
    one = np.asarray(scores, dtype=np.float64)
    positive = one[one > 0]  # a share of samples that is 0 says less than a likelihood of 1e-80
    return min(LEAST, float(np.quantile(positive, RARE))) if len(positive) else LEAST


def _inputs(scores: Mapping[str, ArrayLike], names: Sequence[str], least: Sequence[float]) -> Array:
    """Log-odds (N, sources), none below those of `least`. UserError for a missing source, or not equally many scores."""
    absent = [name for name in names if name not in scores]
    if absent:
        raise UserError(f"ensemble: no scores of {', '.join(absent)}; given are {', '.join(scores)}")
    columns = [np.asarray(scores[name], dtype=np.float64) for name in names]
    if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1:
        raise UserError("ensemble: the sources have not equally many scores")
    p = np.clip(np.stack(columns, axis=1), np.array(least), 1 - LEAST)
    if not np.isfinite(p).all():
        raise UserError("ensemble: a score is not a number")
    return np.asarray(np.log(p) - np.log1p(-p))
