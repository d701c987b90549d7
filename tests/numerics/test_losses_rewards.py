"""Rewards: honest confidence earns most, being right is worth more than being wrong, silence never pays."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibtrain.errors import UserError
from calibtrain.losses.rewards import (
    calibrated_reward,
    check_accuracy_weight,
    confidence_target,
    least_accuracy_weight,
    ppo_c_proper_reward,
    ppo_c_reward,
    proper_score,
    running_mean,
    ternary_reward,
    with_format_penalty,
    worst_score,
)

GRID = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
SCORES = ["brier", "log"]
unit = st.floats(0.0, 1.0)


def best_confidence(reward):
    """The stated confidence with the largest mean reward; `reward` maps a confidence (S,) to rewards (S,)."""
    return GRID[torch.stack([reward(q) for q in GRID]).argmax()].item()


def graded(truth, n=20_000):
    return (torch.rand(n, generator=torch.Generator().manual_seed(0)) < truth).double()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("truth", [0.05, 0.32, 0.5, 0.9])
def test_honest_confidence_earns_most(score, truth):
    correct = graded(truth)
    weight = least_accuracy_weight(1.0, score=score)

    def mean_reward(q):
        return calibrated_reward(correct, q.expand(correct.shape), score=score, accuracy_weight=weight).mean()

    assert best_confidence(mean_reward) == pytest.approx(correct.mean().item(), abs=1e-3)


@pytest.mark.parametrize("score", SCORES)
@given(q=unit, other=unit, b=st.floats(0.01, 10.0))
def test_right_is_never_worth_less_than_wrong(score, q, other, b):
    a = least_accuracy_weight(b, score=score)
    pair = torch.tensor([q, other], dtype=torch.float64)
    right, wrong = calibrated_reward(
        torch.tensor([1.0, 0.0]).double(), pair, score=score, accuracy_weight=a, score_weight=b
    )
    assert right >= wrong - 1e-9 * b


@pytest.mark.parametrize("score", SCORES)
def test_rule_is_where_the_honest_reward_stops_falling(score):
    """V(p) = a p + b G(p) rises on [0, 1] at the least weight, and falls near 0 just below it."""
    p = torch.linspace(0.0, 1.0, 20_001, dtype=torch.float64)
    g = p * proper_score(p, torch.ones_like(p), score=score) + (1 - p) * proper_score(p, 0 * p, score=score)
    least = least_accuracy_weight(1.0, score=score)
    assert ((least * p + g).diff() >= -1e-12).all()
    assert ((0.97 * least * p + g).diff()[:5] < 0).any()


def test_least_weights():
    assert least_accuracy_weight(0.5) == 0.5  # RLCR's weights are the boundary
    assert least_accuracy_weight(1.0, score="log") == pytest.approx(math.log(999), rel=1e-12)
    check_accuracy_weight(0.5, 0.5)
    check_accuracy_weight(6.91, 1.0, score="log")
    check_accuracy_weight(0.0, 0.0)


def test_weights_that_reward_sabotage_are_errors():
    with pytest.raises(UserError, match=r"wrong on purpose.*at least 1"):
        calibrated_reward(torch.ones(1), torch.ones(1), accuracy_weight=0.9, score_weight=1.0)
    # Rewarding Doubt's published scale: +0.25 for a right answer beside a log score divided by 3.453.
    with pytest.raises(UserError, match=r"at least 6\.907"):
        check_accuracy_weight(0.25 * 3.453, 1.0, score="log")
    with pytest.raises(UserError, match="decoupled credit"):  # SaySelf: a score alone
        check_accuracy_weight(0.0, 2.0)


def test_sabotage_beats_honesty_under_rewarding_doubt_when_answers_are_trained():
    """Their reward, written out: a wrong answer with confidence 0 earns more than an honest try at every p < 0.7."""

    def published(q, correct):
        q = min(max(q, 0.001), 0.999)
        scaled = (math.log(q if correct else 1 - q) + 3.454) / 3.453
        return scaled + (0.25 if correct else 0.0)

    sabotage = published(0.0, False)
    for p in (0.05, 0.3, 0.69):
        assert p * published(p, True) + (1 - p) * published(p, False) < sabotage
    assert 0.75 * published(0.75, True) + 0.25 * published(0.75, False) > sabotage


def test_rlcr_equals_the_authors_formula():
    q, c = torch.rand(200, dtype=torch.float64), (torch.rand(200) < 0.5).double()
    theirs = 0.5 * c + 0.5 * (1 - (c - q) ** 2)
    ours = calibrated_reward(c, q, accuracy_weight=0.5, score_weight=0.5)
    torch.testing.assert_close(ours, theirs - 0.5, rtol=1e-12, atol=1e-12)  # a constant is no part of an advantage


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_finite_and_bounded(score):
    q = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5])
    values = proper_score(q, torch.tensor([0.0, 1.0, 0.0, 1.0, 0.25]), score=score)
    assert values.isfinite().all()
    assert (values >= worst_score(score) - 1e-4).all()
    assert (values <= 0).all()
    assert proper_score(torch.tensor([0.5]), torch.tensor([math.nan]), score=score).isnan().all()


def test_confidences_outside_the_unit_interval_are_errors():
    for call in (
        lambda: proper_score(torch.tensor([1.2]), torch.ones(1)),
        lambda: proper_score(torch.ones(1), torch.tensor([-1.0])),
        lambda: ppo_c_reward(torch.ones(1), torch.tensor([90.0]), 0.0),
    ):
        with pytest.raises(UserError, match=r"must be in \[0, 1\]"):
            call()


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_mixed_target_still_asks_for_the_truth_and_has_less_noise(mixing):
    """With the squared score; the absolute error of the published form asks for .85 at p = .7, mixing .5."""
    p, groups, size = 0.7, 6_000, 8
    correct = (torch.rand(groups * size, generator=torch.Generator().manual_seed(0)) < p).double()
    ids = torch.arange(groups).repeat_interleave(size)
    target = confidence_target(correct, ids, mixing)
    assert best_confidence(lambda q: proper_score(q.expand(target.shape), target).mean()) == pytest.approx(p, abs=0.01)
    assert target.var() <= correct.var() + 1e-12
    if mixing == 0.5:
        assert target.var() < 0.4 * correct.var()
        absolute = best_confidence(lambda q: -(q - (0.5 * p + 0.5 * correct)).abs().mean())
        assert absolute == pytest.approx(0.85, abs=0.01)


def test_confidence_target_leaves_the_own_sample_out():
    correct = torch.tensor([1.0, 0.0, 0.0, 1.0, math.nan, 0.0])
    ids = torch.tensor([0, 0, 0, 1, 1, 2])
    target = confidence_target(correct, ids, 1.0)
    assert target[:4].tolist() == [0.0, 0.5, 0.5, 1.0]  # alone among the graded: its own grade
    assert target[5] == 0.0
    assert confidence_target(correct, ids, 0.5)[4].isnan()
    mixed = 0.3 * torch.tensor([0.0, 0.5, 0.5, 1.0, math.nan, 0.0]).double() + 0.7 * correct.double()
    ours = confidence_target(correct.double(), ids, 0.3)
    torch.testing.assert_close(ours, mixed, rtol=1e-12, atol=1e-12, equal_nan=True)
    with pytest.raises(UserError, match="mixing"):
        confidence_target(correct, ids, 1.5)


@pytest.mark.parametrize("risk", [0.05, 0.2, 0.5])
def test_answering_pays_exactly_below_the_risk(risk):
    for p in (1 - risk - 0.01, 1 - risk + 0.01):
        right, wrong, silent = ternary_reward(
            torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor([False, False, True]), risk
        ).tolist()
        assert (right, wrong, silent) == (1.0, -(1 - risk) / risk, 0.0)
        assert (p * right + (1 - p) * wrong > silent) == (p > 1 - risk)
    assert ternary_reward(torch.tensor([math.nan, math.nan]), torch.tensor([False, True]), risk)[1] == 0.0


def test_ternary_policy_keeps_the_risk_by_simulation():
    """Who answers where it pays has at most the target risk among the answers given, whatever the questions."""
    generator = torch.Generator().manual_seed(2)
    chance = torch.rand(50_000, generator=generator, dtype=torch.float64)
    right = (torch.rand(50_000, generator=generator) < chance).double()
    for risk in (0.1, 0.3):
        answered, silent = torch.zeros(2, dtype=torch.bool)
        gain = chance * ternary_reward(torch.ones(()), answered, risk)
        loss = (1 - chance) * ternary_reward(torch.zeros(()), answered, risk)
        given = gain + loss > ternary_reward(torch.ones(()), ~silent, risk)
        assert 1 - right[given].mean().item() <= risk
    for bad in (0.0, 1.0):
        with pytest.raises(UserError, match="target_risk"):
            ternary_reward(right, right > 0, bad)


def test_silence_never_pays():
    rewards = calibrated_reward(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    fixed = with_format_penalty(rewards, torch.tensor([True, False]), penalty=-1.5, worst=worst_score())
    assert fixed.tolist() == [-1.0, -1.5]
    for penalty in (-1.0, 0.0, math.nan):
        with pytest.raises(UserError, match="below -1"):
            with_format_penalty(rewards, torch.ones(2).bool(), penalty=penalty, worst=worst_score())


def authors_ppo_c(r, q, r_bar, w, mode):
    """The published experience maker's lines for one sample."""
    if mode == "difference":
        return r + w * (r - r_bar) * (q - 0.5)
    return r + (1 if r >= r_bar else -1) * w * abs(r) * (q - 0.5)


