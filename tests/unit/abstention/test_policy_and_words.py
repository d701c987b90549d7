import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibtrain.abstention.policy import policy, selective_statistics, threshold_from_costs
from calibtrain.abstention.words import WORDS, percent, phrase, word_for
from calibtrain.errors import UserError


def test_statistics_count_what_they_say():
    s = selective_statistics([0.9, 0.8, 0.4, 0.3, 0.2], [1, 0, 1, 1, 0], 0.4)
    assert (s.n, s.n_answered, s.n_wrong) == (5, 3, 1)
    assert (s.coverage, s.refusal_rate, s.hallucination_rate) == (0.6, 0.4, 0.2)
    assert s.risk == pytest.approx(1 / 3)
    assert s.over_refusal == pytest.approx(1 / 3)
    assert s.risk_low < s.risk < s.risk_high
    assert math.isnan(selective_statistics([0.1], [0], 0.5).risk)
    assert math.isnan(selective_statistics([], [], 0.5).coverage)


def test_policy_answers_at_the_threshold_and_refuses_nan():
    assert policy([0.5, np.nextafter(0.5, 0)], 0.5).tolist() == [True, False]
    with pytest.raises(UserError, match="NaN"):
        policy([math.nan], 0.5)


def test_threshold_from_costs_minimises_expected_cost():
    threshold = threshold_from_costs(10, 2)
    for q in np.linspace(0, 1, 101):
        if abs(q - threshold) > 1e-9:
            assert ((1 - q) * 10 < 2) == (q >= threshold)
    assert threshold_from_costs(1, 5) == 0
    with pytest.raises(UserError, match="positive"):
        threshold_from_costs(0, 1)


def test_words_are_a_partition():
    assert WORDS[0].low == 0
    assert WORDS[-1].high == 1
    assert all(a.high == b.low for a, b in pairwise(WORDS))


@given(st.floats(0, 1))
def test_every_probability_has_the_word_of_its_band(p):
    word = word_for(p)
    assert word.low <= p < word.high or p == word.high == 1


def test_words_and_numbers():
    assert [word_for(p).name for p in (0.05, 0.5, 0.55, 0.95)] == [
        "very unlikely",
        "roughly even chance",
        "likely",
        "almost certain",
    ]
    assert (percent(0.001), percent(0.87), percent(0.999)) == ("less than 1%", "87%", "more than 99%")
    assert phrase(0.72) == "I think this is likely to be right (72%)"
    assert all(phrase((w.low + w.high) / 2).startswith("I ") for w in WORDS)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match="not in"):
            word_for(p)
