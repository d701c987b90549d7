"""PPO's parts against OpenRLHF's formulas, written out here in float64 over padded rows.

They are those of openrlhf/models/loss.py, models/utils.py and trainer/ppo_utils/experience_maker.py at commit 3c3be623, in
words of our own: its rows are (B, T) with a mask, ours flat.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from calibtrain.losses.advantages import generalized_advantages, token_rewards, whiten
from calibtrain.losses.importance import importance_weights
from calibtrain.losses.kl import KL_ESTIMATORS
from calibtrain.losses.policy_gradient import GRPOLoss, PPOLoss, policy_measures
from calibtrain.losses.terms import mean_loss
from tests.numerics.test_losses_policy_gradient import LENGTHS, rollout_batch

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def rows(values, batch):
    """A list of floats a sequence."""
    return [values[batch.sequence_ids == s].tolist() for s in range(len(LENGTHS))]


def policy_loss(batch, logprob, *, dual_clip=None, token_level=True, weights=None):
    """PolicyLoss: `policy_loss_type` ppo, its ratio's exponent clamped at 20; tokens' mean, or the mean of rows' means."""
    means, every = [], []
    weights = torch.ones_like(logprob) if weights is None else weights
    columns = (rows(one, batch) for one in (logprob, batch.old_logprob, batch.advantages, weights))
    for row in zip(*columns, strict=True):
        losses = []
        for new, old, advantage, weight in zip(*row, strict=True):
            ratio = math.exp(max(-20.0, min(20.0, new - old)))
            first, second = ratio * advantage, max(0.8, min(1.28, ratio)) * advantage
            gain = min(first, second)
            if dual_clip is not None and advantage < 0:
                gain = max(gain, dual_clip * advantage)
            losses.append(-gain * weight)
        means.append(sum(losses) / len(losses))
        every += losses
    return sum(every) / len(every) if token_level else sum(means) / len(means)


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_policy_loss(dual_clip, token_level):
    stats, batch = rollout_batch()
    batch.old_logprob.sub_(0.6)  # ratios up to 3
    found = mean_loss(GRPOLoss(norm="token" if token_level else "sequence", dual_clip=dual_clip, **CLIP)(stats, batch))
    expected = policy_loss(batch, stats.logprob, dual_clip=dual_clip, token_level=token_level)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    if token_level:
        ours = PPOLoss(dual_clip=dual_clip, **CLIP)(stats, batch)["policy"]
        assert (ours.total / ours.count).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("kind", "how"), [("tis", "token_truncate"), ("icepop", "token_mask")])
def test_policy_loss_with_another_samplers_logprobs(kind, how):
    """vllm_is_correction_type with thresholds (0, 1.2)."""
    stats, batch = rollout_batch()
    sampled = (
        batch.old_logprob + 0.4 * torch.randn(batch.targets.shape, generator=torch.Generator().manual_seed(1)).double()
    )
    ratio = (batch.old_logprob - sampled).exp()
    expected = ratio.clamp(0.0, 1.2) if kind == "tis" else ratio * (ratio <= 1.2)
    weights = importance_weights(batch.old_logprob, sampled, batch.sequence_ids, len(LENGTHS), how=how, cap=1.2)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    found = PPOLoss(**CLIP)(stats, replace(batch, importance=weights))["policy"]
    assert (found.total / found.count).item() == pytest.approx(
        policy_loss(batch, stats.logprob, weights=expected), rel=1e-12
    )


def test_clip_ratio_and_kl_that_are_logged():
    stats, batch = rollout_batch()
    found = {
        name: (one.total / one.count).item()
        for name, one in policy_measures(stats, batch, {**CLIP, "dual_clip": None}).items()
    }
    ratio = (stats.logprob - batch.old_logprob).exp()
    first, second = ratio * batch.advantages, ratio.clamp(0.8, 1.28) * batch.advantages
    assert found["clip_share"] == pytest.approx((second < first).double().mean().item())
    assert found["clip_share"] > 0
    # its ppo_kl is the mean of old - new; ours adds ratio - 1, 0 on average, and is never negative
    ppo_kl = (batch.old_logprob - stats.logprob).mean().item()
    assert found["policy_kl"] == pytest.approx(ppo_kl + found["ratio"] - 1.0, rel=1e-9)


@pytest.mark.parametrize("clip", [0.2, 1e6])  # clip_eps None: no clipping
def test_value_loss(clip):
    stats, batch = rollout_batch()
    found = PPOLoss(value_clip=clip)(stats, batch)["value"]
    total = 0.0
    for v, old, target in zip(*(one.tolist() for one in (batch.scores, batch.old_values, batch.returns)), strict=True):
        clipped = old + max(-clip, min(clip, v - old))
        total += max((clipped - target) ** 2, (v - target) ** 2)
    assert (found.total / found.count).item() == pytest.approx(0.5 * total / sum(LENGTHS), rel=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0)])
def test_rewards_advantages_and_returns(gamma, lam):
    """compute_reward, get_advantages_and_returns, and their normalisation over all tokens."""
    stats, batch = rollout_batch()
    generator = torch.Generator().manual_seed(3)
    reward = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    kl = KL_ESTIMATORS["k1"](stats.logprob.detach(), batch.reference_logprob)
    assert kl.abs().max() < 10  # where they clamp
    mask = torch.ones_like(batch.is_completion)
    per_token = token_rewards(reward, kl, mask, batch.sequence_ids, beta=0.1)
    advantages, returns = generalized_advantages(
        per_token, batch.old_values, mask, batch.sequence_ids, gamma=gamma, lam=lam
    )
    expected, targets = [], []
    for s, (k, v) in enumerate(zip(rows(kl, batch), rows(batch.old_values, batch), strict=True)):
        paid = [-0.1 * one for one in k]
        paid[-1] += reward[s].item()
        last, found = 0.0, []
        for t in reversed(range(len(v))):
            following = v[t + 1] if t + 1 < len(v) else 0.0
            last = paid[t] + gamma * following - v[t] + gamma * lam * last
            found.append(last)
        expected += found[::-1]
        targets += [a + b for a, b in zip(found[::-1], v, strict=True)]
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, torch.tensor(targets, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    mean, variance = advantages.mean(), advantages.var(unbiased=False)  # theirs divides by n, ours by n - 1
    n = advantages.numel()
    theirs = (advantages - mean) * variance.clamp(min=1e-8).rsqrt()
    torch.testing.assert_close(whiten(advantages, mask), theirs * math.sqrt((n - 1) / n), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_estimators_where_they_are_not_clamped(name):
    new, base = -3 * torch.rand(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = new - base
    expected = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[name]
    torch.testing.assert_close(KL_ESTIMATORS[name](new, base), expected, rtol=1e-9, atol=1e-12)
