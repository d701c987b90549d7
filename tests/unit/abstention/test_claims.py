"""Withheld claims: the promise holds over many draws, and where it cannot be given that is said."""

import json

import numpy as np
import pytest
from scipy.stats import binom

from calibtrain.abstention.claims import (
    ClaimsCertificate,
    ClaimsCertification,
    certify_claims,
    claims_threshold,
    conformal_scores,
    least_replies,
)
from calibtrain.errors import UserError

DRAWS = 2500


def replies(rng, count, digits=None, claims=4, sharp=1.0):
    """Probabilities (count, claims) with noise of their own, and grades; replies differ in how hard they are."""
    hardness = rng.normal(0, 1.5, (count, 1))
    truth = 1 / (1 + np.exp(-(1.5 + hardness + rng.normal(0, 1, (count, claims)))))
    right = rng.random((count, claims)) < truth
    stated = 1 / (1 + np.exp(-sharp * (np.log(truth / (1 - truth)) + rng.normal(0, 1, (count, claims)))))
    return (stated if digits is None else stated.round(digits)), right


def broken(probability, right, thresholds):
    """Whether each reply (N, m) holds a wrong claim at its threshold (N,)."""
    return ((probability >= thresholds[:, None]) & ~right).any(1)


@pytest.mark.parametrize("digits", [None, 1, 0])
@pytest.mark.parametrize(("n", "alpha"), [(4, 0.2), (9, 0.1), (20, 0.2), (50, 0.35)])
def test_a_new_reply_holds_a_wrong_claim_no_more_often_than_promised(n, alpha, digits):
    rng = np.random.default_rng([n, int(100 * alpha), digits or 7])
    p, y = replies(rng, DRAWS * (n + 1), digits)
    p, y = p.reshape(DRAWS, n + 1, -1), y.reshape(DRAWS, n + 1, -1)
    thresholds = np.array([claims_threshold(conformal_scores(p[i, :n], y[i, :n]), alpha) for i in range(DRAWS)])
    wrong = int(broken(p[:, n], y[:, n], thresholds).sum())
    assert binom.sf(wrong - 1, DRAWS, alpha) > 1e-3  # not more than alpha allows
    if digits is None:  # and not much less: without ties within 1 / (n + 1), where not all of a reply is right
        assert binom.cdf(wrong, DRAWS, alpha - 1 / (n + 1)) > 1e-3
    else:
        assert wrong <= DRAWS * alpha


@pytest.mark.parametrize("digits", [None, 1])
def test_with_delta_this_very_threshold_keeps_the_promise(digits):
    rng = np.random.default_rng(3)
    n, alpha, delta, draws = 60, 0.2, 0.1, 1500
    p, y = replies(rng, 200_000, digits)
    scores = np.sort(conformal_scores(p, y))

    def risk(threshold):
        return 1 - np.searchsorted(scores, threshold, side="left") / len(scores)

    found = {}
    for form in (None, delta):
        picks = [rng.integers(0, len(scores), n) for _ in range(draws)]
        found[form] = np.array([risk(claims_threshold(scores[pick], alpha, form)) for pick in picks])
    missed = int((found[delta] > alpha).sum())
    assert binom.sf(missed - 1, draws, delta) > 1e-3
    assert (found[None] > alpha).mean() > delta  # the average form promises less
    assert abs(found[None].mean() - alpha) < 0.02 or digits is not None


def test_shifting_the_questions_breaks_it():
    """The simulation can fail: it is exchangeability that carries the promise."""
    rng = np.random.default_rng(4)
    p, y = replies(rng, 2000)
    threshold = claims_threshold(conformal_scores(p, y), 0.2)
    q, z = replies(rng, 2000)
    z &= rng.random(z.shape) < 0.6
    assert broken(q, z, np.full(2000, threshold)).mean() > 0.25


