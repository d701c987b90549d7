"""Certified thresholds where a judge graded all n answers and a person a random m of them: the judge's errors are paid for.

Of the k answers above a threshold let p be the chance that the judge calls one wrong, a (b) the chance that one which it
calls wrong (right) is wrong: the risk is p a + (1 - p) b. H: "the risk is more than r" is tested by T, an upper limit of
that sum: the estimate from the k verdicts and the audited shares, and the root of the squared reaches of their Wilson
limits (MOVER; Zou, Donner 2008), raised where needed so that T falls in none of the counts. T only orders outcomes; no
normal law is assumed.

Proof. The audited are a random subset, so given their verdicts the verdicts of the others are binomial(p) and the wrong
ones among the audited binomial(a) and binomial(b), all independent: P(T <= t) is a finite sum, exact at each (p, a, b).
It falls in p, a and b, so that its value at the lower corner of a cell bounds it on the whole cell: cells are split
until none of those that reach H has P(T <= t) > delta' at its corner (H is rejected), or a point of H has it (H stands).
p and a are sought in Clopper-Pearson intervals at delta / 50 each (Berger, Boos 1994), and delta' is what these leave of
delta.

The thresholds follow the confidences of the audited answers, from few to many, each tested at level delta, and the first
that stands ends the search: see calibtrain.abstention.certificate for why that is valid, and for its limit. A judge that
is often wrong, or that the answers have fooled, costs power and never validity; one that is often right saves audits.
This is the idea of prediction-powered inference (Angelopoulos et al. 2023, arXiv 2301.09633) with an exact test in place
of its normal law.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, gammaln, ndtri, xlog1py, xlogy

from calibtrain.abstention.certificate import (
    Certificate,
    Certification,
    checked_answers,
    data_hash,
    minimum_answers,
)
from calibtrain.calibration.intervals import clopper_pearson, clopper_pearson_upper
from calibtrain.errors import UserError

FIRST, ENOUGH = 0.25, 2
"""The first tested threshold answers this share of the audited, or ENOUGH times as many as could prove it at best."""
STEPS = 12
"""Thresholds that are tested at most."""
SLACK = 0.02
"""Share of delta that each of the intervals of p and a costs."""
CELLS = 4000
"""Cells that are looked at; what they do not show is not proven."""
VERDICTS = 48
"""Groups of numbers of verdicts that are told apart."""
BEYOND = 1e-9
"""Mass of the verdicts' binomial that is left out at either end, and is taken off delta."""


@dataclass(frozen=True, slots=True)
class Audited:
    """Counts of the answers above a threshold."""

    n: int  # answered
    called_wrong: int  # of them, by the judge
    right_audited: int  # called right, and audited
    right_wrong: int  # of these, wrong
    wrong_audited: int  # called wrong, and audited
    wrong_wrong: int  # of these, wrong

    @property
    def sound(self) -> bool:
        """Whether such counts can be."""
        called_right = self.n - self.called_wrong
        return (
            0 <= self.right_wrong <= self.right_audited <= called_right
            and 0 <= self.wrong_wrong <= self.wrong_audited <= self.called_wrong
        )

    @property
    def risk(self) -> float:
        """The estimate: what the judge called wrong and right, each with its audited share of wrong answers."""
        called, right, wrong = self.called_wrong / self.n, self.right_wrong, self.wrong_wrong
        among_wrong = wrong / self.wrong_audited if self.wrong_audited else 1.0
        among_right = right / self.right_audited if self.right_audited else 1.0
        return called * among_wrong + (1 - called) * among_right


@dataclass(frozen=True, slots=True)
class JudgedCertificate(Certificate):
    """A certificate by a judge's grades and an audited sample of them; `n_wrong` is what the judge calls wrong."""

    n_audited: int  # of the n
    right_audited: int  # of the answered: called right, and audited
    right_wrong: int
    wrong_audited: int
    wrong_wrong: int

    @property
    def counts(self) -> Audited:
        """Of the answers at or above the threshold."""
        return Audited(
            self.n_answered, self.n_wrong, self.right_audited, self.right_wrong, self.wrong_audited, self.wrong_wrong
        )

    @property
    def shown(self) -> str:
        """What it rests on, in plain words."""
        audited = self.right_audited + self.wrong_audited
        return (
            f"{self.n_answered} answered, {self.n_wrong} of them wrong by the judge; of {audited} that a person audited "
            f"{self.right_wrong + self.wrong_wrong} are wrong, which makes {self.counts.risk:.1%} of all"
        )

    def _shows_it(self) -> bool:
        counts = (self.n_audited, self.right_audited, self.right_wrong, self.wrong_audited, self.wrong_wrong)
        return (
            all(type(one) is int for one in counts)
            and self.counts.sound
            and self.right_audited + self.wrong_audited <= self.n_audited <= self.n
            and risk_is_at_most(self.target_risk, self.delta, self.counts)
        )


