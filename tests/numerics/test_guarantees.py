"""The guarantees, by simulation: 1,000 draws of graded answers from populations whose true risk is known.

A violation is a certificate whose true risk exceeds the certified one. Counts are held against the 99.9% quantile of
what a procedure that violates with probability exactly delta would show.
"""

import numpy as np
import pytest
from scipy.stats import binom

from calibtrain.abstention.certificate import certify
from calibtrain.abstention.groups import certify_groups
from calibtrain.abstention.hallucination import control_hallucinations
from calibtrain.abstention.monitor import log_evidence, start_capital, step

DRAWS, DELTA = 1000, 0.1
MOST = binom.ppf(0.999, DRAWS, DELTA)
SIZES = (59, *(pytest.param(n, marks=pytest.mark.slow) for n in (300, 1000)))


class Population:
    """Confidences on a grid, with weights and chances of being wrong: true risks are exact sums."""

    def __init__(self, confidence, weight, wrong):
        self.q, self.weight, self.wrong = (np.asarray(x, dtype=np.float64) for x in (confidence, weight, wrong))
        self.weight = self.weight / self.weight.sum()

    def draw(self, rng, n):
        place = rng.choice(len(self.q), n, p=self.weight)
        return self.q[place], rng.random(n) >= self.wrong[place]

    def risk(self, threshold):
        above = self.q >= threshold
        return (self.weight * self.wrong)[above].sum() / self.weight[above].sum() if above.any() else 0.0

    def hallucination_rate(self, threshold):
        return (self.weight * self.wrong)[self.q >= threshold].sum()


def populations(risk):
    fine = (np.arange(2000) + 0.5) / 2000
    flat = np.ones(2000)
    return {
        "just above the target everywhere": Population(fine, flat, np.full(2000, risk * 1.01)),
        "calibrated": Population(fine, flat, 1 - fine),
        "one confidence for all": Population([0.7], [1], [risk * 1.01]),
        # The most confident answers are good and few; the next tie takes the set just over the target.
        "a tie at the cut": Population([0.9, 0.8, 0.1], [0.3, 0.3, 0.4], [risk * 0.5, risk * 1.55, 0.9]),
        "ties of every size": Population(
            [0.9, 0.8, 0.6, 0.5], [1, 2, 4, 8], [risk * 0.9, risk, risk * 1.2, risk * 1.3]
        ),
        # Selective risk passes the target many times as coverage grows.
        "waves": Population(fine, flat, np.clip(risk * (1 + 1.2 * np.sin(40 * fine)), 0, 1)),
        "comb": Population(fine, flat, np.where((fine * 50).astype(int) % 2 == 0, 0.02, 2 * risk)),
        "most confident are worst": Population(fine, flat, np.clip(2.2 * risk * fine, 0, 1)),
    }


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", populations(0.1))
def test_selective_risk(name, n):
    population = populations(0.1)[name]
    rng = np.random.default_rng(n)
    violations = 0
    for _ in range(DRAWS):
        found = certify(*population.draw(rng, n), 0.1, DELTA).certificate
        violations += found is not None and population.risk(found.threshold) > found.risk_bound
    assert violations <= MOST


@pytest.mark.parametrize("n", SIZES)
def test_no_certificate_where_none_is_due(n):
    # Every threshold's risk is above the target: a certificate is a violation whatever its threshold.
    population = Population([0.9, 0.5, 0.2], [1, 1, 1], [0.13, 0.16, 0.3])
    rng = np.random.default_rng(n)
    given = sum(certify(*population.draw(rng, n), 0.1, DELTA).certificate is not None for _ in range(DRAWS))
    assert given <= MOST
    few = Population([0.9, 0.5, 0.2], [1, 1, 1], [0.4, 0.5, 0.6])
    assert not any(certify(*few.draw(rng, n), 0.1, DELTA).certificate for _ in range(DRAWS // 5))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ["waves", "comb", "ties of every size"])
def test_thresholds_fixed_beforehand_hold_for_any_population(name, n):
    population = populations(0.1)[name]
    rng = np.random.default_rng(n)
    violations = 0
    for _ in range(DRAWS):
        found = certify(*population.draw(rng, n), 0.1, DELTA, thresholds=np.linspace(0.95, 0, 20)).certificate
        violations += found is not None and population.risk(found.threshold) > found.risk_bound
    assert violations <= MOST


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", populations(0.1))
def test_hallucination_rate(name, n):
    population = populations(0.1)[name]
    rng = np.random.default_rng(n)
    rates, violations = [], 0
    for _ in range(DRAWS):
        q, y = population.draw(rng, n)
        expected, certain = control_hallucinations(q, y, 0.07), control_hallucinations(q, y, 0.07, DELTA)
        rates.append(population.hallucination_rate(expected.threshold))
        violations += certain is not None and population.hallucination_rate(certain.threshold) > 0.07
    assert np.mean(rates) <= 0.07 + 3.1 * np.std(rates) / np.sqrt(DRAWS)  # in expectation
    assert violations <= MOST  # with probability 1 - delta


@pytest.mark.parametrize("n", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_all_groups_hold_together(n):
    groups = {f"group {i}": Population([0.9, 0.4], [1, 1], [0.101, 0.101]) for i in range(3)}
    rng = np.random.default_rng(n)
    violations = 0
    for _ in range(DRAWS):
        drawn = {name: one.draw(rng, n) for name, one in groups.items()}
        q, y = (np.concatenate([pair[i] for pair in drawn.values()]) for i in (0, 1))
        found = certify_groups(q, y, np.repeat(list(groups), n), 0.1, DELTA).groups
        violations += any(
            one.certificate is not None and groups[name].risk(one.certificate.threshold) > 0.1
            for name, one in found.items()
        )
    assert violations <= MOST


@pytest.mark.parametrize("risk", [0.05, 0.3])
def test_the_alarm_is_seldom_false_over_long_streams(risk):
    rng = np.random.default_rng(0)
    capital, largest = start_capital((DRAWS,)), np.zeros(DRAWS)
    for t in range(1, 1001):
        capital = step(capital, t, rng.random(DRAWS) < risk, risk)
        largest = np.maximum(largest, log_evidence(capital, t))
    false = (largest >= np.log(1 / DELTA)).sum()
    assert 0.1 * DRAWS * DELTA < false <= MOST  # and the bound is no idle one


def test_these_tests_can_fail():
    # The largest coverage whose observed risk meets the target, and a repeated test at every answer.
    population = populations(0.1)["just above the target everywhere"]
    rng = np.random.default_rng(0)
    naive = repeated = 0
    for _ in range(200):
        q, y = population.draw(rng, 300)
        wrong = np.cumsum(~y[np.argsort(-q)])
        naive += bool((wrong / np.arange(1, 301) <= 0.1)[20:].any())
        stream = np.cumsum(rng.random(1000) < 0.1)
        repeated += bool((binom.sf(stream - 1, np.arange(1, 1001), 0.1) <= DELTA).any())
    assert naive > 2 * binom.ppf(0.999, 200, DELTA)
    assert repeated > 2 * binom.ppf(0.999, 200, DELTA)
