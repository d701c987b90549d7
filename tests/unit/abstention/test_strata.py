"""The risk of each group at a threshold: exact counts, intervals that hold together, and who is called a breaker."""

import numpy as np
import pytest

from calibtrain.abstention.strata import GroupRisk, group_risks
from calibtrain.calibration.intervals import clopper_pearson
from calibtrain.errors import UserError


def test_the_group_that_breaks_the_promise_comes_first_with_its_counts():
    # Africa: 20 of 30 are answered, 15 of them wrong. Asia: 100 of 100, 10 wrong. Oceania: nothing is answered.
    confidence = np.r_[np.full(20, 0.9), np.full(10, 0.1), np.full(100, 0.9), np.full(5, 0.1)]
    correct = np.r_[np.zeros(15), np.ones(5), np.zeros(10), np.ones(90), np.zeros(10), np.ones(5)]
    strata = [{"continent": "Africa"}] * 30 + [{"continent": "Asia"}] * 100 + [{"continent": "Oceania"}] * 5
    found = group_risks(confidence, correct, strata, 0.5, 0.2)
    assert [(one.value, one.n, one.n_answered, one.n_wrong, one.breaks) for one in found] == [
        ("Africa", 30, 20, 15, True),
        ("Asia", 100, 100, 10, False),
        ("Oceania", 5, 0, 0, False),
    ]
    assert (found[0].low, found[0].high) == clopper_pearson(15, 20, 0.975)  # two groups have answers
    assert (found[2].low, found[2].high) == (0.0, 1.0)
    assert [GroupRisk.from_dict(one.as_dict()) for one in found] == found


def test_a_system_that_keeps_its_promise_everywhere_is_rarely_accused():
    rng = np.random.default_rng(0)
    strata = [{"topic": str(i % 20), "language": str(i % 3)} for i in range(1000)]
    accused = [
        any(one.breaks for one in group_risks(np.ones(1000), rng.random(1000) >= 0.2, strata, 0.5, 0.2))
        for _ in range(200)
    ]
    assert np.mean(accused) <= 0.05


def test_answers_without_strata_and_bad_input():
    assert group_risks([0.9], [True], [{}], 0.5, 0.2) == []
    with pytest.raises(UserError, match="2 confidences, 2 grades and 1 strata"):
        group_risks([0.9, 0.8], [True, False], [{}], 0.5, 0.2)
    with pytest.raises(UserError, match="NaN"):
        group_risks([float("nan")], [True], [{}], 0.5, 0.2)
    with pytest.raises(UserError, match="expected the keys"):
        GroupRisk.from_dict({"key": "continent"})