def certify_judged(
    confidence: ArrayLike, judged: ArrayLike, audited: ArrayLike, target_risk: float, delta: float
) -> Certification:
    """The lowest threshold that the judge's grades and the audited ones certify, or none.

    confidence (n,) in [0, 1], judged (n,) bool or 0/1: the judge's grades; audited (n,): a person's, 0 or 1, NaN where none;
    the audited answers are a uniform random choice. Raises UserError for malformed input.
    """
    q, j = checked_answers(confidence, judged, target_risk, delta)
    truth = np.asarray(audited, dtype=np.float64)
    if truth.shape != q.shape or not np.isin(truth[~np.isnan(truth)], (0, 1)).all():
        raise UserError("certify: give one audited grade per answer: 0, 1, or NaN where there is none")
    order = np.argsort(-q, kind="stable")
    q, j, truth = q[order], j[order], truth[order]
    places = np.flatnonzero(~np.isnan(truth))
    smallest = minimum_answers(target_risk, delta)
    if len(places) < smallest:
        return Certification(
            None,
            f"{len(places)} audited answers; a risk of {target_risk:g} at delta {delta:g} needs at least {smallest}",
        )
    best: tuple[float, Audited] | None = None
    for threshold, size in _thresholds(q, places, smallest):
        counts = _counts(j[:size], truth[:size])
        if not risk_is_at_most(target_risk, delta, counts):
            if best is None:
                return Certification(None, _why_none(counts, target_risk, delta))
            break
        best = threshold, counts
    if best is None:
        return Certification(None, "the confidences are so tied that no threshold separates enough audited answers")
    threshold, counts = best
    found = JudgedCertificate(
        threshold=threshold,
        target_risk=target_risk,
        risk_bound=target_risk,
        delta=delta,
        n=len(q),
        n_answered=counts.n,
        n_wrong=counts.called_wrong,
        coverage=counts.n / len(q),
        data_hash=data_hash(confidence, judged),
        n_audited=len(places),
        right_audited=counts.right_audited,
        right_wrong=counts.right_wrong,
        wrong_audited=counts.wrong_audited,
        wrong_wrong=counts.wrong_wrong,
    )
    return Certification(found, found.shown)


def risk_is_at_most(target_risk: float, delta: float, counts: Audited) -> bool:
    """Whether the counts prove the risk to be at most target_risk: a true "more" is missed with chance delta at most."""
    return counts.risk < target_risk and _Test(target_risk, delta, counts).rejects()


