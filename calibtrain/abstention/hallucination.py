"""Hallucination rate under control: wrong answers as a share of all questions, the refused ones included.

Unlike the risk among the answers given, this rate never falls when more is answered, so that no sequence of tests is
needed: with a threshold just above the confidence of the (m + 1)th most confident wrong answer, exactly the m wrong
answers above it are given (fewer where they are tied).

- In expectation (conformal risk control, Angelopoulos et al. 2022, arXiv 2208.02814): the largest m with
  (m + 1) / (n + 1) <= rate. A new question is answered wrongly with probability at most `rate`, over the draw of the
  graded answers and of the question.
- With probability 1 - delta over the graded answers (risk-controlling prediction sets, Bates et al. 2021, arXiv
  2101.02703): the largest m whose one-sided Clopper-Pearson bound is at most `rate`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from calibtrain.abstention.certificate import checked_answers, data_hash
from calibtrain.errors import UserError


@dataclass(frozen=True, slots=True)
class HallucinationCertificate:
    """Answering iff confidence >= threshold answers at most target_rate of all questions wrongly."""

    threshold: float  # may lie above every confidence: then nothing is answered
    target_rate: float
    delta: float | None  # None: the rate holds in expectation
    n: int  # graded answers
    n_answered: int
    n_wrong: int  # of the answered
    coverage: float  # n_answered / n
    data_hash: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HallucinationCertificate:
        """Certificate of `as_dict()` values; UserError for other keys."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError(f"hallucination certificate: expected the keys {sorted(names)}; calibrate again")
        return cls(**values)


def control_hallucinations(
    confidence: ArrayLike, correct: ArrayLike, target_rate: float, delta: float | None = None
) -> HallucinationCertificate | None:
    """The lowest threshold that keeps the hallucination rate, or None where so few answers can show nothing.

    confidence (n,) in [0, 1], correct (n,) bool or 0/1: independent answers used for nothing else. Without `delta` the rate
    holds in expectation, with it at confidence 1 - delta. Raises UserError for malformed input.
    """
    q, y = checked_answers(confidence, correct, target_rate, 0.5 if delta is None else delta)
    allowed = allowed_errors(len(q), target_rate, delta)
    if allowed < 0:
        return None
    wrong = -np.sort(-q[~y])
    threshold = float(np.nextafter(wrong[allowed], 2.0)) if len(wrong) > allowed else 0.0
    answered = q >= threshold
    return HallucinationCertificate(
        threshold=threshold,
        target_rate=target_rate,
        delta=delta,
        n=len(q),
        n_answered=int(answered.sum()),
        n_wrong=int((answered & ~y).sum()),
        coverage=float(answered.mean()),
        data_hash=data_hash(confidence, correct),
    )


def allowed_errors(n: int, target_rate: float, delta: float | None = None) -> int:
    """How many of n questions may be answered wrongly; -1 where not even 0 shows the rate."""
    if delta is None:
        # A product such as 0.1 * 30 may fall short of the integer it stands for by a rounding error.
        return max(-1, int(np.floor(target_rate * (n + 1) + 1e-9)) - 1)
    if n == 0:
        return -1
    most = int(scipy.stats.binom.ppf(delta, n, target_rate))
    return most if scipy.stats.binom.cdf(most, n, target_rate) <= delta else most - 1
