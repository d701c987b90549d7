"""Withholding claims one by one, so that most replies hold no wrong claim among those that are left.

Mohri and Hashimoto 2024 (arXiv 2402.10978). A graded reply's score is the highest probability among its wrong claims: above
it every claim is right. The threshold lies just above the ceil((n + 1)(1 - alpha))-th smallest of n scores; a new reply's
score exceeds that with probability at most alpha, whatever the probabilities are worth, so long as the new question and the
graded ones are exchangeable. Ties only help. That is an average, over questions and over draws of the graded ones.

With `delta` it is a statement about this very threshold: it lies above the k-th smallest score, k the smallest for which
Binomial(n, alpha) is at most n - k with probability at most delta (Wilks 1941; Vovk 2012 calls it training-conditional). The
share of replies with a wrong claim falls as the threshold rises, so this is fixed-sequence testing, from the top down, with
exact binomial tests; it needs more graded replies.

A claim whose grade is not known counts as wrong; a reply without claims holds no wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from calibtrain.errors import UserError


@dataclass(frozen=True, slots=True)
class ClaimsCertificate:
    """Keeping the claims with probability >= threshold, at most target_risk of the replies hold a wrong claim.

    delta None: on average over draws of the n graded replies. Else: of this threshold, with probability 1 - delta.
    """

    threshold: float
    target_risk: float
    delta: float | None
    n: int  # graded replies
    n_wrong: int  # of these, with a wrong claim among the kept
    n_silent: int  # with claims, none of which is kept
    claims: int  # of all graded replies
    kept: int

    @property
    def share(self) -> float:
        """Of the claims, those kept."""
        return self.kept / self.claims if self.claims else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClaimsCertificate:
        """Of `as_dict()` values; UserError for other keys, and for numbers that do not prove the claim."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError(f"claims: expected the keys {sorted(names)}; run `calibtrain calibrate` again")
        found = cls(**values)
        if not found._is_proof():
            raise UserError(f"claims: its numbers do not prove it ({values}); run `calibtrain calibrate` again")
        return found

    def _is_proof(self) -> bool:
        numbers = (self.threshold, self.target_risk, *(() if self.delta is None else (self.delta,)))
        counts = (self.n, self.n_wrong, self.n_silent, self.claims, self.kept)
        if not all(type(one) in (int, float) for one in numbers) or not all(type(one) is int for one in counts):
            return False
        if not (0 <= self.threshold <= np.nextafter(1.0, 2.0) and 0 < self.target_risk < 1):
            return False
        if self.delta is not None and not 0 < self.delta < 1:
            return False
        rank = _rank(self.n, self.target_risk, self.delta)
        return (
            rank is not None
            and 0 <= self.n_wrong <= self.n - rank
            and 0 < self.kept <= self.claims
            and 0 <= self.n_silent <= self.n
        )


@dataclass(frozen=True, slots=True)
class ClaimsCertification:
    """The outcome of `certify_claims`: certificates of both forms, or None and why in plain words."""

    certificate: ClaimsCertificate | None  # on average over draws; the one that is applied
    reason: str
    confident: ClaimsCertificate | None = None  # with probability 1 - delta, where there are answers enough

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClaimsCertification:
        """Of `as_dict()` values; UserError as `ClaimsCertificate.from_dict`."""
        made = (values["certificate"], values["confident"])
        certificate, confident = (None if one is None else ClaimsCertificate.from_dict(one) for one in made)
        return cls(certificate, str(values["reason"]), confident)


def certify_claims(
    probability: Sequence[ArrayLike], right: Sequence[ArrayLike], target_risk: float, delta: float
) -> ClaimsCertification:
    """Thresholds for the claims of n graded replies that were used for nothing else.

    probability, right: of each reply, the probabilities (m,) of its claims, in [0, 1], and whether each is right. Raises
    UserError for malformed input.
    """
    for name, value in {"target_risk": target_risk, "delta": delta}.items():
        if not 0 < value < 1:
            raise UserError(f"claims: {name} must lie strictly between 0 and 1, got {value}")
    replies = [(_probabilities(p), np.asarray(y, dtype=bool)) for p, y in zip(probability, right, strict=True)]
    if any(p.shape != y.shape for p, y in replies):
        raise UserError("claims: give one grade for each claim")
    certificate, reason = _certificate(replies, target_risk, None)
    return ClaimsCertification(certificate, reason, _certificate(replies, target_risk, delta)[0])


def conformal_scores(probability: Sequence[ArrayLike], right: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Of each reply, the highest probability among its wrong claims (n,); -inf without any."""
    pairs = (
        (np.asarray(p, dtype=np.float64), np.asarray(y, dtype=bool)) for p, y in zip(probability, right, strict=True)
    )
    return np.array([p[~y].max(initial=-np.inf) for p, y in pairs], dtype=np.float64)


def claims_threshold(scores: ArrayLike, target_risk: float, delta: float | None = None) -> float | None:
    """Keep claims from this probability on. None where there are too few scores (n,) to promise anything."""
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    rank = _rank(len(ordered), target_risk, delta)
    if rank is None:
        return None
    score = float(ordered[rank - 1])
    return 0.0 if score < 0 else float(np.nextafter(score, 2.0))


def least_replies(target_risk: float, delta: float | None = None) -> int:
    """Graded replies without which nothing can be promised."""
    if delta is None:
        return max(1, math.ceil((1 - target_risk) / target_risk - 1e-9))
    return max(1, math.ceil(math.log(delta) / math.log1p(-target_risk) - 1e-9))


def _rank(n: int, target_risk: float, delta: float | None) -> int | None:
    """Which of n ascending scores the threshold lies above, from 1; None where n is too small."""
    if delta is None:
        rank = max(1, math.ceil((n + 1) * (1 - target_risk) - 1e-9))
        return rank if rank <= n else None
    most = int(scipy.stats.binom.ppf(delta, n, target_risk)) if n else -1  # scores that may lie above
    while most >= 0 and scipy.stats.binom.cdf(most, n, target_risk) > delta:
        most -= 1
    return max(1, n - most) if most >= 0 else None


def _certificate(
    replies: Sequence[tuple[NDArray[np.float64], NDArray[np.bool_]]], target_risk: float, delta: float | None
) -> tuple[ClaimsCertificate | None, str]:
    threshold = claims_threshold(conformal_scores(*zip(*replies, strict=True)) if replies else [], target_risk, delta)
    if threshold is None:
        least = least_replies(target_risk, delta)
        return None, f"{len(replies)} graded replies; a risk of {target_risk:g} needs at least {least}"
    kept = [p >= threshold for p, _ in replies]
    total = int(sum(one.sum() for one in kept))
    claims = sum(one.size for one in kept)
    if not total:
        return None, f"wrong claims are among the surest, so that for a risk of {target_risk:g} all are withheld"
    found = ClaimsCertificate(
        threshold=threshold,
        target_risk=target_risk,
        delta=delta,
        n=len(replies),
        n_wrong=sum(bool((one & ~y).any()) for one, (_, y) in zip(kept, replies, strict=True)),
        n_silent=sum(bool(one.size and not one.any()) for one in kept),
        claims=claims,
        kept=total,
    )
    return found, f"{total} of {claims} claims kept, and a wrong one among them in {found.n_wrong} of {found.n} replies"


def _probabilities(values: ArrayLike) -> NDArray[np.float64]:
    p = np.asarray(values, dtype=np.float64).reshape(-1)
    if not ((p >= 0) & (p <= 1)).all():
        raise UserError(f"claims: {p[~((p >= 0) & (p <= 1))][0]} is not a probability in [0, 1]")
    return p
