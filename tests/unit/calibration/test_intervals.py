import math

import numpy as np
import pytest
from scipy import stats

from calibtrain.calibration import metrics, ranking
from calibtrain.calibration.intervals import (
    bootstrap,
    clopper_pearson,
    clopper_pearson_upper,
    paired_bootstrap,
    poisson_weights,
    sample_ids,
    wilson,
)
from calibtrain.errors import UserError


def chosen(state):
    return {"acc": metrics.accuracy(state), "auroc": ranking.auroc(state), "ece_debiased": metrics.ece_debiased(state)}


def data(n=300, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.random(n)
    return q, rng.random(n) < q, np.arange(n)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (57, 1000)])
def test_intervals_of_shares_agree_with_scipy(k, n):
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        theirs = stats.binomtest(k, n).proportion_ci(0.9, method)
        assert ours(k, n, 0.9) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_published_clopper_pearson_upper_bounds():
    for k, n, bound in ((0, 100, 0.0295), (2, 100, 0.0616), (6, 300, 0.0391), (50, 1000, 0.0629)):
        assert clopper_pearson_upper(k, n, 0.05) == pytest.approx(bound, abs=5e-5)


def test_no_samples_and_impossible_counts():
    assert wilson(0, 0) == clopper_pearson(0, 0) == (0.0, 1.0)
    with pytest.raises(UserError, match="3 of 2"):
        wilson(3, 2)


def test_poisson_weights_are_poisson_and_a_function_of_the_id_alone():
    ids = np.arange(200_000)
    weights = poisson_weights(ids, replicate=5, seed=1)
    expected = stats.poisson.pmf(np.arange(5), 1) * len(ids)
    assert stats.chisquare(np.bincount(weights)[:5], expected / expected.sum() * (weights < 5).sum()).pvalue > 1e-3
    assert np.array_equal(poisson_weights(ids[::-1], 5, 1), weights[::-1])
    for other in (poisson_weights(ids, 6, 1), poisson_weights(ids, 5, 2)):
        assert abs(np.corrcoef(weights, other)[0, 1]) < 0.01
    assert abs(np.corrcoef(weights[:-1], weights[1:])[0, 1]) < 0.01


def test_bootstrap_is_deterministic_and_free_of_order():
    q, y, ids = data()
    first = bootstrap(chosen, q, y, ids, replicates=50)
    order = np.random.default_rng(1).permutation(len(q))
    second = bootstrap(chosen, q[order], y[order], ids[order], replicates=50)
    for name, interval in first.items():
        assert second[name].low == pytest.approx(interval.low, abs=1e-12)
        assert second[name].high == pytest.approx(interval.high, abs=1e-12)


def test_bootstrap_of_a_share_matches_its_standard_error():
    q, y, ids = data(400)
    interval = bootstrap(chosen, q, y, ids, replicates=400)["acc"]
    half = 1.96 * math.sqrt(y.mean() * (1 - y.mean()) / len(y))
    assert interval.estimate == y.mean()
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.15)


def test_debiased_ece_interval_covers_zero_for_calibrated_models():
    covered = 0
    for seed in range(20):
        q, y, ids = data(300, seed)
        only = bootstrap(lambda s: {"ece_debiased": metrics.ece_debiased(s)}, q, y, ids, replicates=60)["ece_debiased"]
        covered += only.low <= 0 <= only.high
    assert covered >= 16


def test_pairing_narrows_the_difference_of_two_like_models():
    q, y, ids = data()
    paired = paired_bootstrap(chosen, (q, y), (q**1.1, y), ids, replicates=100)
    assert paired["acc"].low == paired["acc"].estimate == paired["acc"].high == 0
    alone = bootstrap(chosen, q, y, ids, replicates=100)["acc"]
    flipped = y.copy()
    flipped[:5] = ~flipped[:5]
    change = paired_bootstrap(chosen, (q, y), (q, flipped), ids, replicates=100)["acc"]
    assert change.high - change.low < 0.5 * (alone.high - alone.low)


def test_answers_of_one_question_are_resampled_together():
    q, y, ids = data(150)
    alone = bootstrap(chosen, q, y, ids, replicates=100)["acc"]
    twice = bootstrap(chosen, *(np.repeat(x, 2) for x in (q, y, ids)), replicates=100)["acc"]
    assert (twice.low, twice.high) == pytest.approx((alone.low, alone.high))


def test_undefined_metrics_have_no_interval():
    interval = bootstrap(chosen, [0.5, 0.6], [1, 1], [0, 1], replicates=20)["auroc"]
    assert math.isnan(interval.estimate)
    assert math.isnan(interval.low)


def test_ids_of_names_are_stable():
    assert sample_ids(["a", "b"]).tolist() == sample_ids(["a", "b"]).tolist()
    assert len(set(sample_ids(str(i) for i in range(1000)).tolist())) == 1000
    with pytest.raises(UserError, match="equally many"):
        bootstrap(chosen, [0.5], [1], [1, 2])
