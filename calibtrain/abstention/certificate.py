"""Certified answer/abstain thresholds: selective risk at most r with probability 1 - delta over the graded answers.

Fixed-sequence testing (Angelopoulos et al. 2021, arXiv 2110.01052) of H_j: "more than r of the answers above threshold
j are wrong", from few answers to many, each at level delta by the exact binomial test (equivalently: one-sided
Clopper-Pearson bound <= r), stopping at the first H_j that stands. Only integer counts enter.

The sequence is fixed by (n, r, delta) alone. Step e asks whether the k_e most confident answers hold at most e wrong
ones, k_e being the smallest number for which e errors still prove the claim; any other number of answers allows the
same errors on more answers, a weaker test. The first step is the one that allows `START` of the errors r * n: starting
at k_0, where a single error ends the search, fails a good model far more often (tests/unit/abstention show it).

Why the thresholds may come from these very confidences, though never from the grades. Threshold j lies just above t,
the confidence that follows the k_j most confident ones; answers tied with t stay out. Given t, the answers above t are
independent draws from the population above t, so their errors are binomial with exactly the risk claimed: each test is
exact, whatever the distribution, ties included. Over the sequence, let tau be where selective risk passes r as
coverage grows. Given how many answers lie above tau, the first tested set that reaches below tau holds binomial(r)
errors from above tau and errors from below at a mean rate over r, in all stochastically at least binomial(k, r): the
first true H_j is rejected with probability at most delta. This needs selective risk to pass r only once. Where it passes
several times (the confidences rank badly) the first true H_j itself depends on the draw and the argument has a gap:
simulations with waves and combs about r keep to delta (tests/numerics/test_guarantees.py), but are no proof. With
`thresholds` fixed beforehand, from other data, the guarantee holds for any distribution.

What nothing here can mend: answers that were used for training, for the temperature or for choosing the model, and
questions in use that are not like those graded.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from calibtrain.abstention.strata import GroupRisk
from calibtrain.calibration.intervals import clopper_pearson_upper
from calibtrain.errors import UserError

START = 0.02
"""The first tested set may hold this share of the errors r * n that answering everything could afford."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """Answering iff confidence >= threshold is wrong in at most target_risk of the answers, at confidence 1 - delta.

    risk_bound is the certified bound: target_risk, fixed before the search, or less where everything may be answered.
    The exact bound at a threshold that the search picked would be lower, but the picking makes it too low: n_wrong and
    n_answered are there to see for oneself.
    """

    threshold: float
    target_risk: float
    risk_bound: float
    delta: float
    n: int  # graded answers
    n_answered: int
    n_wrong: int  # of the answered
    coverage: float  # n_answered / n
    data_hash: str  # of the graded answers, whatever their order

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """JSON text that `from_json` reads."""
        return json.dumps(self.as_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        """Certificate of `as_dict()` values; UserError for other keys, and for numbers that do not prove the claim."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError(f"certificate: expected the keys {sorted(names)}; run `calibtrain calibrate` again")
        found = cls(**values)
        if not found._is_proof():
            raise UserError(f"certificate: its numbers do not prove it ({values}); run `calibtrain calibrate` again")
        return found

    def _is_proof(self) -> bool:
        """Whether the counts show the claim. False for NaN, null and text, by which nothing could be refused."""
        numbers = (self.threshold, self.target_risk, self.risk_bound, self.delta, self.coverage)
        counts = (self.n, self.n_answered, self.n_wrong)
        if not all(type(one) in (int, float) for one in numbers) or not all(type(one) is int for one in counts):
            return False
        return bool(
            0 <= self.threshold <= np.nextafter(1.0, 2.0)
            and 0 < self.risk_bound <= self.target_risk < 1
            and 0 < self.delta < 1
            and 0 <= self.n_wrong <= self.n_answered <= self.n
            and self.n_answered > 0
            and math.isclose(self.coverage, self.n_answered / self.n)
            and self._shows_it()
        )

    def _shows_it(self) -> bool:
        """Whether the counts, which can be, reject a larger risk."""
        return bool(scipy.stats.binom.cdf(self.n_wrong, self.n_answered, self.target_risk) <= self.delta)

    @property
    def shown(self) -> str:
        """What it rests on, in plain words."""
        return f"{self.n_answered} answered, {self.n_wrong} wrong"

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Certificate of `to_json()` text; UserError for anything else."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"certificate: not JSON ({error}); run `calibtrain calibrate` again") from error


@dataclass(frozen=True, slots=True)
class Certification:
    """The outcome of `certify`: a certificate, or None and why in plain words."""

    certificate: Certificate | None
    reason: str
    exceptions: tuple[GroupRisk, ...] = ()  # groups of the graded answers that break the promise


