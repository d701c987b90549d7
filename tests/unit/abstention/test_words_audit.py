from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from calibtrain.abstention.policy import cost_per_question, selective_statistics, threshold_from_costs
from calibtrain.abstention.words import (
    SCALES,
    WORDS,
    audit_words,
    check_words,
    phrase,
    scale_of,
    speak,
    steady_word,
    word_for,
)
from calibtrain.calibration.calibrators import fit_calibrator
from calibtrain.errors import UserError


@pytest.mark.parametrize("name", SCALES)
def test_every_scale_is_a_partition_said_in_the_first_person(name):
    scale = scale_of(name)
    assert (scale[0].low, scale[-1].high) == (0, 1)
    assert all(a.high == b.low for a, b in pairwise(scale))
    assert len({word.name for word in scale}) == len(scale)
    for word in scale:
        middle = (word.low + word.high) / 2
        said = phrase(middle, scale)
        assert said.startswith("I ")
        assert word.name in said
        assert "%" in said


def test_unknown_scale_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="icd203, ipcc, nato, phia"):
        scale_of("kent")


def test_a_word_stays_near_its_edge_and_not_beyond():
    word = None
    said = []
    for p in (0.79, 0.805, 0.795, 0.815, 0.825, 0.79, 0.785, 0.77):
        word = steady_word(p, word)
        said.append(word.name)
    assert said == ["likely"] * 4 + ["very likely"] * 3 + ["likely"]
    assert phrase(0.805, word=WORDS[4]) == "I think this is likely to be right (80%)"
    for margin in (-0.01, 0.06):
        with pytest.raises(UserError, match="margin"):
            steady_word(0.5, None, margin)


@given(st.floats(0, 1), st.sampled_from([None, *WORDS]), st.sampled_from(WORDS))
def test_a_steady_word_is_within_its_margin(p, previous, other):
    word = steady_word(p, previous)
    assert word.low - 0.02 <= p <= word.high + 0.02
    assert steady_word(p, None) == word_for(p)
    if previous == word_for(p):
        assert word == previous


def test_only_calibrated_values_are_spoken():
    rng = np.random.default_rng(0)
    q = rng.random(20_000)
    calibrator = fit_calibrator(
        "histogram", q, rng.random(20_000) < q / 2, template_hash="t", weights_hash="w", replicates=0
    )
    said = speak(calibrator, [0.97])[0]
    assert said.word == "roughly even chance"  # and not "almost certain"
    assert said.percent in said.sentence
    assert said.probability == calibrator.apply([0.97])[0]


def test_an_honest_system_passes_the_audit_and_fails_it_no_oftener_than_its_level():
    rng = np.random.default_rng(1)
    failures = 0
    for _ in range(200):
        p = rng.beta(0.7, 0.7, 400)
        failures += not all(one.holds for one in audit_words(p, rng.random(400) < p))
    assert failures <= binom.ppf(0.999, 200, 0.05)


def test_a_word_whose_band_is_missed_fails_by_name():
    rng = np.random.default_rng(2)
    p = rng.random(3000)
    audit = audit_words(p, rng.random(3000) < p**2)  # overconfident
    with pytest.raises(UserError, match=r'"likely" promises 55% to 80%, but \d+ of \d+ were right'):
        check_words(audit)
    assert sum(one.n for one in audit) == 3000
    assert all(one.low <= one.share <= one.high for one in audit)
    check_words(audit_words(p, rng.random(3000) < p))
    check_words(audit_words([], []))
    assert audit_words([], [])[0].as_dict()["share"] is None


def test_words_that_were_shown_are_audited_with_their_margin():
    rng = np.random.default_rng(3)
    p = np.full(4000, 0.815)
    words = ["likely"] * 4000  # kept by hysteresis from 0.8 on
    y = rng.random(4000) < p
    assert not audit_words(p, y, words=words)[4].holds
    assert audit_words(p, y, words=words, margin=0.02)[4].holds
    for bad in (["likely"], ["perhaps"] * 4000):
        with pytest.raises(UserError, match="word audit"):
            audit_words(p, y, words=bad)
    with pytest.raises(UserError, match="grade"):
        audit_words([0.5], [0.5])


def test_the_threshold_of_costs_costs_least():
    rng = np.random.default_rng(4)
    q = rng.random(40_000)
    y = rng.random(40_000) < q
    costs = {"cost_wrong": 3.0, "cost_refusal": 0.5, "gain_right": 1.0}
    threshold = threshold_from_costs(**costs)
    assert threshold == pytest.approx(2.5 / 4)
    cost = {t: cost_per_question(selective_statistics(q, y, t), **costs) for t in (threshold, 0.0, 0.4, 0.8, 1.0)}
    assert min(cost, key=cost.get) == threshold
    assert cost[0.0] == pytest.approx((3 * (~y).sum() - y.sum()) / 40_000)
    with pytest.raises(UserError, match="gain"):
        threshold_from_costs(1, 1, -1)
