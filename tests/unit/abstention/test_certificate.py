import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from calibtrain.abstention import certificate as module
from calibtrain.abstention.certificate import (
    Certificate,
    certified_curve,
    certify,
    data_hash,
    minimum_answers,
    sequence_sizes,
)
from calibtrain.calibration.intervals import clopper_pearson_upper
from calibtrain.errors import UserError


def calibrated(n=1000, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.beta(0.6, 0.8, n)
    return q, rng.random(n) < q


def test_minimum_answers_are_the_published_ones():
    assert [minimum_answers(risk, 0.05) for risk in (0.01, 0.02, 0.05, 0.1)] == [299, 149, 59, 29]


@pytest.mark.parametrize(
    ("n", "risk", "delta"), [(1000, 0.2, 0.05), (300, 0.05, 0.05), (59, 0.05, 0.05), (700, 0.1, 0.01)]
)
def test_each_step_is_the_least_number_that_affords_its_errors(n, risk, delta):
    sizes = sequence_sizes(n, risk, delta)
    start = int(module.START * risk * n)
    assert sizes[-1] == n
    for errors, size in enumerate(sizes[:-1], start):
        assert clopper_pearson_upper(errors, size, delta) <= risk < clopper_pearson_upper(errors, size - 1, delta)
    assert sequence_sizes(58, 0.05, 0.05) == ()


@settings(max_examples=80)
@given(st.lists(st.tuples(st.sampled_from([0, 0.2, 0.5, 0.5001, 0.9, 1.0]), st.booleans()), min_size=1, max_size=150))
def test_a_certificate_is_what_it_says(pairs):
    q, y = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    found = certify(q, y, 0.3, 0.1).certificate
    if found is None:
        return
    answered = q >= found.threshold  # ties are in or out together
    assert (found.n, found.n_answered, found.n_wrong) == (len(q), answered.sum(), (answered & ~y).sum())
    assert found.coverage == found.n_answered / found.n
    assert binom.cdf(found.n_wrong, found.n_answered, 0.3) <= 0.1
    assert found.risk_bound <= found.target_risk
    order = np.random.default_rng(0).permutation(len(q))
    assert certify(q[order], y[order], 0.3, 0.1).certificate == found


@pytest.mark.parametrize("kind", ["just above", "calibrated", "cliff", "ties"])
@pytest.mark.parametrize("risk", [0.1, 0.2])
def test_the_certified_risk_is_exceeded_at_most_as_often_as_delta(kind, risk):
    rng = np.random.default_rng(5)
    size, splits, delta = 50_000, 300, 0.1
    q = rng.choice([0.25, 0.5, 0.8], size) if kind == "ties" else rng.random(size)
    chance = {
        "just above": np.full(size, risk * 1.05),
        "calibrated": 1 - q,
        "cliff": np.where(q > 0.6, risk / 2, 0.9),
        "ties": np.where(q == 0.8, risk * 1.05, 0.5),
    }[kind]
    y = rng.random(size) >= chance
    violations = 0
    for _ in range(splits):
        drawn = rng.integers(0, size, 400)
        found = certify(q[drawn], y[drawn], risk, delta).certificate
        violations += found is not None and (~y[q >= found.threshold]).mean() > found.risk_bound
    assert violations <= binom.ppf(0.999, splits, delta)


def test_a_bound_without_care_for_selection_would_fail_that_test():
    # Picking the largest coverage whose observed risk meets the target violates far more often: the test can fail.
    rng = np.random.default_rng(5)
    q, y = rng.random(50_000), rng.random(50_000) >= 0.21
    violations = 0
    for _ in range(100):
        drawn = rng.integers(0, len(q), 400)
        wrong = np.cumsum(~y[drawn][np.argsort(-q[drawn])])
        violations += bool((wrong / np.arange(1, 401) <= 0.2)[20:].any())
    assert violations > 50


def test_start_of_the_sequence_keeps_its_power(monkeypatch):
    def coverage(start):
        monkeypatch.setattr(module, "START", start)
        sequence_sizes.cache_clear()
        found = [certify(*calibrated(1000, seed), 0.2, 0.05).certificate for seed in range(60)]
        return [c.coverage if c else 0.0 for c in found]

    ours, zero_errors = coverage(module.START), coverage(0.0)
    sequence_sizes.cache_clear()
    assert np.mean(ours) > 0.26  # 0.36 is the largest coverage of true risk 0.2
    assert np.mean(ours) > np.mean(zero_errors)
    assert ours.count(0.0) < zero_errors.count(0.0)


def test_none_with_a_reason():
    few = certify([0.9] * 10, [1] * 10, 0.05, 0.05)
    assert few.certificate is None
    assert "at least 59" in few.reason
    wrong = certify(np.linspace(0, 1, 500), np.zeros(500), 0.2, 0.05)
    assert wrong.certificate is None
    assert "are wrong" in wrong.reason


def test_everything_right_answers_everything_with_the_exact_bound():
    found = certify(np.linspace(0, 1, 100), np.ones(100), 0.2, 0.05).certificate
    assert (found.threshold, found.coverage) == (0.0, 1.0)
    assert found.risk_bound == pytest.approx(0.0295, abs=5e-5)


def test_thresholds_fixed_beforehand_are_followed_in_order():
    q, y = calibrated()
    found = certify(q, y, 0.2, 0.05, thresholds=[0.9, 0.8, 0.7, 0.3]).certificate
    assert found.threshold in (0.9, 0.8, 0.7)
    assert certify(q, y, 0.2, 0.05, thresholds=[0.01, 0.0]).certificate is None
    with pytest.raises(UserError, match="descending"):
        certify(q, y, 0.2, 0.05, thresholds=[0.5, 0.6])


def test_curve_shares_delta_evenly():
    q, y = calibrated()
    curve = certified_curve(q, y, [0.1, 0.2, 0.3], 0.06)
    assert {risk: c.certificate and c.certificate.delta for risk, c in curve.items()} == {
        0.1: 0.02,
        0.2: 0.02,
        0.3: 0.02,
    }
    coverage = [curve[risk].certificate.coverage for risk in (0.1, 0.2, 0.3)]
    assert coverage == sorted(coverage)


def test_json_round_trip_and_hash():
    q, y = calibrated()
    found = certify(q, y, 0.2, 0.05).certificate
    assert Certificate.from_json(found.to_json()) == found
    assert data_hash(q[::-1], y[::-1]) == found.data_hash != data_hash(q, ~y)
    for text in ("{", "[]", "{}"):
        with pytest.raises(UserError, match="certificate"):
            Certificate.from_json(text)


@pytest.mark.parametrize(
    ("q", "y", "risk", "delta", "message"),
    [
        ([0.5], [1], 0.0, 0.05, "target_risk"),
        ([0.5], [1], 0.1, 1.0, "delta"),
        ([0.5, 0.6], [1], 0.1, 0.05, "one grade per answer"),
        ([np.nan], [1], 0.1, 0.05, "not a probability"),
        ([0.5], [0.5], 0.1, 0.05, "0 or 1"),
    ],
)
def test_bad_input_is_refused(q, y, risk, delta, message):
    with pytest.raises(UserError, match=message):
        certify(q, y, risk, delta)