def certify(
    confidence: ArrayLike,
    correct: ArrayLike,
    target_risk: float,
    delta: float,
    thresholds: Sequence[float] | None = None,
) -> Certification:
    """The lowest threshold that fixed-sequence testing certifies, or none.

    confidence (n,) in [0, 1], correct (n,) bool or 0/1: independent answers used for nothing else. thresholds:
    descending, fixed without looking at these answers; by default derived from n, target_risk, delta and the
    confidences (module docstring: when that is valid). Raises UserError for malformed input.
    """
    q, y = checked_answers(confidence, correct, target_risk, delta)
    smallest = minimum_answers(target_risk, delta)
    if len(q) < smallest:
        return Certification(
            None, f"{len(q)} graded answers; a risk of {target_risk:g} at delta {delta:g} needs at least {smallest}"
        )
    order = np.argsort(-q, kind="stable")
    q, wrong_ahead = q[order], np.append(0, np.cumsum(~y[order]))
    tests = _rank_tests(q, target_risk, delta) if thresholds is None else _fixed_tests(q, thresholds)
    sizes = np.array([answered for _, answered in tests], dtype=np.int64)
    proven = (sizes > 0) & (scipy.stats.binom.cdf(wrong_ahead[sizes], sizes, target_risk) <= delta)
    passed = int(np.argmin(np.append(proven, False)))  # the steps before the first that proves nothing
    if passed == 0:
        return Certification(None, _why_none(tests, wrong_ahead, target_risk, delta))
    threshold, answered = tests[passed - 1]
    wrong = int(wrong_ahead[answered])
    return Certification(
        Certificate(
            threshold=threshold,
            target_risk=target_risk,
            risk_bound=min(clopper_pearson_upper(wrong, answered, delta), target_risk)
            if answered == len(q)
            else target_risk,
            delta=delta,
            n=len(q),
            n_answered=answered,
            n_wrong=wrong,
            coverage=answered / len(q),
            data_hash=data_hash(confidence, correct),
        ),
        f"{answered} of {len(q)} answered, {wrong} of them wrong",
    )


def certified_curve(
    confidence: ArrayLike, correct: ArrayLike, target_risks: Sequence[float], delta: float
) -> dict[float, Certification]:
    """`certify` for several target risks, each at delta / len(target_risks): with probability 1 - delta all hold."""
    if not target_risks:
        raise UserError("target_risks: give at least one")
    return {risk: certify(confidence, correct, risk, delta / len(target_risks)) for risk in target_risks}


def minimum_answers(target_risk: float, delta: float) -> int:
    """How many answers without any error prove the target: the least number that can be certified."""
    return max(1, math.ceil(math.log(delta) / math.log1p(-target_risk) - 1e-12))


@lru_cache(maxsize=64)
def sequence_sizes(n: int, target_risk: float, delta: float) -> tuple[int, ...]:
    """How many of the most confident of n answers each step looks at: ascending up to n, or none if n is too small."""
    k = np.arange(1, n + 1)
    most = scipy.stats.binom.ppf(delta, k, target_risk)
    most = np.where(
        scipy.stats.binom.cdf(most, k, target_risk) <= delta, most, most - 1
    )  # errors that k answers may hold; -1: none
    sizes = k[np.flatnonzero(np.diff(most, prepend=-1) > 0)].tolist()
    sizes = sizes[min(int(START * target_risk * n), max(len(sizes) - 1, 0)) :]
    return (*sizes, n) if sizes and sizes[-1] < n else tuple(sizes)


def data_hash(confidence: ArrayLike, correct: ArrayLike) -> str:
    """SHA-256 of the graded answers (confidence as float64, correct), the same for every order of them."""
    q, y = np.asarray(confidence, dtype="<f8"), np.asarray(correct, dtype="<f8")
    order = np.lexsort((y, q))
    return hashlib.sha256(q[order].tobytes() + y[order].astype(np.uint8).tobytes()).hexdigest()


def checked_answers(
    confidence: ArrayLike, correct: ArrayLike, target_risk: float, delta: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Confidences and grades as arrays; UserError for malformed input."""
    for name, value in {"target_risk": target_risk, "delta": delta}.items():
        if not 0 < value < 1:
            raise UserError(f"certify: {name} must lie strictly between 0 and 1, got {value}")
    q, y = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if q.ndim != 1 or q.shape != y.shape:
        raise UserError(f"certify: {q.size} confidences and {y.size} grades; give one grade per answer")
    if not ((q >= 0) & (q <= 1)).all():
        raise UserError(f"certify: confidence {q[~((q >= 0) & (q <= 1))][0]} is not a probability in [0, 1]")
    if not np.isin(y, (0, 1)).all():
        raise UserError("certify: grades must be 0 or 1; leave ungraded answers out")
    return q, y > 0


def _rank_tests(q: NDArray[np.float64], target_risk: float, delta: float) -> list[tuple[float, int]]:
    """(threshold, number answered) of each step, for descending confidences q; ties with the next answer stay out."""
    smallest = minimum_answers(target_risk, delta)
    tests: list[tuple[float, int]] = []
    for size in sequence_sizes(len(q), target_risk, delta):
        if size == len(q):
            threshold, answered = 0.0, size
        else:
            threshold = float(np.nextafter(q[size], 2.0))
            answered = int(np.searchsorted(-q, -threshold, side="right"))
        # A tie across the cut can leave too few to prove anything, or the set of the step before: known without grades.
        if answered >= smallest and (not tests or answered > tests[-1][1]):
            tests.append((threshold, answered))
    return tests


def _fixed_tests(q: NDArray[np.float64], thresholds: Sequence[float]) -> list[tuple[float, int]]:
    """(threshold, number answered) of each given threshold."""
    if any(b >= a for a, b in zip(thresholds, list(thresholds)[1:], strict=False)):
        raise UserError("thresholds: give them in descending order, without repeats")
    return [(float(t), int(np.searchsorted(-q, -float(t), side="right"))) for t in thresholds]


def _why_none(tests: list[tuple[float, int]], wrong_ahead: NDArray[np.int64], target_risk: float, delta: float) -> str:
    """Plain words for a failed first test."""
    if not tests:
        return "the confidences are so tied that no threshold separates enough answers"
    answered = tests[0][1]
    wrong = int(wrong_ahead[answered])
    bound = clopper_pearson_upper(wrong, answered, delta)
    return (
        f"of the {answered} most confident answers {wrong} are wrong; at confidence {1 - delta:g} that shows a risk of "
        f"at most {bound:.3f}, not {target_risk:g}"
    )
