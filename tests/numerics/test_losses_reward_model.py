"""Reward-model losses against TRL, written-out formulas and scikit-learn; the module on batches cut up at will."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import mpmath
import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.losses import CHOSEN, REJECTED
from calibtrain.losses.reward_model import (
    RewardModelLoss,
    bradley_terry_loss,
    centering_loss,
    fit_pair_scale,
    folded_pairs,
    pair_probability,
    plackett_luce_loss,
    ppo_m_loss,
)
from calibtrain.losses.terms import mean_loss
from tests.unit.losses.batches import Example, make_batch

EDGES = [-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4]


def bt(a, b, margin=0.0):
    with mpmath.workdps(400):
        return float(mpmath.log(1 + mpmath.exp(-(mpmath.mpf(a) - b - margin))))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_bradley_terry_is_the_formula_and_finite(margin):
    a = torch.tensor(EDGES, dtype=torch.float64).repeat_interleave(len(EDGES)).requires_grad_()
    b = torch.tensor(EDGES, dtype=torch.float64).repeat(len(EDGES))
    losses = bradley_terry_loss(a, b, margin)
    expected = [bt(x, y, margin) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-300)
    losses.sum().backward()
    assert a.grad.isfinite().all()
    assert (a.grad <= 0).all()


def test_gradchecks():
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64).unbind()
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    for loss in (bradley_terry_loss, centering_loss):
        assert torch.autograd.gradcheck(loss, inputs)
    four = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ppo_m_loss(*x), (four,))
    assert torch.autograd.gradcheck(lambda x: plackett_luce_loss(x.t()), (four,))


def test_ppo_m_is_the_authors_sum_of_comparisons():
    c_hi, c_lo, r_hi, r_lo, c, r = torch.randn(6, 20, dtype=torch.float64)
    plain = [bt(a, b) + bt(d, e) for a, b, d, e in zip(*(x.tolist() for x in (c_hi, c_lo, r_lo, r_hi)), strict=True)]
    expected = torch.tensor(plain, dtype=torch.float64)
    torch.testing.assert_close(ppo_m_loss(c_hi, c_lo, r_hi, r_lo), expected, rtol=1e-12, atol=1e-12)
    quality = [bt(a, b) for a, b in zip(c.tolist(), r.tolist(), strict=True)]
    leaves = [x.clone().requires_grad_() for x in (c_hi, c_lo, r_hi, r_lo, c, r)]
    ours = ppo_m_loss(*leaves[:4], quality=(leaves[4], leaves[5]))
    expected = expected + torch.tensor(quality, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    ours.sum().backward()
    for better, worse in ((0, 1), (3, 2), (4, 5)):
        slope = torch.sigmoid(leaves[worse] - leaves[better]).detach()
        torch.testing.assert_close(leaves[better].grad, -slope, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(leaves[worse].grad, slope, rtol=1e-12, atol=1e-12)


def test_ppo_m_without_quality_does_not_see_which_answer_is_better():
    """The published default is blind to it: shifting both rewards of the rejected answer changes nothing."""
    rewards = torch.randn(4, 9, dtype=torch.float64)
    better = rewards + torch.tensor([0.0, 0.0, 5.0, 5.0])[:, None]
    torch.testing.assert_close(ppo_m_loss(*rewards), ppo_m_loss(*better))
    quality = [(x[0] + x[1], x[2] + x[3]) for x in (rewards, better)]
    assert (ppo_m_loss(*better, quality=quality[1]) > ppo_m_loss(*rewards, quality=quality[0])).all()


def test_plackett_luce_is_the_product_of_choices():
    rewards = torch.randn(7, 4, dtype=torch.float64)
    for row, loss in zip(rewards.tolist(), plackett_luce_loss(rewards).tolist(), strict=True):
        chance = math.prod(math.exp(row[k]) / sum(math.exp(x) for x in row[k:]) for k in range(4))
        assert loss == pytest.approx(-math.log(chance), rel=1e-12)
    two = rewards[:, :2]
    torch.testing.assert_close(plackett_luce_loss(two), bradley_terry_loss(two[:, 0], two[:, 1]))


def held_out(scale, n=4000, seed=0):
    """Differences r_w - r_l of a model whose own margins overstate the annotators' log odds by 1 / scale."""
    generator = torch.Generator().manual_seed(seed)
    d = 3.0 * torch.randn(n, generator=generator, dtype=torch.float64)
    first = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(scale * d)
    return torch.where(first, d, -d)


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_scale_is_found_and_makes_the_pairs_calibrated(scale):
    d = held_out(scale)
    found = fit_pair_scale(d)
    assert found == pytest.approx(scale, rel=0.12)
    confidence, correct = folded_pairs(d, found)
    for low, high in ((0.5, 0.75), (0.75, 1.0)):
        chosen = (confidence >= low) & (confidence < high)
        assert chosen.sum() > 100
        assert confidence[chosen].mean().item() == pytest.approx(correct[chosen].mean().item(), abs=0.05)


@pytest.mark.peer
def test_scale_equals_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the oracle")
    d = held_out(0.4)
    # Both directions of each pair give a fit without intercept two classes; the optimum is the same.
    features = torch.cat([d, -d])[:, None].numpy()
    labels = torch.cat([torch.ones(d.shape[0]), torch.zeros(d.shape[0])]).numpy()
    fitted = linear_model.LogisticRegression(C=1e10, fit_intercept=False, tol=1e-10).fit(features, labels)
    assert fit_pair_scale(d) == pytest.approx(fitted.coef_[0, 0], rel=1e-4)


