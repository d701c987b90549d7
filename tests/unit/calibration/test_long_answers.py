"""Answers of -10 to -900 nats are told apart as those of -5 are, and files of earlier versions tell what they told."""

import math
from functools import partial

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from calibtrain.abstention.claims import certify_claims
from calibtrain.calibration import parts as parts_of
from calibtrain.calibration.calibrators import Calibrator, fit_calibrator
from calibtrain.calibration.parts import fit_parts
from calibtrain.calibration.scores import LEAST_DOUBT, TEMPERATURE_GRID, log_loss, scores_of, sigmoid
from calibtrain.confidence.answer import Answer, AnswerPart
from calibtrain.pipeline.answer_parts import fit_answer_parts, part_probabilities
from calibtrain.pipeline.measurement import Measurement

HASHES = {"template_hash": "t", "weights_hash": "w"}
LENGTHS = (-5, -25, -80, -200, -900)


def drawn(centre, n=1000, seed=0):
    """Log-probs (n,) about a centre, whose spread grows with it as lengths do, and grades of which they tell as much."""
    rng = np.random.default_rng(seed)
    right = rng.random(n) < 0.6
    noise = centre * (1 + 0.25 * rng.standard_normal(n))
    return np.minimum(noise + 0.2 * abs(centre) * (2 * right - 1), -1e-3), right


@pytest.mark.parametrize("centre", LENGTHS)
@pytest.mark.parametrize("method", ["platt", "beta", "isotonic", "histogram"])
def test_the_order_of_long_answers_is_kept(method, centre):
    logprob, right = drawn(centre)
    given = scores_of(logprob=logprob)
    told = fit_calibrator(method, given, right, replicates=0, **HASHES).apply(given)
    assert ((told >= 0) & (told <= 1)).all()
    assert told.mean() == pytest.approx(right.mean(), abs=0.01)
    if method != "histogram":  # whose bins are free
        assert (np.diff(told[np.argsort(logprob, kind="stable")]) >= -1e-12).all()
    truth = roc_auc_score(right, logprob)
    if method in ("platt", "beta"):
        assert roc_auc_score(right, told) == pytest.approx(truth, abs=1e-12)
    else:  # which tie on purpose, and so may gain
        assert roc_auc_score(right, told) > truth - 0.01


@pytest.mark.parametrize("centre", LENGTHS)
def test_platt_and_beta_are_the_likeliest_at_every_length(centre):
    logprob, right = drawn(centre)
    given = scores_of(logprob=logprob)
    standard = ((given.log_odds - given.log_odds.mean()) / given.log_odds.std())[:, None]
    best = LogisticRegression(C=1e6, tol=1e-10, max_iter=9999).fit(standard, right).predict_proba(standard)[:, 1]
    for method in ("platt", "beta"):
        fitted = fit_calibrator(method, given, right, replicates=0, **HASHES)
        assert fitted.nll_after < log_loss(best, right) + 1e-3


@pytest.mark.parametrize("centre", LENGTHS[:-1])
def test_a_confidence_that_can_be_written_down_does_as_well_as_its_log_prob(centre):
    logprob, right = drawn(centre)
    table = np.repeat(logprob[:, None], len(TEMPERATURE_GRID), axis=1)
    answers = [Answer(str(i), "", "", (one,), bool(y)) for i, (one, y) in enumerate(zip(logprob, right, strict=True))]
    served = Measurement(answers, np.zeros((len(answers), 0)))
    for method in ("platt", "isotonic"):
        by_log = fit_calibrator(method, scores_of(logprob=logprob), right, replicates=0, **HASHES)
        want = by_log.apply(scores_of(logprob=logprob))
        assert by_log.apply(np.exp(logprob)) == pytest.approx(want, abs=1e-9)
        assert by_log.apply(table) == pytest.approx(want, abs=1e-12)
        assert by_log.apply(served.scores()) == pytest.approx(want, abs=1e-12)


