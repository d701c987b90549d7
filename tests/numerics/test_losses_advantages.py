"""Credit of sampled answers: group, leave-one-out and generalized advantages against definitions and TRL."""

from __future__ import annotations

import math
import random
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibtrain.errors import UserError
from calibtrain.losses.advantages import (
    decoupled_advantages,
    generalized_advantages,
    grpo_advantages,
    last_tokens,
    leave_one_out_mean,
    rloo_advantages,
    token_rewards,
    whiten,
)
from calibtrain.losses.rewards import proper_score


def by_group(rewards, ids):
    groups = defaultdict(list)
    for reward, group in zip(rewards, ids, strict=True):
        if not math.isnan(reward):
            groups[group].append(reward)
    return groups


def test_advantages_are_the_formulas():
    rng = random.Random(0)
    rewards = [math.nan if rng.random() < 0.15 else rng.gauss(0, 1) for _ in range(60)]
    ids = [rng.randrange(9) for _ in rewards]
    groups = by_group(rewards, ids)
    r, g = torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids)
    grpo, dr, rloo, loo = (
        grpo_advantages(r, g),
        grpo_advantages(r, g, scale="none"),
        rloo_advantages(r, g),
        leave_one_out_mean(r, g),
    )
    everything = torch.tensor([x for x in rewards if not math.isnan(x)], dtype=torch.float64)
    batch = grpo_advantages(r, g, scale="batch")
    for i, (reward, group) in enumerate(zip(rewards, ids, strict=True)):
        members = groups[group]
        if math.isnan(reward) or len(members) < 2:
            assert grpo[i] == dr[i] == rloo[i] == 0.0
            continue
        mean = sum(members) / len(members)
        std = math.sqrt(sum((x - mean) ** 2 for x in members) / (len(members) - 1))
        others = (sum(members) - reward) / (len(members) - 1)
        assert grpo[i].item() == pytest.approx((reward - mean) / (std + 1e-4), rel=1e-9, abs=1e-12)
        assert dr[i].item() == pytest.approx(reward - mean, rel=1e-9, abs=1e-12)
        assert batch[i].item() == pytest.approx((reward - mean) / (everything.std().item() + 1e-4), rel=1e-9, abs=1e-12)
        assert rloo[i].item() == pytest.approx(reward - others, rel=1e-9, abs=1e-12)
        assert loo[i].item() == pytest.approx(others, rel=1e-9, abs=1e-12)


@pytest.mark.peer
def test_a_reward_that_carries_a_gradient_is_an_error():
    """An advantage would drop it: the score of the policy's own likelihood is the loss's, not the reward's."""
    rewards, ids = torch.rand(4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 0, 1, 1])
    mask = torch.ones(4, dtype=torch.bool)
    for credit in (
        lambda: grpo_advantages(rewards, ids),
        lambda: rloo_advantages(rewards, ids),
        lambda: leave_one_out_mean(rewards, ids),
        lambda: generalized_advantages(rewards, torch.zeros(4), mask, ids),
    ):
        with pytest.raises(UserError, match="carry a gradient"):
            credit()
    kl = token_rewards(rewards.detach(), rewards, mask, torch.arange(4), beta=0.1)
    assert not kl.requires_grad  # k1's own gradient is 0 on average


def test_advantages_equal_trl():
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL's statistics are the oracle")
    rewards = torch.randn(8, 4, dtype=torch.float64)
    rewards[2, 1] = math.nan
    ids = torch.arange(8).repeat_interleave(4)
    mean = torch.nanmean(rewards, dim=1, keepdim=True)
    theirs = ((rewards - mean) / (utils.nanstd(rewards, dim=1)[:, None] + 1e-4)).nan_to_num(0.0).flatten()
    torch.testing.assert_close(grpo_advantages(rewards.flatten(), ids), theirs, rtol=1e-6, atol=1e-6)
    counts = (~rewards.isnan()).sum(1, keepdim=True)
    theirs = rewards - (torch.nansum(rewards, 1, keepdim=True) - rewards) / (counts - 1)
    ours = rloo_advantages(rewards.flatten(), ids)
    torch.testing.assert_close(ours, theirs.nan_to_num(0.0).flatten(), rtol=1e-6, atol=1e-6)


@given(st.floats(-1e3, 1e3, width=32), st.integers(2, 9))
def test_equal_rewards_have_no_advantage_at_all(value, size):
    rewards, ids = torch.full((2 * size,), value), torch.arange(2).repeat_interleave(size)
    for advantages in (grpo_advantages(rewards, ids), rloo_advantages(rewards, ids)):
        assert (advantages == 0).all()


