"""What a calibrator sees of graded answers: their confidence and, where the method asks for it, what lies behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibtrain.errors import UserError

Array = NDArray[np.float64]

TEMPERATURE_GRID: tuple[float, ...] = tuple(float(t) for t in np.geomspace(1 / 8, 8, 25))
"""Temperatures at which answers are scored for a fit; the spline between them is good to about 1e-4 in log-prob."""
UNSCALED = TEMPERATURE_GRID.index(1.0)
"""Column of the grid that holds the model's own log-probs."""
LEAST_DOUBT = 1e-9
"""Confidences are kept this far from 1 in log-odds, whose float32 log-prob tells no smaller doubt, and from both ends in log
losses, so that one answer does not decide them. Towards 0 log-odds have no end: long answers all lie there."""
SMALLEST = 5e-324
"""Of the positive numbers: what a confidence of 0 is taken for where its log-prob is not known."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The T tokens of N answers: what a temperature per token needs."""

    table: Array  # (T, K) log-prob of each token at each temperature of TEMPERATURE_GRID
    hidden: NDArray[np.floating]  # (T, H) hidden state from which the token was predicted
    answer: NDArray[np.int64]  # (T,) row of the answer the token belongs to


@dataclass(frozen=True, slots=True)
class Scores:
    """N answers. `scores_of` builds it; a calibrator that needs a field that is None raises UserError."""

    confidence: Array  # (N,) in [0, 1]
    table: Array | None = None  # (N, K) log-prob of each answer at each temperature of TEMPERATURE_GRID
    domains: tuple[str, ...] | None = None  # (N,) which domain each question is from
    options: Array | None = None  # (N, C) log-probs of the options of multiple-choice questions
    right: NDArray[np.bool_] | None = None  # (N, C) which of the options are right, where that is known
    tokens: TokenScores | None = None
    logprob: Array | None = None  # (N,) log of the confidence, where more of it is known than the confidence can hold

    def __len__(self) -> int:
        return len(self.confidence)

    @property
    def log_confidence(self) -> Array:
        """Log of the confidence (N,), finite."""
        return np.asarray(np.log(np.maximum(self.confidence, SMALLEST))) if self.logprob is None else self.logprob

    @property
    def log_odds(self) -> Array:
        """Log-odds (N,) of the confidence, which is kept LEAST_DOUBT away from 1."""
        return self.log_confidence + self.log_doubt

    @property
    def log_doubt(self) -> Array:
        """-log(1 - q) of the confidences q (N,), which are kept LEAST_DOUBT away from 1."""
        return np.asarray(-np.log(np.maximum(-np.expm1(self.log_confidence), LEAST_DOUBT)))

    def take(self, rows: NDArray[np.integer]) -> Scores:
        """The answers at these row numbers, each at most once."""
        tokens = self.tokens
        if tokens is not None:
            place = np.full(len(self), -1, dtype=np.int64)
            place[rows] = np.arange(len(rows))
            kept = np.flatnonzero(place[tokens.answer] >= 0)
            tokens = TokenScores(tokens.table[kept], tokens.hidden[kept], place[tokens.answer[kept]])
        return Scores(
            self.confidence[rows],
            None if self.table is None else self.table[rows],
            None if self.domains is None else tuple(self.domains[row] for row in rows),
            None if self.options is None else self.options[rows],
            None if self.right is None else self.right[rows],
            tokens,
            None if self.logprob is None else self.logprob[rows],
        )


