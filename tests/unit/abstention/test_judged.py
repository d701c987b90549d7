"""Certificates by a judge's grades and an audited sample: valid whatever the judge does, and worth having it."""

import json
from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from calibtrain.abstention.certificate import certify
from calibtrain.abstention.judged import Audited, JudgedCertificate, certify_judged, risk_is_at_most
from calibtrain.errors import UserError


class Population:
    """Answers with a lenient judge: it misses every fifth wrong one, and more where the model is sure; of the right ones it
    calls every eighth wrong, most of them where the model is not sure."""

    def __init__(self, missed=0.2, invented=0.8, size=100_000):
        rng = np.random.default_rng(3)
        self.q = rng.beta(2, 1, size)
        self.y = rng.random(size) < self.q
        misses, invents = missed * (0.5 + self.q), np.where(self.q < 0.5, invented, invented / 40)
        self.j = np.where(self.y, rng.random(size) >= invents, rng.random(size) < misses)
        order = np.argsort(-self.q)
        self.risks = np.cumsum(~self.y[order]) / np.arange(1, size + 1)
        self.sorted = -self.q[order]

    def risk(self, threshold):
        return self.risks[np.searchsorted(self.sorted, -threshold, side="right") - 1]

    def draw(self, rng, n, audits):
        i = rng.integers(0, len(self.q), n)
        audited = np.full(n, np.nan)
        chosen = rng.choice(n, audits, replace=False)
        audited[chosen] = self.y[i][chosen]
        return self.q[i], self.j[i], audited


def violations(population, draws, n, audits, risk, delta):
    """How often the certified, and the naive, risk is exceeded; mean coverage by both samples, and by the audits alone."""
    rng = np.random.default_rng(0)
    ours = naive = 0
    covers, alone = [], []
    for _ in range(draws):
        q, j, audited = population.draw(rng, n, audits)
        found = certify_judged(q, j, audited, risk, delta).certificate
        ours += found is not None and population.risk(found.threshold) > risk
        covers.append(found.coverage if found else 0.0)
        trusting = certify(q, j, risk, delta).certificate
        naive += trusting is not None and population.risk(trusting.threshold) > risk
        has = ~np.isnan(audited)
        exact = certify(q[has], audited[has], risk, delta).certificate
        alone.append(exact.coverage if exact else 0.0)
    return ours, naive, np.mean(covers), np.mean(alone)


def test_the_judge_of_these_tests_errs_both_ways():
    population = Population()
    assert 0.1 < population.j[~population.y].mean() < 0.25
    assert 0.1 < (~population.j[population.y]).mean() < 0.2


def test_a_judges_errors_do_not_break_the_promise_that_his_grades_alone_would():
    draws, delta = 100, 0.1
    ours, naive, covers, _ = violations(Population(), draws, 500, 80, 0.2, delta)
    assert ours <= binom.ppf(0.999, draws, delta)
    assert naive > 3 * delta * draws
    assert covers > 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("audits", "risk"), [(80, 0.2), (120, 0.15), (240, 0.1)])
def test_over_2000_draws_the_promise_is_broken_at_most_as_often_as_delta(audits, risk):
    draws, delta = 2000, 0.1
    ours, naive, covers, alone = violations(Population(), draws, 500, audits, risk, delta)
    print(
        f"audits {audits}, risk {risk}: ours {ours}, naive {naive}, coverage {covers:.3f}, by audits alone {alone:.3f}"
    )
    assert ours <= delta * draws
    assert naive > 1.2 * delta * draws


def test_a_good_judge_is_worth_audits():
    _, _, covers, alone = violations(Population(missed=0.03, invented=0.1), 25, 800, 80, 0.2, 0.1)
    assert covers > 1.1 * alone


@pytest.mark.parametrize(("n", "audits", "risk"), [(20, 6, 0.5), (14, 9, 0.4)])
def test_the_test_keeps_its_level_exactly(n, audits, risk):
    # Every outcome, weighed by its exact probability, at many points where the risk is just the claimed one.
    delta, unaudited = 0.2, n - audits
    rejected = np.zeros((audits + 1, unaudited + 1, audits + 1, audits + 1), dtype=bool)
    for called, others in product(range(audits + 1), range(unaudited + 1)):
        for wrong, right in product(range(called + 1), range(audits - called + 1)):
            counts = Audited(n, called + others, audits - called, right, called, wrong)
            rejected[called, others, wrong, right] = risk_is_at_most(risk, delta, counts)
    assert rejected.any()
    largest = 0.0
    for p, a in product(np.linspace(0, 0.99, 23), np.linspace(0, 1, 21)):
        b = (risk - p * a) / (1 - p)
        if not 0 <= b <= 1:
            continue
        total = 0.0
        for called in range(audits + 1):
            masses = (
                binom.pmf(np.arange(unaudited + 1), unaudited, p),
                binom.pmf(np.arange(audits + 1), called, a),
                binom.pmf(np.arange(audits + 1), audits - called, b),
            )
            total += binom.pmf(called, audits, p) * np.einsum("jwr,j,w,r->", rejected[called], *masses)
        largest = max(largest, total)
    assert 0.02 < largest <= delta


def test_a_certificate_says_what_it_rests_on_and_is_read_again():
    population = Population()
    q, j, audited = population.draw(np.random.default_rng(1), 800, 200)
    outcome = certify_judged(q, j, audited, 0.3, 0.1)
    found = outcome.certificate
    answered, has = q >= found.threshold, ~np.isnan(audited)
    assert (found.n, found.n_answered, found.n_wrong) == (800, answered.sum(), (answered & ~j).sum())
    assert (found.n_audited, found.right_audited) == (200, (answered & has & j).sum())
    assert (found.right_wrong, found.wrong_wrong) == tuple((answered & (audited == 0) & one).sum() for one in (j, ~j))
    assert f"{found.n_wrong} of them wrong by the judge" in outcome.reason
    order = np.random.default_rng(0).permutation(800)
    assert certify_judged(q[order], j[order], audited[order], 0.3, 0.1).certificate == found
    assert JudgedCertificate.from_dict(json.loads(found.to_json())) == found
    for change in ({"right_wrong": found.right_audited}, {"n_wrong": 0}, {"wrong_audited": None}, {"n_audited": 10**6}):
        with pytest.raises(UserError, match="do not prove"):
            JudgedCertificate.from_dict(found.as_dict() | change)


def test_none_with_a_reason():
    q, j = np.linspace(0, 1, 100), np.ones(100)
    audited = np.full(100, np.nan)
    assert "0 audited answers" in certify_judged(q, j, audited, 0.2, 0.1).reason
    audited[::2] = 0  # the judge is always wrong
    found = certify_judged(q, j, audited, 0.2, 0.1)
    assert found.certificate is None
    assert "the judge calls 0 wrong, and of" in found.reason
    tied = certify_judged(np.full(100, 0.5), j, np.where(np.isnan(audited), np.nan, 1.0), 0.2, 0.1)
    assert tied.certificate.coverage == 1


def test_a_judge_that_was_always_right_answers_everything():
    q, audited = np.linspace(0, 1, 300), np.full(300, np.nan)
    audited[::3] = 1
    assert certify_judged(q, np.ones(300), audited, 0.1, 0.1).certificate.coverage == 1


@pytest.mark.parametrize("audited", [[1.0], [0.5, np.nan], [2, 0]])
def test_malformed_audits_are_refused(audited):
    with pytest.raises(UserError, match="one audited grade per answer"):
        certify_judged([0.5, 0.6], [1, 0], audited, 0.2, 0.1)