def test_scale_is_refused_where_there_is_none():
    assert fit_pair_scale(torch.tensor([-1.0, -2.0, 0.5])) == 0.0
    for bad, message in (
        (torch.zeros(0), "held-out pairs"),
        (torch.tensor([1.0, math.nan]), "finite"),
        (torch.tensor([1.0, 2.0, 0.0]), "hold out more pairs"),
    ):
        with pytest.raises(UserError, match=message):
            fit_pair_scale(bad)


def test_pairs_fold_once_and_only_differences_count():
    d = torch.tensor([2.0, -2.0, 0.0])
    confidence, correct = folded_pairs(d, 0.5)
    assert correct.tolist() == [1.0, 0.0, 0.5]
    assert confidence[0] == confidence[1] == pair_probability(torch.tensor(2.0), 0.5)
    assert confidence[2] == 0.5


def pairs_batch(n, with_gaps=True):
    """Pairs with scores of their own, and sequences that are in no complete pair."""
    examples = []
    for i in range(n):
        examples += [Example(CHOSEN, i, [-1.0], [-0.5] * (1 + i % 3)), Example(REJECTED, i, [-1.0], [-0.7])]
    if with_gaps:
        examples += [
            Example(CHOSEN, n, [], [-1.0]),
            Example(REJECTED, n + 1, [-1.0], []),
            Example(CHOSEN, -1, [], [-1.0]),
        ]
    stats, batch, _ = make_batch(examples)
    scores = torch.randn(len(examples), generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return stats, replace(batch, scores=scores.requires_grad_())


def test_module_is_the_sum_over_complete_pairs():
    stats, batch = pairs_batch(4)
    terms = RewardModelLoss(margin=0.2, centering=0.01)(stats, batch)
    r = batch.scores.tolist()
    expected = sum(bt(r[2 * i], r[2 * i + 1], 0.2) for i in range(4))
    assert terms["preference"].total.item() == pytest.approx(expected, rel=1e-12)
    assert terms["centering"].total.item() == pytest.approx(sum((r[2 * i] + r[2 * i + 1]) ** 2 for i in range(4)))
    assert {name: (term.count.item(), term.weight) for name, term in terms.items()} == {
        "preference": (4, 1.0),
        "centering": (4, 0.01),
    }
    counts = RewardModelLoss(margin=0.2, centering=0.01).counts(batch)
    assert {name: count.item() for name, count in counts.items()} == {"preference": 4, "centering": 4}
    mean_loss(terms).backward()
    assert (batch.scores.grad[:8] != 0).all()
    assert (batch.scores.grad[8:] == 0).all()
    assert set(RewardModelLoss(centering=0.0).counts(batch)) == {"preference"}


@pytest.mark.parametrize("quality", [False, True])
def test_module_on_pairs_of_statements_is_ppo_m(quality):
    """As `calibtrain train` does it: each comparison is a pair of its own, and the loss the mean over them."""
    rewards = torch.randn(6, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    c_hi, c_lo, r_hi, r_lo, c, r = rewards
    pairs = [(c_hi, c_lo), (r_lo, r_hi), *([(c, r)] if quality else [])]
    scores = torch.stack([one for pair in pairs for one in pair]).t().reshape(-1)
    examples = [Example(role, i, [], [-1.0]) for i in range(7 * len(pairs)) for role in (CHOSEN, REJECTED)]
    stats, batch, _ = make_batch(examples)
    ours = len(pairs) * mean_loss(RewardModelLoss(centering=0.0)(stats, replace(batch, scores=scores)))
    expected = ppo_m_loss(c_hi, c_lo, r_hi, r_lo, quality=(c, r) if quality else None).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(one, rewards, retain_graph=True)[0] for one in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_module_does_not_care_how_the_batch_is_cut():
    loss = RewardModelLoss()
    stats, whole = pairs_batch(5, with_gaps=False)
    totals = {name: term.total for name, term in loss(stats, whole).items()}
    order = torch.tensor([7, 2, 9, 0, 6, 4, 1, 3, 8, 5])  # sequences of a pair need not be neighbours
    mixed = replace(
        whole,
        roles=whole.roles[order],
        pair_ids=whole.pair_ids[order],
        scores=whole.scores[order],
        sequence_ids=torch.arange(10),
        is_completion=torch.ones(10, dtype=torch.bool),
    )
    for name, term in loss(stats, mixed).items():
        torch.testing.assert_close(term.total, totals[name])


def test_module_without_scores_says_what_is_missing():
    stats, batch, _ = make_batch([Example(CHOSEN, 0, [], [-1.0]), Example(REJECTED, 0, [], [-1.0])])
    with pytest.raises(UserError, match="scalar head"):
        RewardModelLoss()(stats, batch)


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [None, 0.3])
def test_module_equals_trl(margin, dtype):
    reward = pytest.importorskip("trl.trainer.reward_trainer", reason="TRL's reward trainer is the oracle")
    trainer = object.__new__(reward.RewardTrainer)  # its loss needs these attributes and nothing of a training run
    trainer.args = SimpleNamespace(center_rewards_coefficient=0.01)
    trainer.accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer.model = SimpleNamespace(training=False)
    trainer._metrics = {
        "eval": {name: [] for name in ("num_tokens", "min_reward", "mean_reward", "max_reward", "accuracy", "margin")}
    }
    trainer._total_train_tokens = 0
    stats, batch = pairs_batch(6, with_gaps=False)
    scores = batch.scores.detach().to(dtype).requires_grad_()
    stacked = torch.cat([scores[0::2], scores[1::2]]).float()
    inputs = {"attention_mask": torch.ones(1)}
    if margin is not None:
        inputs["margin"] = torch.full((6,), margin)
    theirs = trainer.compute_loss(lambda **_: SimpleNamespace(logits=stacked[:, None]), inputs)
    ours = mean_loss(RewardModelLoss(margin=margin or 0.0, centering=0.01)(stats, replace(batch, scores=scores)))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x, scores)[0].float() for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
