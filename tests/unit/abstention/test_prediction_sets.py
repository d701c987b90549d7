"""Prediction sets hold the right option as often as they promise, over many draws of the questions they are fitted to."""

import json
import math

import numpy as np
import pytest

from calibtrain.abstention.prediction_sets import PredictionSets, fit_prediction_sets, scores_of_options
from calibtrain.errors import UserError


def questions(n, options, seed, wrong=1.7):
    """Overconfident probabilities (n, options), and which option is right."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, options))
    right = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    stated = np.exp(wrong * logits)
    return stated / stated.sum(1, keepdims=True), np.eye(options, dtype=bool)[right]


@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize(("n", "alpha"), [(19, 0.1), (60, 0.2), (100, 0.05)])
def test_coverage_over_resplits_is_exact(score, n, alpha):
    p, right = questions(n + 40, 4, seed=n)
    rng = np.random.default_rng(0)
    held = []
    for _ in range(1500):
        order = rng.permutation(len(p))
        fitted = fit_prediction_sets(p[order[:n]], right[order[:n]], alpha, score)
        held.append((fitted.members(p[order[n:]]) & right[order[n:]]).any(1).mean())
    # Without ties, which APS has where the least likely option is right, it is at most 1 - alpha + 1 / (n + 1).
    noise = 4 * np.std(held) / math.sqrt(len(held))
    assert 1 - alpha - noise <= np.mean(held)
    assert score == "aps" or np.mean(held) <= 1 - alpha + 1 / (n + 1) + noise


def test_a_set_names_its_options_the_likeliest_first():
    sets = PredictionSets("lac", 0.1, 0.8, 10, 1.5)
    assert sets.of(("A", "B", "C"), tuple(map(math.log, (0.25, 0.7, 0.05)))) == ("B", "A")
    assert PredictionSets("aps", 0.1, 0.95, 10, 1.5).of(("A", "B", "C"), tuple(map(math.log, (0.25, 0.7, 0.05)))) == (
        "B",
        "A",
    )
    assert scores_of_options(np.array([[0.25, 0.7, 0.05]]), "aps")[0] == pytest.approx([0.95, 0.7, 1.0])
    assert PredictionSets.from_dict(json.loads(json.dumps(sets.as_dict()))) == sets


def test_too_few_questions_leave_all_options_in():
    p, right = questions(8, 3, seed=1)
    fitted = fit_prediction_sets(p, right, 0.1)  # 9 * 0.9 is more than 8
    assert fitted.threshold is None
    assert fitted.members(p).all()
    assert fit_prediction_sets(*questions(9, 3, seed=1), 0.1).threshold is not None


def test_questions_may_have_different_numbers_of_options_and_several_right_ones():
    p, right = [[0.6, 0.4], [0.2, 0.3, 0.5]], [[True, False], [True, True, False]]
    assert fit_prediction_sets(p, right, 0.4).threshold == pytest.approx(0.7)
    for bad, words in (((p, [[False, False], right[1]], 0.1), "without a right"), ((p, right, 1.5), "alpha"),
                       (([], [], 0.1), "0 questions")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            fit_prediction_sets(*bad)