@pytest.mark.parametrize("mode", ["threshold", "difference"])
def test_ppo_c_equals_the_authors_formula(mode):
    r, q = torch.randn(100, dtype=torch.float64), torch.rand(100, dtype=torch.float64)
    expected = [authors_ppo_c(a, b, 0.1, 0.5, mode) for a, b in zip(r.tolist(), q.tolist(), strict=True)]
    torch.testing.assert_close(
        ppo_c_reward(r, q, 0.1, mode=mode), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("mode", ["threshold", "difference"])
def test_ppo_c_as_published_asks_for_certainty_and_its_proper_form_for_the_truth(mode):
    rewards = torch.where(graded(0.7) > 0, 1.0, -1.0).double()
    share = (rewards > 0).double().mean().item()
    published = best_confidence(lambda q: ppo_c_reward(rewards, q.expand(rewards.shape), 0.0, mode=mode).mean())
    assert published == 1.0
    proper = best_confidence(lambda q: ppo_c_proper_reward(rewards, q.expand(rewards.shape), 0.0).mean())
    assert proper == pytest.approx(share, abs=1e-3)
    scaled = best_confidence(lambda q: ppo_c_proper_reward(rewards, q.expand(rewards.shape), 0.0, scale=2.0).mean())
    wanted = torch.sigmoid(2 * rewards).mean().item()
    assert scaled == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_proper_ppo_c_equals_formula(scale):
    r, q = torch.randn(100, dtype=torch.float64), torch.rand(100, dtype=torch.float64)
    gaps = [x - 0.1 for x in r.tolist()]
    targets = [float(gap >= 0) if scale is None else 1 / (1 + math.exp(-scale * gap)) for gap in gaps]
    expected = [a - 0.7 * (b - t) ** 2 for a, b, t in zip(r.tolist(), q.tolist(), targets, strict=True)]
    ours = ppo_c_proper_reward(r, q, 0.1, weight=0.7, scale=scale)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_running_mean_is_for_the_next_batch_and_skips_the_ungraded():
    assert running_mean(2.0, torch.tensor([1.0, math.nan, 3.0]), rate=0.5) == 2.0
    assert running_mean(0.0, torch.tensor([1.0, 3.0])) == pytest.approx(0.2)
    assert running_mean(0.7, torch.tensor([math.nan])) == 0.7
