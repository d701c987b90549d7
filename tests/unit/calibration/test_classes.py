"""A preferred place is found and none is made up; classes are told apart."""

import math

import numpy as np
import pytest
from scipy import stats

from calibtrain.calibration.classes import class_rows, classwise_ece, place_bias
from calibtrain.calibration.metrics import ece
from calibtrain.calibration.state import state_of
from calibtrain.errors import UserError


def answers(n, preferred, seed, places=4):
    rng = np.random.default_rng(seed)
    right = rng.integers(0, places, n)
    chance = np.ones(places)
    chance[0] += preferred
    guess = rng.choice(places, n, p=chance / chance.sum())
    return np.where(rng.random(n) < 0.4, right, guess), right


@pytest.mark.parametrize("n", [60, 600])
def test_p_values_of_no_preference_are_uniform(n):
    found = [place_bias(*answers(n, 0, seed), 4).p_value for seed in range(60 if n < 100 else 300)]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_a_preferred_place_is_found_and_counted():
    given, right = answers(300, 3.0, seed=0)
    found = place_bias(given, right, 4)
    assert found.p_value < 1e-6
    assert found.answered == tuple(np.bincount(given, minlength=4).tolist())
    assert found.right == tuple(np.bincount(right, minlength=4).tolist())
    assert found.n == 300
    assert math.isnan(place_bias([0, 1], [0, 1], 2).p_value)
    with pytest.raises(UserError, match="below 2"):
        place_bias([2], [0], 2)


def test_two_places_are_mcnemars_exact_test():
    given, right = [0] * 9 + [1] * 2 + [0] * 5, [1] * 9 + [0] * 2 + [0] * 5
    exact = stats.binomtest(2, 11).pvalue
    assert place_bias(given, right, 2).p_value == pytest.approx(exact, abs=0.01)


def test_more_answers_are_stuart_and_maxwells_chi_square():
    given, right = answers(400, 0.5, seed=3, places=3)
    table = np.zeros((3, 3))
    np.add.at(table, (given, right), 1)
    d = (table.sum(1) - table.sum(0))[:2]
    v = -(table + table.T)[:2, :2]
    np.fill_diagonal(v, (table.sum(1) + table.sum(0) - 2 * table.diagonal())[:2])
    expected = stats.chi2.sf(d @ np.linalg.solve(v, d), 2)
    assert place_bias(given, right, 3).p_value == pytest.approx(expected, rel=1e-9)


def test_classwise_ece_is_the_ece_of_each_class_as_a_forecast():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 2], 500)
    right = np.eye(3, dtype=bool)[rng.integers(0, 3, 500)]
    import torch

    for c, value in enumerate(classwise_ece(p, right)):
        assert value == pytest.approx(ece(state_of(torch.tensor(p[:, c]), torch.tensor(right[:, c])), 15), abs=0.01)
    rows = class_rows(p, right)
    assert sum(row.n for row in rows) == sum(row.answered for row in rows) == 500
    assert rows[1].accuracy == pytest.approx((p.argmax(1) == 1)[right[:, 1]].mean())
    assert rows[2].confidence == pytest.approx(p[:, 2].mean())
    assert rows[0].low < rows[0].accuracy < rows[0].high
    empty = class_rows(p[:, :3], np.zeros((500, 3), dtype=bool))[0]
    assert math.isnan(empty.accuracy)
