"""Importance weights of another sampler's tokens: the formula, and that no gradient leaks through them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.losses.importance import importance_weights, sampling_mismatch
from calibtrain.losses.policy_gradient import GRPOLoss, PPOLoss, RLOOLoss
from calibtrain.losses.terms import mean_loss
from tests.numerics.test_losses_policy_gradient import LENGTHS, rollout_batch


def weighted_batch(how="token_truncate", cap=1.4):
    stats, batch = rollout_batch()
    noise = 0.5 * torch.randn(batch.targets.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sampled = batch.old_logprob + noise
    weights = importance_weights(batch.old_logprob, sampled, batch.sequence_ids, len(LENGTHS), how=how, cap=cap)
    return stats, batch, sampled, weights


@pytest.mark.parametrize("how", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_weights_are_the_formula(how):
    _, batch, sampled, weights = weighted_batch(how)
    differences = (batch.old_logprob - sampled).tolist()
    owners = batch.sequence_ids.tolist()
    for place, (difference, owner) in enumerate(zip(differences, owners, strict=True)):
        whole = sum(d for d, o in zip(differences, owners, strict=True) if o == owner)
        ratio = math.exp(whole if how.startswith("sequence") else difference)
        expected = min(ratio, 1.4) if how.endswith("truncate") else ratio * (ratio <= 1.4)
        assert weights[place].item() == pytest.approx(expected, rel=1e-12)
    assert {(weights == 1.4).any().item(), (weights == 0.0).any().item()} == {True, False}


@pytest.mark.parametrize("module", [GRPOLoss(beta=0.1, kl="k3"), GRPOLoss(norm="token"), RLOOLoss(), PPOLoss()])
def test_a_weight_is_a_factor_of_the_policys_loss_alone(module):
    how = "sequence_truncate" if isinstance(module, RLOOLoss) else "token_truncate"
    stats, batch, _, weights = weighted_batch(how)
    leaf = weights.clone().requires_grad_()
    found, plain = module(stats, replace(batch, importance=leaf)), module(stats, batch)
    by_credit = module(stats, replace(batch, advantages=batch.advantages * weights))
    torch.testing.assert_close(found["policy"].total, by_credit["policy"].total)
    assert found["policy"].total != plain["policy"].total
    for name in found.keys() - {"policy"}:
        assert found[name].total.equal(plain[name].total)
    mean_loss(found).backward()
    assert leaf.grad is None
    ones = module(stats, replace(batch, importance=torch.ones_like(weights)))
    torch.testing.assert_close(ones["policy"].total, plain["policy"].total)


def test_a_weighted_mean_is_that_of_the_trainers_policy():
    """Over all tokens that a sampler may draw, weighted by its probabilities; a cap takes from it, and never adds."""
    generator = torch.Generator().manual_seed(5)
    ours, theirs, value = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    ours, theirs, value = ours.log_softmax(0), theirs.log_softmax(0), value.abs()
    ids = torch.arange(200)
    exact = importance_weights(ours, theirs, ids, 200, cap=1e9)
    assert (theirs.exp() * exact * value).sum() == pytest.approx((ours.exp() * value).sum().item())
    capped = importance_weights(ours, theirs, ids, 200, cap=1.5)
    assert (theirs.exp() * capped * value).sum() < (ours.exp() * value).sum()


def test_mismatch_is_measured_where_both_are_known():
    ours = torch.tensor([-1.0, -2.0, math.nan, -0.5], dtype=torch.float64)
    theirs = torch.tensor([-1.5, -1.75, -1.0, math.nan], dtype=torch.float64)
    found = sampling_mismatch(ours, theirs)
    assert found["difference_mean"] == pytest.approx(0.375)
    assert found["difference_max"] == pytest.approx(0.5)
    assert found["kl"] == pytest.approx(((math.exp(0.5) - 1.5) + (math.exp(-0.25) - 0.75)) / 2)
    assert sampling_mismatch(ours, torch.full_like(ours, math.nan)) == {}


def test_the_mismatchs_kl_is_that_of_the_samplers_policy():
    generator = torch.Generator().manual_seed(6)
    ours, theirs = torch.randn(2, 20, generator=generator, dtype=torch.float64).log_softmax(1)
    expected = (theirs.exp() * (theirs - ours)).sum().item()
    counts = (theirs.exp() * 40000).round().long()
    found = sampling_mismatch(ours.repeat_interleave(counts), theirs.repeat_interleave(counts))
    assert found["kl"] == pytest.approx(expected, rel=1e-2)


def test_a_correction_that_there_is_not_is_an_error():
    values, ids = torch.zeros(3), torch.arange(3)
    with pytest.raises(UserError, match="correction must be"):
        importance_weights(values, values, ids, 3, how="token")