def test_a_servers_answers_below_the_smallest_number_are_told_apart():
    logprob, right = drawn(-900)
    answers = [Answer(str(i), "", "", (one,), bool(y)) for i, (one, y) in enumerate(zip(logprob, right, strict=True))]
    given = Measurement(answers, np.zeros((len(answers), 0))).scores()
    told = fit_calibrator("platt", given, right, replicates=0, **HASHES).apply(given)
    assert roc_auc_score(right, told) == pytest.approx(roc_auc_score(right, logprob))
    assert len(given.take(np.array([3, 1])).log_confidence) == 2


@pytest.mark.parametrize("centre", [-60, -900])
def test_claims_of_any_length_are_kept_alike(centre, monkeypatch):
    monkeypatch.setattr(parts_of, "fit_calibrator", partial(fit_calibrator, replicates=2))
    rng = np.random.default_rng(0)

    def replies(n):
        right = [rng.random(4) < 0.85 for _ in range(n)]
        made = [centre * (1 + 0.12 * rng.standard_normal(4)) + 0.25 * abs(centre) * (2 * y - 1.0) for y in right]
        return [
            Answer(str(i), "", "", (), parts=tuple(
                AnswerPart("claim", "", float(min(one, -1e-3)), bool(y)) for one, y in zip(lp, ys, strict=True)))
            for i, (lp, ys) in enumerate(zip(made, right, strict=True))
        ]  # fmt: skip

    parts = fit_answer_parts(replies(300), "t", "w")
    held_out = replies(300)
    right = [[part.correct for part in one.parts] for one in held_out]
    found = certify_claims(part_probabilities(parts, held_out), right, 0.1, 0.05)
    assert found.certificate is not None, found.reason
    assert found.certificate.share > 0.8


def test_parts_take_log_probs_as_they_take_likelihoods(monkeypatch):
    monkeypatch.setattr(parts_of, "fit_calibrator", partial(fit_calibrator, replicates=2))
    logprob, right = drawn(-15)
    names, ids = ["claim"] * len(right), np.arange(len(right))
    by_log = fit_parts(names, scores_of(logprob=logprob), right, ids, **HASHES)
    assert by_log.apply(names, np.exp(logprob)) == pytest.approx(by_log.apply(names, scores_of(logprob=logprob)))


EARLIER = {
    "platt": {"slope": 0.7, "intercept": 2.0},
    "beta": {"a": 0.5, "b": 1.5, "c": 1.0},
    "isotonic": {"x": [0.1, 0.4, 0.9], "y": [0.2, 0.5, 0.8]},
    "histogram": {"edges": [0.2, 0.6], "values": [0.1, 0.5, 0.9]},
    "label_shift": {"shift": 0.8, "accuracy": 0.6},
}


@pytest.mark.parametrize("method", EARLIER)
def test_a_calibrator_of_an_earlier_version_tells_what_it_told(method):
    q = np.array([0.0, 1e-30, 1e-12, 1e-9, 1e-6, 0.2, 0.35, 0.6, 0.95, 1 - 1e-12, 1.0])
    one = EARLIER[method]
    clipped = np.clip(q, LEAST_DOUBT, 1 - LEAST_DOUBT)
    odds = np.log(clipped) - np.log1p(-clipped)
    want = {
        "platt": lambda: sigmoid(0.7 * odds + 2.0),
        "beta": lambda: sigmoid(0.5 * np.log(clipped) - 1.5 * np.log1p(-clipped) + 1.0),
        "isotonic": lambda: np.interp(q, one["x"], one["y"]),
        "histogram": lambda: np.array(one["values"])[np.searchsorted(one["edges"], q, side="right")],
        "label_shift": lambda: sigmoid(odds + 0.8),
    }[method]()
    values = {"method": method, "parameters": one, "low": {}, "high": {}, "level": 0.95, "n": 3, "nll_before": None,
              "nll_after": None, "after": None, **HASHES}  # fmt: skip
    assert Calibrator.from_dict(values, **HASHES).apply(q) == pytest.approx(want, abs=1e-12)


def test_sigmoid_keeps_the_order_far_below_zero():
    z = np.array([-700.0, -80.0, -40.0, -38.0, 0.0, 3.0, 800.0])
    want = [math.exp(-700), math.exp(-80), math.exp(-40), 1 / (1 + math.exp(38)), 0.5, 1 / (1 + math.exp(-3)), 1.0]
    assert sigmoid(z) == pytest.approx(want, rel=1e-12)