class _Test:
    """The exact test of "the risk is more than r" (module docstring)."""

    def __init__(self, target_risk: float, delta: float, counts: Audited) -> None:
        self.r, self.counts = target_risk, counts
        self.level = delta * (1 - 2 * SLACK) - 2 * BEYOND
        called = clopper_pearson(counts.called_wrong, counts.n, 1 - SLACK * delta)
        self.p = (called[0], min(called[1], 1 - 1e-12))
        self.a = clopper_pearson(counts.wrong_wrong, counts.wrong_audited, 1 - SLACK * delta)
        self.z = float(ndtri(1 - delta))
        self.unaudited = counts.n - counts.right_audited - counts.wrong_audited
        self.verdicts = _range(self.unaudited, *self.p)
        self.starts = np.unique(np.linspace(0, len(self.verdicts) - 1, VERDICTS).astype(np.int64))
        self.wrong = np.arange(counts.wrong_audited + 1)
        self.right = np.arange(counts.right_audited)
        # Cells share their sides: the masses at one p, and at one a, serve many of them.
        self.verdict_mass = lru_cache(maxsize=None)(partial(_mass, self.verdicts, self.unaudited, self.starts))
        self.wrong_mass = lru_cache(maxsize=None)(partial(_mass, self.wrong, counts.wrong_audited, None))
        self.limits = self._limits()

    def rejects(self) -> bool:
        """Whether every (p, a, b) of H makes a T as small as the one seen at most as likely as the level."""
        cells = [(*self.p, *self.a)]
        for _ in range(CELLS):
            if not cells:
                return True
            low_p, high_p, low_a, high_a = cells.pop()
            b = min(self._b(low_p, high_a), self._b(high_p, high_a))
            if b > 1 or self._chance(low_p, low_a, max(b, 0.0)) <= self.level:
                continue
            p, a = (low_p + high_p) / 2, (low_a + high_a) / 2
            b = self._b(p, a)
            if b <= 1 and self._chance(p, a, max(b, 0.0)) > self.level:
                return False
            if (high_p - low_p) * (self.a[1] - self.a[0]) > (high_a - low_a) * (self.p[1] - self.p[0]):
                cells += [(low_p, p, low_a, high_a), (p, high_p, low_a, high_a)]
            else:
                cells += [(low_p, high_p, low_a, a), (low_p, high_p, a, high_a)]
        return False

    def _b(self, p: float, a: float) -> float:
        """The b at which the risk is r."""
        return (self.r - p * a) / (1 - p)

    def _chance(self, p: float, a: float, b: float) -> float:
        """P(T <= t)."""
        below = np.concatenate(
            ([0.0], bdtr(self.right, self.counts.right_audited, b), [1.0])
        )  # [x + 1]: at most x wrong
        return float(self.verdict_mass(p) @ (below[self.limits + 1] @ self.wrong_mass(a)))

    def _limits(self) -> NDArray[np.int64]:
        """Most wrong ones among those called right for which T <= t: (groups of verdicts, wrong of those called wrong).

        -1: none. A group counts as its least number of verdicts, the outcome that was seen as well.
        """
        counts = self.counts
        called = counts.wrong_audited + self.verdicts[self.starts]
        table = self._limit(called[:, None, None], self.wrong[None, :, None], np.arange(counts.right_audited + 1))
        for axis in range(3):
            np.maximum.accumulate(table, axis=axis, out=table)
        group = max(0, int(np.searchsorted(called, counts.called_wrong, side="right")) - 1)
        seen = table[group, counts.wrong_wrong, counts.right_wrong]
        limits: NDArray[np.int64] = (table <= seen).sum(axis=2) - 1
        return limits

    def _limit(
        self, called: NDArray[np.int64], wrong: NDArray[np.int64], right: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Upper limit of the risk (MOVER)."""
        p, p_up = _wilson_upper(called, self.counts.n, self.z)
        a, a_up = _wilson_upper(wrong, self.counts.wrong_audited, self.z)
        b, b_up = _wilson_upper(right, self.counts.right_audited, self.z)
        reach = (p * (a_up - a)) ** 2 + ((1 - p) * (b_up - b)) ** 2 + (np.maximum(a - b, 0) * (p_up - p)) ** 2
        found: NDArray[np.float64] = p * a + (1 - p) * b + np.sqrt(reach)
        return found


def _wilson_upper(x: NDArray[np.int64], n: int, z: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares, and their one-sided Wilson limits; 1 for n = 0."""
    if n == 0:
        return np.ones(x.shape), np.ones(x.shape)
    share = x / n
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return share, np.minimum((share + z * z / (2 * n) + half) / (1 + z * z / n), 1.0)


def _mass(x: NDArray[np.int64], n: int, starts: NDArray[np.int64] | None, p: float) -> NDArray[np.float64]:
    """Binomial probabilities, summed over groups that start there."""
    mass: NDArray[np.float64] = np.exp(
        gammaln(n + 1) - gammaln(x + 1) - gammaln(n - x + 1) + xlogy(x, p) + xlog1py(n - x, -p)
    )
    return mass if starts is None else np.add.reduceat(mass, starts)


def _range(n: int, low: float, high: float) -> NDArray[np.int64]:
    """Counts of n that a share between `low` and `high` gives, but for BEYOND at either end."""
    x = np.arange(n + 1)
    first = int(np.searchsorted(bdtr(x, n, low), BEYOND))
    last = int(np.searchsorted(bdtr(x, n, high), 1 - BEYOND))
    return np.arange(first, min(last, n) + 1)


def _thresholds(q: NDArray[np.float64], places: NDArray[np.int64], smallest: int) -> list[tuple[float, int]]:
    """(threshold, number answered) of each step, for descending q and the places of the audited answers in it."""
    first = max(smallest, min(int(np.ceil(FIRST * len(places))), ENOUGH * smallest))
    found: list[tuple[float, int]] = []
    for audits in np.unique(np.linspace(first, len(places), STEPS).round().astype(int)).tolist():
        threshold, size = 0.0, len(q)
        if audits < len(places):
            threshold = float(np.nextafter(q[places[audits]], 2.0))
            size = int(np.searchsorted(-q, -threshold, side="right"))
        enough = int(np.searchsorted(places, size)) >= smallest  # a tie may leave fewer
        if enough and (not found or size > found[-1][1]):
            found.append((threshold, size))
    return found


def _counts(judged: NDArray[np.bool_], truth: NDArray[np.float64]) -> Audited:
    has, wrong = ~np.isnan(truth), truth == 0
    cells = [has & judged, has & judged & wrong, has & ~judged, has & ~judged & wrong]
    return Audited(len(judged), int((~judged).sum()), *(int(one.sum()) for one in cells))


def _why_none(counts: Audited, target_risk: float, delta: float) -> str:
    """Plain words for a failed first test."""
    audited, wrong = counts.right_audited + counts.wrong_audited, counts.right_wrong + counts.wrong_wrong
    return (
        f"of the {counts.n} most confident answers the judge calls {counts.called_wrong} wrong, and of {audited} that were "
        f"audited {wrong} are; together that is {counts.risk:.1%}, which does not prove {target_risk:g} at confidence "
        f"{1 - delta:g} (the audited alone show at most {clopper_pearson_upper(wrong, audited, delta):.1%}); audit more of "
        "them, or allow more risk"
    )