def test_leave_one_out_gradient_is_unbiased_by_simulation():
    """Over 10,000 groups of answers from a softmax policy; GRPO's division by the spread is not."""
    logits = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    p = logits.softmax(0)
    (exact,) = torch.autograd.grad((p * worth).sum(), logits)
    groups, size = 10_000, 4
    draws = torch.multinomial(p.detach(), groups * size, replacement=True, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(groups).repeat_interleave(size)
    scores = torch.nn.functional.one_hot(draws, 3) - p.detach()
    samples = {
        name: (credit(worth[draws], ids)[:, None] * scores).view(groups, size, 3).mean(1)
        for name, credit in (("rloo", rloo_advantages), ("grpo", grpo_advantages))
    }
    z = {name: (x.mean(0) - exact).abs() / (x.std(0) / math.sqrt(groups)) for name, x in samples.items()}
    assert (z["rloo"] < 3).all()
    assert (z["grpo"] > 10).any()


def gae_by_definition(r, v, gamma, lam):
    deltas = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(len(r) - t)) for t in range(len(r))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_generalized_advantages_are_the_definition(gamma, lam):
    lengths = [3, 1, 4]
    rows = [torch.randn(2, n, dtype=torch.float64) for n in lengths]
    rewards, values = torch.cat([torch.cat([x, torch.full((2, 1), 50.0).double()], 1) for x in rows], 1)
    mask = torch.tensor([kept for n in lengths for kept in [*[True] * n, False]])  # a prompt token behind each
    ids = torch.repeat_interleave(torch.tensor([0, 1, 3]), torch.tensor(lengths) + 1)  # sequence 2 has no token
    advantages, returns = generalized_advantages(rewards, values, mask, ids, gamma=gamma, lam=lam)
    expected = [a for r, v in rows for a in gae_by_definition(r.tolist(), v.tolist(), gamma, lam)]
    torch.testing.assert_close(advantages[mask], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns[mask], advantages[mask] + values[mask])
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()
    empty = generalized_advantages(rewards, values, torch.zeros_like(mask), ids)
    assert all((x == 0).all() for x in empty)


def test_token_rewards_pay_at_the_last_sampled_token():
    mask = torch.tensor([False, True, True, True, False, False])
    ids = torch.tensor([0, 0, 0, 1, 1, 2])
    kl = torch.arange(6).float()
    assert last_tokens(mask, ids, 3).tolist() == [2, 3, -1]
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, ids, beta=0.5)
    assert rewards.tolist() == [0.0, -0.5, 9.0, 18.5, 0.0, 0.0]


def test_whitening_is_over_the_sampled_tokens():
    x = torch.randn(50, dtype=torch.float64) * 3 + 7
    mask = torch.arange(50) % 3 > 0
    white = whiten(x, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].var().item() == pytest.approx(1, abs=1e-6)
    assert (white[~mask] == 0).all()
    assert whiten(x, torch.arange(50) == 4)[4] == x[4]


def test_decoupled_credit_reaches_its_own_words_alone():
    ids = torch.tensor([0, 0, 0, 1, 1])
    words = torch.tensor([False, False, True, False, True])
    credit = decoupled_advantages(torch.tensor([1.0, -1.0]), torch.tensor([5.0, 7.0]), words, ids)
    assert credit.tolist() == [1.0, 1.0, 5.0, -1.0, 7.0]
    with pytest.raises(UserError, match=r"\(S,\)"):
        decoupled_advantages(torch.ones(2), torch.ones(3), words, ids)


def test_sabotage_pays_under_one_heavy_reward_and_not_under_decoupled_credit():
    """A policy answers or is wrong on purpose, and then says how sure it is, honestly; the score weighs five times more
    than being right. The gradient of its choice points to sabotage under one reward, to answering with decoupled credit."""
    generator = torch.Generator().manual_seed(0)
    groups, size, p, weight = 2_000, 8, 0.4, 5.0
    tries = torch.rand(groups * size, generator=generator) < 0.5
    correct = (tries & (torch.rand(groups * size, generator=generator) < p)).double()
    score = weight * proper_score(torch.where(tries, p, 0.0).double(), correct)
    ids = torch.arange(groups).repeat_interleave(size)
    words = torch.tensor([False, True]).repeat(
        groups * size
    )  # each sample: a word of the answer, one of the confidence
    owner = torch.arange(groups * size).repeat_interleave(2)
    apart = decoupled_advantages(rloo_advantages(correct, ids), rloo_advantages(score, ids), words, owner)[0::2]
    together = rloo_advantages(correct + score, ids)
    slope = tries.double() - 0.5  # of the choice's log-prob in its logit
    assert (together * slope).mean() < -0.05
    assert (apart * slope).mean() > 0.05


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.6), (1.0, 1.0)])
def test_a_cut_sequence_ends_with_the_value_of_its_last_state(gamma, lam):
    """As if it had gone on by one more token, which is worth that value and nothing else."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 1, 4]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    rewards, values = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    last = torch.tensor([0.7, 0.0, -1.3], dtype=torch.float64)
    mask = torch.ones(8, dtype=torch.bool)
    advantages, returns = generalized_advantages(rewards, values, mask, ids, gamma=gamma, lam=lam, last_values=last)
    expected, start = [], 0
    for length, after in zip(lengths, last.tolist(), strict=True):
        r, v = rewards[start : start + length].tolist(), [*values[start : start + length].tolist(), after]
        found = 0.0
        row = []
        for t in reversed(range(length)):
            found = r[t] + gamma * v[t + 1] - v[t] + gamma * lam * found
            row.append(found)
        expected += row[::-1]
        start += length
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, advantages + values)
    ended = generalized_advantages(rewards, values, mask, ids, gamma=gamma, lam=lam)
    for one, other in zip((advantages, returns), ended, strict=True):
        torch.testing.assert_close(one[3], other[3])  # of the sequence that has ended
        assert (one != other).sum() >= 2
