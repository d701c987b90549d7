"""Questions outside: the distance is scikit-learn's, false alarms are bounded whatever the states, files refuse others."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.outside import ALPHA, FEWEST, Outside, fit_outside, largest_share
from calibtrain.errors import UserError

HERE = Fingerprint("w" * 64, "t" * 64)


def states(rng, n, width=24, shift=0.0):
    """Correlated, with heavy tails: no normal distribution is needed."""
    mix = np.random.default_rng(7).normal(0, 1, (width, width))
    return ((rng.standard_t(3, (n, width)) @ mix) + 5 + shift).astype(np.float32)


def fitted(seed=0, n=200, m=300, width=24):
    rng = np.random.default_rng(seed)
    found, why = fit_outside(states(rng, n, width), states(rng, m, width), HERE)
    assert why == ""
    return found


@pytest.mark.parametrize(("n", "width"), [(200, 24), (12, 40)], ids=["more questions", "more dimensions"])
def test_the_distance_is_that_of_scikit_learn(n, width):
    rng = np.random.default_rng(1)
    fit, other = states(rng, n, width), states(rng, 50, width, shift=2.0)
    found, _ = fit_outside(fit, states(rng, 60, width), HERE)
    assert found.scores(other) == pytest.approx(LedoitWolf().fit(fit.astype(np.float64)).mahalanobis(other), rel=1e-3)


def test_false_alarms_are_at_most_alpha_on_average_and_not_far_below():
    rng = np.random.default_rng(3)
    alarms = []
    for _ in range(400):
        found, _ = fit_outside(states(rng, 30, 8), states(rng, 39, 8), HERE)
        alarms.append((found.p_values(states(rng, 50, 8)) < ALPHA).mean())
    # Exactly 1 / 40 by exchangeability: p < 0.05 means larger than all 39 held-out ones.
    error = np.std(alarms) / np.sqrt(len(alarms))
    assert abs(np.mean(alarms) - 1 / 40) < 4 * error


def test_a_p_value_is_the_rank_among_the_held_out_with_ties_counted_against_an_alarm():
    found = fitted(m=FEWEST)
    far, near = found.mean + np.float32(1e4), found.mean
    assert found.p_values(np.stack([far, near])) == pytest.approx([1 / (FEWEST + 1), 1.0])
    assert found.p_values(np.full((1, 24), np.nan, np.float32)) == pytest.approx([1 / (FEWEST + 1)])
    tied = Outside(
        found.mean, found.directions, found.precision, found.rest, np.full(30, found.scores(near[None])[0]), HERE
    )
    assert tied.p_values(near[None]) == pytest.approx([1.0])


def test_what_lies_elsewhere_is_told():
    found = fitted()
    assert (found.p_values(states(np.random.default_rng(5), 100, shift=40.0)) < ALPHA).mean() > 0.95


def test_the_share_of_alarms_stays_under_its_bound():
    rng, above = np.random.default_rng(11), []
    bound = largest_share(199, 0.05)
    for _ in range(2000):
        held = np.sort(rng.random(199))
        limit = held[-9]  # p < 0.05: fewer than 9 of 199 at least as large
        above.append(1 - limit > bound)
    assert ALPHA < bound < 0.1
    assert np.mean(above) < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 2000)


def test_a_file_goes_there_and_back_and_refuses_another_model(tmp_path):
    found, path = fitted(), tmp_path / "outside.safetensors"
    found.save(path)
    again = Outside.load(path, HERE)
    some = states(np.random.default_rng(9), 20)
    assert again.p_values(some).tolist() == found.p_values(some).tolist()
    with pytest.raises(UserError, match="weights"):
        Outside.load(path, Fingerprint("x" * 64, "t" * 64))
    with pytest.raises(UserError, match="template"):
        Outside.load(path, Fingerprint("w" * 64, "x" * 64))
    with pytest.raises(UserError, match="width 24, given 3"):
        found.scores(np.zeros((1, 3), np.float32))
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        Outside.load(path, HERE)


@pytest.mark.parametrize(
    ("fit", "held_out", "why"),
    [
        (np.zeros((0, 4)), np.zeros((50, 4)), "no hidden states"),
        (np.ones((9, 4)), np.ones((50, 4)), "the same hidden state"),
        (np.eye(4), np.eye(4), "too few"),
        (np.full((9, 4), np.nan), np.ones((50, 4)), "not finite"),
    ],
    ids=str,
)
def test_where_nothing_can_be_told_it_says_why(fit, held_out, why):
    found, reason = fit_outside(fit.astype(np.float32), held_out.astype(np.float32), HERE)
    assert found is None
    assert why in reason