@pytest.mark.parametrize(
    ("scores", "alpha", "wanted"),
    [
        ([0.1, 0.2, 0.3, 0.4], 0.2, np.nextafter(0.4, 2)),  # the 4th of 4
        ([0.1, 0.2, 0.3], 0.2, None),  # (n + 1)(1 - alpha) = 3.2
        ([0.4, 0.1, 0.3, 0.2, 0.5, 0.6, 0.7, 0.8, 0.9], 0.2, np.nextafter(0.8, 2)),
        ([-np.inf] * 4, 0.2, 0.0),
        ([-np.inf] * 8 + [0.9], 0.2, 0.0),
        ([1.0] * 9, 0.2, np.nextafter(1.0, 2)),
        ([0.0] * 4, 0.2, np.nextafter(0.0, 2)),
        ([], 0.5, None),
    ],
)
def test_the_threshold_by_hand(scores, alpha, wanted):
    assert claims_threshold(scores, alpha) == wanted


def test_how_many_replies_are_needed():
    for alpha in (0.05, 0.1, 0.2, 0.5):
        for delta in (None, 0.05):
            least = least_replies(alpha, delta)
            assert claims_threshold([0.5] * least, alpha, delta) is not None
            assert claims_threshold([0.5] * (least - 1), alpha, delta) is None


def test_certificates_tell_what_is_kept_and_go_to_json_and_back():
    probability = [[0.9, 0.8], [0.7, 0.3], [0.6], [0.95, 0.2, 0.5], [], [0.85, 0.1], [0.9], [0.4], [0.99]]
    right = [[1, 1], [1, 0], [0], [1, 0, 0], [], [1, 0], [1], [1], [1]]
    found = certify_claims(probability, right, 0.2, 0.4)
    assert found.certificate.threshold == np.nextafter(0.5, 2)
    assert (found.certificate.n, found.certificate.n_wrong, found.certificate.n_silent) == (9, 1, 1)
    assert (found.certificate.claims, found.certificate.kept) == (13, 8)
    assert found.reason == "8 of 13 claims kept, and a wrong one among them in 1 of 9 replies"
    assert found.confident.threshold >= found.certificate.threshold
    assert found.confident.delta == 0.4
    assert ClaimsCertification.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    for change in (
        {"n_wrong": 3},
        {"n": 3},
        {"threshold": float("nan")},
        {"kept": 0},
        {"target_risk": 0.1},
        {"n": "9"},
    ):
        with pytest.raises(UserError, match="do not prove"):
            ClaimsCertificate.from_dict({**found.certificate.as_dict(), **change})
    with pytest.raises(UserError, match="expected the keys"):
        ClaimsCertificate.from_dict({"threshold": 0.5})


def test_where_nothing_can_be_promised_the_reason_is_told():
    few = certify_claims([[0.9]] * 3, [[1]] * 3, 0.2, 0.05)
    assert (few.certificate, few.confident) == (None, None)
    assert few.reason == "3 graded replies; a risk of 0.2 needs at least 4"
    wrong = certify_claims([[0.9, 0.9]] * 30, [[0, 1]] * 30, 0.2, 0.05)
    assert wrong.certificate is None
    assert "all are withheld" in wrong.reason
    silent = certify_claims([[]] * 30, [[]] * 30, 0.2, 0.05)
    assert silent.certificate is None
    sure = certify_claims([[0.9]] * 10, [[1]] * 10, 0.2, 0.05)
    assert sure.certificate.threshold == 0
    assert sure.confident is None  # ten are too few at delta 0.05


@pytest.mark.parametrize(
    ("probability", "right", "risk"),
    [([[1.2]], [[1]], 0.2), ([[float("nan")]], [[1]], 0.2), ([[0.5]], [[1, 0]], 0.2), ([[0.5]], [[1]], 0.0)],
)
def test_malformed_input(probability, right, risk):
    with pytest.raises(UserError, match="claims"):
        certify_claims(probability, right, risk, 0.05)
