"""Metrics of the state against naive float64 implementations on the samples themselves."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from calibtrain.calibration import metrics, ranking
from calibtrain.calibration.state import CalibrationState, state_of
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.answering import answer_metrics
from calibtrain.errors import UserError

BINS = (10, 15, 20, 30)


def sample(kind, n=800, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        q = rng.random(n)
    elif kind == "near one":  # token confidences
        q = 1 - rng.beta(0.1, 3, n)
    elif kind == "tiny":  # probabilities of whole answers
        q = np.exp(-rng.gamma(2, 6, n))
    elif kind == "edges":
        q = rng.integers(0, 31, n) / 30
    return q, rng.random(n) < q**1.5


CASES = ["uniform", "near one", "tiny", "edges"]


def naive_bins(q, y, bins):
    edges = np.arange(bins + 1) / bins
    index = np.clip(np.searchsorted(edges, q, side="left") - 1, 0, bins - 1)
    return [(q[index == b], y[index == b]) for b in range(bins) if (index == b).any()]


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("kind", CASES)
def test_binned_errors_are_exact(kind, bins):
    q, y = sample(kind)
    state, groups, n = state_of(q, y), naive_bins(q, y, bins), len(q)
    gaps = np.array([f.mean() - c.mean() for f, c in groups])
    share = np.array([len(f) / n for f, _ in groups])
    assert metrics.ece(state, bins) == pytest.approx((share * abs(gaps)).sum(), abs=1e-12)
    assert metrics.rms_calibration_error(state, bins) == pytest.approx(math.sqrt((share * gaps**2).sum()), abs=1e-12)
    assert metrics.max_calibration_error(state, bins) == pytest.approx(abs(gaps).max(), abs=1e-12)
    assert metrics.overconfidence_error(state, bins) == pytest.approx((share * gaps.clip(0)).sum(), abs=1e-12)
    several = [(f, c) for f, c in groups if len(f) > 1]
    unbiased = sum(
        len(f) * ((f.mean() - c.mean()) ** 2 - c.mean() * (1 - c.mean()) / (len(f) - 1)) for f, c in several
    ) / sum(len(f) for f, _ in several)
    assert metrics.squared_ece_debiased(state, bins) == pytest.approx(unbiased, abs=1e-12)
    assert metrics.rms_ece_debiased(state, bins) == pytest.approx(math.sqrt(max(unbiased, 0)), abs=1e-12)


@pytest.mark.parametrize("kind", CASES)
def test_brier_decomposition_is_exact_term_by_term(kind):
    q, y = sample(kind)
    murphy = metrics.brier_decomposition(state_of(q, y))
    groups, n, share = naive_bins(q, y, 15), len(q), y.mean()
    expected = {
        "brier": ((q - y) ** 2).mean(),
        "reliability": sum(len(f) * (f.mean() - c.mean()) ** 2 for f, c in groups) / n,
        "resolution": sum(len(f) * (c.mean() - share) ** 2 for f, c in groups) / n,
        "uncertainty": share * (1 - share),
        "within_variance": sum(((f - f.mean()) ** 2).sum() for f, _ in groups) / n,
        "within_covariance": sum(((f - f.mean()) * (c - c.mean())).sum() for f, c in groups) / n,
    }
    for name, value in expected.items():
        assert getattr(murphy, name) == pytest.approx(value, abs=1e-12), name
    total = murphy.reliability - murphy.resolution + murphy.uncertainty
    assert total + murphy.within_variance - 2 * murphy.within_covariance == pytest.approx(murphy.brier, abs=1e-12)


@pytest.mark.parametrize("kind", CASES)
def test_ranking_metrics_lie_within_their_error_bound(kind):
    q, y = sample(kind)
    state, n, right, wrong = state_of(q, y), len(q), y.sum(), (~y).sum()
    ranks = rankdata(q)
    auroc = (ranks[y].sum() - right * (right + 1) / 2) / (right * wrong)
    assert abs(ranking.auroc(state) - auroc) <= ranking.auroc_error(state) + 1e-12
    a = y.mean()
    augrc = (1 - auroc) * a * (1 - a) + (1 - a) ** 2 / 2
    assert abs(ranking.augrc(state) - augrc) <= ranking.augrc_error(state) + 1e-12
    rng = np.random.default_rng(1)
    orders = [np.lexsort((rng.random(n), -q)) for _ in range(400)]  # ties in random order
    aurcs = [(np.cumsum(~y[o]) / np.arange(1, n + 1)).mean() for o in orders]
    sampling = 4 * np.std(aurcs) / math.sqrt(len(aurcs))
    assert abs(ranking.aurc(state) - np.mean(aurcs)) <= ranking.aurc_error(state) + sampling + 1e-12
    best = np.sort(~y)
    perfect = (np.cumsum(best) / np.arange(1, n + 1)).mean()
    assert ranking.e_aurc(state) == pytest.approx(ranking.aurc(state) - perfect, abs=1e-12)


def test_error_bounds_are_tiny_where_confidences_are_spread():
    assert ranking.auroc_error(state_of(*sample("uniform", 20_000))) < 2e-4
    assert ranking.aurc_error(state_of(*sample("uniform", 20_000))) < 2e-4
    assert ranking.auroc_error(state_of(*sample("near one", 20_000))) < 0.02


def test_augrc_is_the_area_under_coverage_times_joint_error():
    q, y = np.linspace(0.0005, 0.9995, 1000), np.random.default_rng(0).random(1000) < 0.6
    state = state_of(q, y)
    joint = np.append(0, np.cumsum(~y[::-1]) / 1000)
    assert ranking.augrc(state) == pytest.approx(np.trapezoid(joint, dx=1 / 1000), abs=1e-9)


def test_scalars_and_clipping():
    q, y = np.array([0.0, 1.0, 1.0, 0.3]), np.array([1, 0, 1, 0])
    state = state_of(q, y)
    inside = np.clip(q, 1e-6, 1 - 1e-6)
    loss = -(y * np.log(inside) + (1 - y) * np.log1p(-inside)).mean()
    values = metrics.summary(state)
    assert values["nll"] == pytest.approx(loss, rel=1e-9)
    assert values["clip_n"] == 3
    assert values["acc"] == 0.5
    assert values["mean_conf"] == pytest.approx(0.575)
    assert values["gap"] == pytest.approx(0.075)
    assert values["brier_skill"] == pytest.approx(1 - ((q - y) ** 2).mean() / 0.25)


@pytest.mark.parametrize(("kind", "n"), [("uniform", 60), ("uniform", 2000), ("near one", 3000), ("tiny", 300)])
def test_null_is_the_mean_ece_of_calibrated_samples(kind, n):
    q, _ = sample(kind, n)
    rng = np.random.default_rng(2)
    draws = [metrics.ece(state_of(q, rng.random(n) < q)) for _ in range(400)]
    error = 4 * np.std(draws) / math.sqrt(len(draws))
    assert metrics.ece_null(state_of(q, rng.random(n) < q)) == pytest.approx(np.mean(draws), abs=error)


def test_null_of_a_single_coin_is_exact():
    assert metrics.ece_null(state_of(np.array([0.3]), np.array([1]))) == pytest.approx(2 * 0.3 * 0.7)
    # Two coins in a bin: |S - 1| for S ~ Binomial(2, 1/2) has mean 1/2, over n = 2.
    assert metrics.ece_null(state_of(np.array([0.5, 0.5]), np.array([1, 0]))) == pytest.approx(0.25)


def test_debiased_errors_are_centred_for_a_calibrated_model():
    rng = np.random.default_rng(3)
    q = rng.random((200, 200))
    states = [state_of(row, rng.random(200) < row) for row in q]
    for metric in (metrics.ece_debiased, metrics.squared_ece_debiased):
        values = [metric(state) for state in states]
        assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))
    assert np.mean([metrics.ece(state) for state in states]) > 0.06  # what the debiasing takes off


def test_smooth_ece_against_the_defining_integral():
    q, y = sample("uniform", 300)
    state, width = state_of(q, y), 0.07
    t = (np.arange(4000) + 0.5) / 4000
    images = [2 * m + s * q for m in range(-2, 3) for s in (1, -1)]  # reflections of every sample
    kernel = sum(np.exp(-((t[:, None] - image) ** 2) / (2 * width**2)) for image in images)
    residual = kernel @ (q - y) / (math.sqrt(2 * math.pi) * width * len(q))
    assert metrics.smooth_ece_at(state, width) == pytest.approx(abs(residual).mean(), abs=1e-5)
    value = metrics.smooth_ece(state)
    assert metrics.smooth_ece_at(state, value) == pytest.approx(value, abs=2e-6)


def test_coverage_and_selective_accuracy_at_ties():
    q, y = np.array([0.9, 0.8, 0.8, 0.1]), np.array([1, 1, 0, 0])
    state = state_of(q, y)
    assert ranking.coverage_at_risk(state, 0.0) == 0.25
    assert ranking.coverage_at_risk(state, 1 / 3) == 0.75  # both of 0.8 or none
    assert ranking.coverage_at_risk(state, 0.5) == 1.0
    assert ranking.selective_accuracy(state, 0.5) == pytest.approx(1 - 0.5 / 2)  # one of the two at 0.8, by chance
    assert ranking.selective_accuracy(state, 1.0) == 0.5
    curve = ranking.risk_coverage(state)
    assert curve.num_answered.tolist() == [1, 3, 4]
    for threshold, answered in zip(curve.threshold, curve.num_answered, strict=True):
        assert (q >= threshold).sum() == answered


def test_refusal_curve_matches_counting():
    q, y = sample("edges", 500)
    curve = ranking.refusal_curve(state_of(q, y), 61)
    for i, threshold in enumerate(curve.threshold):
        answered = q >= threshold
        assert curve.refusal[i] == pytest.approx((~answered).mean())
        assert curve.hallucination[i] == pytest.approx((answered & ~y).mean())
        assert curve.over_refusal[i] == pytest.approx((~answered & y).sum() / y.sum())
    assert curve.refusal[0] == 0
    assert curve.refusal[-1] == 1


def test_reliability_table_holds_every_sample():
    q, y = sample("uniform")
    rows = metrics.reliability_table(state_of(q, y), 10)
    assert sum(row.n for row in rows) == len(q)
    assert all(row.lo < row.confidence <= row.hi for row in rows)
    assert all(row.accuracy_low <= row.accuracy <= row.accuracy_high for row in rows)


def test_undefined_is_nan_and_never_a_crash():
    undefined = metrics.summary(CalibrationState())
    assert {name for name, value in undefined.items() if not math.isnan(value)} == {"n", "clip_n"}
    right = metrics.summary(state_of(torch.tensor([0.5, 0.9]), torch.tensor([1, 1])))
    assert math.isnan(right["auroc"])
    assert math.isnan(right["brier_skill"])
    assert right["aurc"] == right["augrc"] == 0
    wrong = metrics.summary(state_of(torch.tensor([0.5, 0.9]), torch.tensor([0, 0])))
    assert wrong["aurc"] == 1
    assert wrong["augrc"] == 0.5
    assert not len(metrics.reliability_table(CalibrationState()))
    assert np.isnan(ranking.refusal_curve(CalibrationState()).refusal).all()


def test_bins_that_cannot_be_exact_are_refused():
    with pytest.raises(UserError, match="bins=7"):
        metrics.ece(state_of(torch.tensor([0.5]), torch.tensor([1])), 7)


@pytest.mark.parametrize("centre", [-5, -15, -40, -80, -200, -600, -3000])
def test_answers_of_any_length_are_ranked(centre):
    """The state within its bound, which stays small, as far as confidences reach; all answers at hand exactly."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    n = 1000
    y = rng.random(n) < 0.6
    noise = centre * (1 + 0.25 * rng.standard_normal(n))
    logprob = np.minimum(noise + 0.2 * abs(centre) * (2 * y - 1), -1e-3)
    truth = roc_auc_score(y, logprob)
    by_rank = y[np.argsort(-logprob)]
    risks = np.cumsum(~by_rank) / np.arange(1, n + 1)
    covered = np.flatnonzero(risks <= 0.2).max(initial=-1) + 1
    if centre >= -200:
        found = metrics.summary(state_of(np.exp(logprob), y))
        assert found["auroc"] == pytest.approx(truth, abs=found["auroc_err"] + 1e-12)
        assert found["aurc"] == pytest.approx(risks.mean(), abs=found["aurc_err"] + 1e-12)
        assert found["auroc_err"] < 0.004
        assert found["aurc_err"] < 0.004
        assert found["cov@0.2"] == pytest.approx(covered / n, abs=0.02)
    answers = [
        Answer(str(i), "", "", (one,), bool(right)) for i, (one, right) in enumerate(zip(logprob, y, strict=True))
    ]
    found = answer_metrics(answers)
    assert found["auroc"] == pytest.approx(truth, abs=1e-12)
    assert found["aurc"] == pytest.approx(risks.mean(), abs=1e-12)
    assert found["cov@0.2"] == covered / n
    assert found["auroc_err"] == found["aurc_err"] == found["augrc_err"] == 0.0


def test_samples_at_hand_are_ranked_exactly_and_measured_as_their_state_is():
    rng = np.random.default_rng(1)
    q = np.round(rng.beta(2, 1, 500), 2)  # with ties
    y = rng.random(500) < q
    whole, found = metrics.summary(state_of(q, y)), metrics.summary_of(q, y)
    assert list(found) == list(whole)
    same = [name for name in whole if not name.endswith("_err")]
    assert [found[name] for name in same] == pytest.approx([whole[name] for name in same], abs=1e-12)
    undefined = metrics.summary_of([], [])
    assert undefined["n"] == 0
    assert np.isnan(undefined["auroc"])
    assert np.isnan(metrics.summary_of([0.5, 0.9], [True, True])["auroc_err"])
