"""Means by a judge's grades corrected by audited ones."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from calibtrain.calibration.prediction_powered import Agreement, agreement, corrected, ppi_mean
from calibtrain.errors import UserError


def sample(rng, n, missed=0.15, invented=0.1, right=0.7):
    y = rng.random(n) < right
    return y.astype(float), np.where(y, rng.random(n) >= invented, rng.random(n) < missed).astype(float)


def test_the_mean_is_the_papers():
    rng = np.random.default_rng(0)
    y, f = sample(rng, 150)
    _, others = sample(rng, 2000)
    found = ppi_mean(y, f, others, weight=1.0, level=0.9)
    # Algorithm 1 of arXiv 2301.09633: prediction-powered mean estimation.
    estimate = others.mean() - (f - y).mean()
    half = norm.ppf(0.95) * math.sqrt(np.var(f - y) / 150 + np.var(others) / 2000)
    assert (found.estimate, found.low, found.high) == pytest.approx((estimate, estimate - half, estimate + half))


@pytest.mark.peer
def test_the_mean_is_that_of_the_authors_package():
    ppi = pytest.importorskip("ppi_py")
    rng = np.random.default_rng(1)
    y, f = sample(rng, 200)
    _, others = sample(rng, 3000)
    found = ppi_mean(y, f, others, weight=1.0, level=0.9)
    assert (found.low, found.high) == pytest.approx(ppi.ppi_mean_ci(y, f, others, alpha=0.1, lam=1.0), rel=1e-6)


@pytest.mark.parametrize("weight", [1.0, None])
def test_its_interval_covers_the_truth_where_the_judges_own_mean_does_not(weight):
    rng, held, naive, widths, alone = np.random.default_rng(2), 0, 0, [], []
    for _ in range(600):
        y, f = sample(rng, 120)
        _, others = sample(rng, 1500)
        found = ppi_mean(y, f, others, weight=weight)
        held += found.low <= 0.7 <= found.high
        widths.append(found.high - found.low)
        alone.append(2 * 1.96 * math.sqrt(np.var(y) / 120))
        naive += abs(others.mean() - 0.7) <= 1.96 * math.sqrt(np.var(others) / 1500)
    assert held / 600 > 0.925
    assert naive / 600 < 0.6
    assert np.mean(widths) < 0.85 * np.mean(alone)


def test_a_useless_judge_costs_nothing():
    rng = np.random.default_rng(3)
    y, f, others = (rng.random(n) < 0.5 for n in (200, 200, 2000))
    tuned, audits_alone = ppi_mean(y, f, others), ppi_mean(y, f, [])
    assert tuned.high - tuned.low <= 1.02 * (audits_alone.high - audits_alone.low)
    assert audits_alone.estimate == pytest.approx(np.mean(y))
    assert math.isnan(ppi_mean([], [], others).estimate)


def test_few_audits_without_a_disagreement_do_not_show_that_there_is_none():
    bare, careful = (ppi_mean([1] * 20, [1] * 20, [1] * 100, weight=1.0, careful=one) for one in (False, True))
    assert bare.low == bare.high == 1
    assert careful.low < 0.9


def test_agreement_is_told_with_its_intervals():
    found = agreement([1, 1, 1, 0, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1, 0, 1])
    assert found == Agreement(n=8, both_right=4, judge_right=1, judge_wrong=1, both_wrong=2)
    assert found.accuracy.estimate == 0.75
    assert found.sensitivity.estimate == 0.8
    assert found.specificity.estimate == pytest.approx(2 / 3)
    assert found.kappa == pytest.approx((0.75 - 34 / 64) / (1 - 34 / 64))
    assert found.accuracy.low < 0.75 < found.accuracy.high
    empty = agreement([], []).as_dict()
    assert empty["kappa"] is None
    assert empty["accuracy"] == {"estimate": None, "low": 0.0, "high": 1.0}


def test_what_is_corrected_lies_nearer_to_the_truth():
    rng = np.random.default_rng(4)
    q = rng.random(20_000)
    y = rng.random(20_000) < q
    j = y | (rng.random(20_000) < 0.3)  # calls nearly a third of the wrong ones right
    audited = np.where(rng.random(20_000) < 0.2, y, np.nan)
    found = corrected(q, j, audited, threshold=0.8)
    assert abs(found["accuracy"]["estimate"] - y.mean()) < 0.02 < abs(j.mean() - y.mean())
    assert found["accuracy"]["low"] < y.mean() < found["accuracy"]["high"]
    assert found["overconfidence"]["low"] < 0 < found["overconfidence"]["high"]
    assert found["risk"]["low"] < (~y[q >= 0.8]).mean() < found["risk"]["high"]
    assert [row["n"] for row in found["bins"]] == [4000] * 5
    assert all(abs(row["accuracy"]["estimate"] - row["confidence"]) < 0.06 for row in found["bins"])


def test_values_must_be_pairs():
    with pytest.raises(UserError, match="give one each"):
        ppi_mean([1, 0], [1], [1])