def scores_of(
    scores: Scores | ArrayLike | None = None,
    *,
    domains: Sequence[str] | None = None,
    options: ArrayLike | None = None,
    right: ArrayLike | None = None,
    tokens: TokenScores | None = None,
    logprob: ArrayLike | None = None,
) -> Scores:
    """Checked scores of N answers.

    scores: confidences (N,), or a log-prob table (N, K) at TEMPERATURE_GRID, from which the confidence is taken at
    temperature 1; may be left out where `options` (N, C), log-probs of the options, are given: the confidence is then
    the softmax of the likeliest one; and where `logprob` (N,), log-probs of the answers, is. right (N, C) says which options
    are right. Raises UserError for what is no probability or not equally many.
    """
    if isinstance(scores, Scores):
        return scores
    table = choice = None
    known = None if logprob is None else np.minimum(np.asarray(logprob, dtype=np.float64), 0.0)
    if options is not None:
        choice = np.asarray(options, dtype=np.float64)
        if choice.ndim != 2 or choice.shape[1] < 2 or not np.isfinite(choice).all():
            raise UserError(f"scores: options have shape {choice.shape}, expected finite log-probs (answers, options)")
    if scores is None:
        if choice is not None and known is None:
            known = choice.max(1) - np.logaddexp.reduce(choice, axis=1)
        if known is None:
            raise UserError("scores: give confidences, a log-prob table, log-probs or options")
        confidence = np.exp(np.minimum(known, 0.0))
    else:
        confidence = np.asarray(scores, dtype=np.float64)
    if confidence.ndim == 2:
        table = confidence
        if table.shape[1] != len(TEMPERATURE_GRID):
            raise UserError(
                f"scores: log-prob table has shape {table.shape}, expected (answers, {len(TEMPERATURE_GRID)})"
            )
        known = np.minimum(table[:, UNSCALED], 0.0)
        confidence = np.exp(known)
    graded = None if right is None else np.asarray(right, dtype=bool)
    if graded is not None and (choice is None or graded.shape != choice.shape):
        raise UserError(f"scores: right has shape {graded.shape}; say of each of the options whether it is right")
    names = None if domains is None else tuple(domains)
    found = Scores(confidence, table, names, choice, graded, tokens, known)
    _check(found)
    return found


def logit(probability: ArrayLike) -> Array:
    """Log-odds, log p - log(1 - p), of p kept LEAST_DOUBT away from 0 and 1."""
    p = np.clip(np.asarray(probability, dtype=np.float64), LEAST_DOUBT, 1 - LEAST_DOUBT)
    return np.asarray(np.log(p) - np.log1p(-p))


def sigmoid(x: ArrayLike) -> Array:
    """1 / (1 + exp(-x)), without overflow, and as exact far below 0 as near it."""
    z = np.asarray(x, dtype=np.float64)
    small = np.exp(-np.abs(z))
    return np.asarray(np.where(z < 0, small, 1.0) / (1.0 + small))


def softmax(x: Array) -> Array:
    """Softmax of each row of (N, C)."""
    shifted = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))


def log_loss(probability: ArrayLike, correct: ArrayLike) -> float:
    """Mean log loss in nats of probabilities (N,) of being right, given grades (N,); NaN for none."""
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    p = np.clip(p, LEAST_DOUBT, 1 - LEAST_DOUBT)
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean()) if len(p) else math.nan


def grades_of(correct: ArrayLike, n: int) -> Array:
    """Grades (n,) as 0.0 and 1.0; UserError for others, or another number of them."""
    grades = np.asarray(correct, dtype=np.float64)
    if grades.shape != (n,) or n == 0:
        raise UserError(f"calibrator: {n} answers with {grades.size} grades; give one grade per answer")
    if not np.isin(grades, (0, 1)).all():
        raise UserError("calibrator: grades must be 0 or 1; leave ungraded answers out")
    return grades


def _check(scores: Scores) -> None:
    q = scores.confidence
    bad = ~((q >= 0) & (q <= 1))  # also true for NaN
    if q.ndim != 1 or bad.any():
        row = int(np.flatnonzero(bad)[0]) if q.ndim == 1 else 0
        raise UserError(
            f"scores: confidence {q[row] if q.ndim == 1 else q.shape} (answer {row}) is not a probability in [0, 1]"
        )
    if scores.logprob is not None and not (scores.logprob.shape == q.shape and np.isfinite(scores.logprob).all()):
        raise UserError(
            f"scores: {len(q)} confidences and log-probs {scores.logprob.shape}; give one finite one per answer"
        )
    for name, field in {"domains": scores.domains, "options": scores.options}.items():
        if field is not None and len(field) != len(q):
            raise UserError(f"scores: {len(q)} confidences and {len(field)} {name}; give one per answer")
    tokens = scores.tokens
    if tokens is None:
        return
    t = len(tokens.answer)
    if tokens.table.shape != (t, len(TEMPERATURE_GRID)) or tokens.hidden.shape[:1] != (t,) or tokens.hidden.ndim != 2:
        raise UserError(
            f"scores: {t} tokens with log-probs {tokens.table.shape} and hidden states {tokens.hidden.shape}; "
            f"expected ({t}, {len(TEMPERATURE_GRID)}) and ({t}, hidden size)"
        )
    if t and not 0 <= tokens.answer.min() <= tokens.answer.max() < len(q):
        raise UserError(f"scores: a token belongs to an answer that is not among the {len(q)}")
