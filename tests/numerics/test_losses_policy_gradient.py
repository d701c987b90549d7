"""PPO, RLOO and GRPO against TRL and written-out formulas; their credit; batches cut up at will."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibtrain.errors import UserError
from calibtrain.losses import ANSWER, CHOSEN
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
from calibtrain.losses.policy_gradient import (
    GRPOLoss,
    PPOLoss,
    RLOOLoss,
    clipped_policy_loss,
    clipped_value_loss,
    token_norm_sum,
)
from calibtrain.losses.rewards import proper_score
from calibtrain.losses.terms import mean_loss
from calibtrain.ops import TokenStats
from tests.unit.losses.batches import Example, make_batch

LENGTHS = [3, 1, 5, 2, 4, 4]
WIDTH = max(LENGTHS)


def rollout_batch(lengths=LENGTHS, seed=0, dtype=torch.float64, extra=()):
    """Sampled answers with credit, old and reference log-probs and values; every number a function of its place."""
    generator = torch.Generator().manual_seed(seed)
    examples = [Example(ANSWER, -1, [], [-1.0] * length) for length in lengths]
    stats, batch, _ = make_batch([*examples, *extra], dtype)
    n, credit = batch.targets.shape[0], torch.randn(len(batch.roles), generator=generator, dtype=dtype)

    def near(scale):
        return scale * torch.randn(n, generator=generator, dtype=dtype)

    logprob = (-torch.rand(n, generator=generator, dtype=dtype) * 3 - 0.01).requires_grad_()
    values = near(1.0).requires_grad_()
    batch = replace(
        batch,
        advantages=credit[batch.sequence_ids],
        old_logprob=logprob.detach() + near(0.3),
        reference_logprob=logprob.detach() + near(0.5),
        old_values=values.detach() + near(0.2),
        returns=near(1.0),
        scores=values,
    )
    return TokenStats(logprob, *stats[1:]), batch


def clipped(lp, old, a, low=0.2, high=0.2):
    ratio = math.exp(lp - old)
    return -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)


# Pure functions


def test_clipped_policy_loss_is_the_formula():
    lp, old, a = torch.randn(3, 300, dtype=torch.float64)
    for low, high in ((0.2, 0.2), (0.2, 0.28)):
        expected = [clipped(*x, low, high) for x in zip(lp.tolist(), old.tolist(), a.tolist(), strict=True)]
        actual = clipped_policy_loss(lp, old, a, clip_low=low, clip_high=high)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_policy_gradient_is_the_score_times_the_credit_where_sampling_is_fresh():
    logprob = torch.randn(20, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(20, dtype=torch.float64, requires_grad=True)
    clipped_policy_loss(logprob, logprob, advantages).sum().backward()
    torch.testing.assert_close(logprob.grad, -advantages.detach())
    assert advantages.grad is None


def test_gradchecks():
    lp = torch.tensor([-0.1, -1.0, -2.0, -1.4], dtype=torch.float64, requires_grad=True)
    old, a = torch.tensor([-0.15, -0.5, -2.5, -1.4]).double(), torch.tensor([1.0, -2.0, 3.0, -1.0]).double()
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, old, a), (lp,))
    v = torch.tensor([0.1, 1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, old, a), (v,))


def test_clipped_value_loss_is_the_formula():
    v, old, r = torch.randn(3, 200, dtype=torch.float64)

    def one(v, old, r):
        return 0.5 * max((v - r) ** 2, (old + min(max(v - old, -0.2), 0.2) - r) ** 2)

    expected = [one(*x) for x in zip(v.tolist(), old.tolist(), r.tolist(), strict=True)]
    torch.testing.assert_close(
        clipped_value_loss(v, old, r), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_extremes_are_finite():
    lp = torch.tensor([0.0, -1e4, 0.0, -1e4, 0.0], requires_grad=True)
    old = torch.tensor([-1e4, 0.0, -1e4, 0.0, 0.0])
    losses = clipped_policy_loss(lp, old, torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert lp.grad.isfinite().all()
    assert lp.grad[2] > 0  # a stray token that earned blame still gets it


@pytest.mark.parametrize(("norm", "length"), [("sequence", 1), ("token", 1), ("constant", 7)])
def test_token_norms_are_the_published_ones(norm, length):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(n, generator=generator, dtype=torch.float64).tolist() for n in [*LENGTHS, 0]]
    expected = {
        "sequence": sum(sum(row) / len(row) for row in rows if row) / len(LENGTHS),
        "token": sum(sum(row) for row in rows) / sum(LENGTHS),
        "constant": sum(sum(row) for row in rows) / (7 * len(LENGTHS)),
    }[norm]
    flat = torch.tensor([x for row in rows for x in [*row, 99.0]], dtype=torch.float64)  # a masked token behind each
    mask = torch.tensor([kept for row in rows for kept in [*[True] * len(row), False]])
    ids = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) + 1 for row in rows]))
    total, count = token_norm_sum(flat, mask, ids, len(rows), norm, length)
    assert (total / count).item() == pytest.approx(expected, rel=1e-12)
    assert count.dtype == torch.int64


# Credit


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
    assert (z["rloo"] < 4).all()
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


# Modules


def expected_policy(stats, batch, norm="sequence", length=1, low=0.2, high=0.2):
    rows = defaultdict(list)
    columns = (batch.sequence_ids, stats.logprob, batch.old_logprob, batch.advantages)
    for s, lp, old, a in zip(*(x.tolist() for x in columns), strict=True):
        rows[s].append(clipped(lp, old, a, low, high))
    if norm == "token":
        return sum(map(sum, rows.values())) / sum(map(len, rows.values()))
    return sum(sum(row) / (len(row) if norm == "sequence" else length) for row in rows.values()) / len(rows)


@pytest.mark.parametrize(("norm", "length"), [("sequence", None), ("token", None), ("constant", 9)])
def test_grpo_module_is_the_formula(norm, length):
    stats, batch = rollout_batch()
    terms = GRPOLoss(norm=norm, length=length, clip_high=0.28, beta=0.04, kl="k3")(stats, batch)
    expected = expected_policy(stats, batch, norm, length or 1, high=0.28)
    assert (terms["policy"].total / terms["policy"].count).item() == pytest.approx(expected, rel=1e-12)
    assert terms["kl"].weight == 0.04
    counts = GRPOLoss(norm=norm, length=length, beta=0.04).counts(batch)
    assert {name: term.count.item() for name, term in terms.items()} == {k: c.item() for k, c in counts.items()}


def test_rloo_module_is_the_formula():
    stats, batch = rollout_batch()
    sums = defaultdict(lambda: [0.0, 0.0, 0.0])
    columns = (batch.sequence_ids, stats.logprob, batch.old_logprob, batch.advantages)
    for s, lp, old, a in zip(*(x.tolist() for x in columns), strict=True):
        sums[s][0] += lp
        sums[s][1] += old
        sums[s][2] = a
    term = RLOOLoss()(stats, batch)["policy"]
    assert term.count == len(LENGTHS)
    assert term.total.item() == pytest.approx(sum(clipped(*x) for x in sums.values()), rel=1e-12)


def test_ppo_module_is_the_formula():
    stats, batch = rollout_batch()
    terms = PPOLoss(value_weight=0.3)(stats, batch)
    assert terms["policy"].total.item() == pytest.approx(
        expected_policy(stats, batch, "token") * sum(LENGTHS), rel=1e-12
    )
    v, old, r = batch.scores, batch.old_values, batch.returns
    moved = old + (v - old).clamp(-0.2, 0.2)
    expected = 0.5 * torch.maximum((v - r) ** 2, (moved - r) ** 2).sum()
    torch.testing.assert_close(terms["value"].total, expected, rtol=1e-12, atol=1e-12)
    assert (terms["value"].weight, terms["value"].count.item()) == (0.3, sum(LENGTHS))
    ratio, a = (stats.logprob - batch.old_logprob).exp(), batch.advantages
    policy = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum()
    leaves, n = (stats.logprob, v), sum(LENGTHS)
    gradients = (torch.autograd.grad(x, leaves) for x in (mean_loss(terms), (policy + 0.3 * expected) / n))
    for actual, wanted in zip(*gradients, strict=True):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


MODULES = {
    "grpo": GRPOLoss(beta=0.1),
    "grpo-token": GRPOLoss(norm="token"),
    "grpo-constant": GRPOLoss(norm="constant", length=8),
    "rloo": RLOOLoss(),
    "ppo": PPOLoss(),
}


def cut(stats, batch, sequences):
    """The batch of some sequences, in that order, as if collated on its own."""
    index = torch.cat([(batch.sequence_ids == s).nonzero()[:, 0] for s in sequences])
    lengths = torch.tensor([int((batch.sequence_ids == s).sum()) for s in sequences])
    n = batch.sequence_ids.shape[0]
    changes = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if value is not None and field.name not in ("input_ids", "position_ids", "segment_ids"):
            changes[field.name] = value[index] if value.shape[0] == n else value[torch.tensor(sequences)]
    changes["sequence_ids"] = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
    return TokenStats(*(x[index] for x in stats)), replace(batch, **changes)


@pytest.mark.parametrize("name", MODULES)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_sums_do_not_depend_on_how_the_batch_is_cut(name, data):
    stats, batch = rollout_batch()
    module = MODULES[name]
    whole = module(stats, batch)
    order = data.draw(st.permutations(range(len(LENGTHS))))
    split = data.draw(st.integers(0, len(LENGTHS)))
    parts = [cut(stats, batch, part) for part in (order[:split], order[split:]) if part]
    for key, term in whole.items():
        pieces = [module(*part)[key] for part in parts]
        torch.testing.assert_close(sum(piece.total for piece in pieces), term.total)
        assert sum(piece.count for piece in pieces) == term.count
        gradients = [
            torch.autograd.grad(total, stats.logprob, retain_graph=True, allow_unused=True)[0]
            for total in (term.total, sum(piece.total for piece in pieces))
        ]
        if gradients[0] is not None:
            torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", MODULES)
def test_what_was_not_sampled_is_ignored(name):
    """Other roles, prompt tokens and empty answers, even where nothing is known of them."""
    extra = [Example(CHOSEN, -1, [-2.0], [-1.0]), Example(ANSWER, -1, [-3.0], [])]
    stats, batch = rollout_batch(extra=extra)
    known = batch.sequence_ids < len(LENGTHS)
    nan = torch.full_like(batch.old_logprob, math.nan)
    batch = replace(
        batch,
        reference_logprob=torch.where(known, batch.reference_logprob, nan),
        advantages=torch.where(known, batch.advantages, 3.0),
    )
    alone = cut(stats, batch, list(range(len(LENGTHS))))
    module = MODULES[name]
    for key, term in module(stats, batch).items():
        other = module(*alone)[key]
        assert term.count == other.count
        torch.testing.assert_close(term.total, other.total)
        (gradient,) = torch.autograd.grad(
            term.total, batch.scores if key == "value" else stats.logprob, retain_graph=True
        )
        assert gradient.isfinite().all()
        assert (gradient[~known] == 0).all()


@pytest.mark.parametrize("name", MODULES)
def test_empty_batch_counts_nothing(name):
    stats, batch = rollout_batch(lengths=[])
    for term in MODULES[name](stats, batch).values():
        assert term.count == 0
        assert term.total == 0


def test_fresh_samples_need_no_old_logprobs():
    stats, batch = rollout_batch()
    fresh = replace(batch, old_logprob=None)
    (gradient,) = torch.autograd.grad(GRPOLoss(norm="token")(stats, fresh)["policy"].total, stats.logprob)
    torch.testing.assert_close(gradient, -batch.advantages)
    (gradient,) = torch.autograd.grad(RLOOLoss()(stats, fresh)["policy"].total, stats.logprob)
    torch.testing.assert_close(gradient, -batch.advantages)


def test_mistakes_are_told():
    stats, batch = rollout_batch()
    for module, changes, message in (
        (GRPOLoss(), {"advantages": None}, "no advantages"),
        (GRPOLoss(beta=0.1), {"reference_logprob": None}, "no reference_logprob"),
        (PPOLoss(), {"scores": None}, "no scores"),
    ):
        with pytest.raises(UserError, match=message):
            module(stats, replace(batch, **changes))
    with pytest.raises(UserError, match="k1 has no gradient"):
        GRPOLoss(beta=0.1, kl="k1")
    with pytest.raises(UserError, match="most tokens"):
        GRPOLoss(norm="constant")


# TRL


def trl_trainer(kind, **args):
    """A trainer with what its loss reads and nothing of a training run; it takes our log-probs as the model's."""
    trl = pytest.importorskip("trl", reason="TRL's trainers are the oracles")
    trainer = object.__new__(getattr(trl, kind))
    trainer.accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    trainer.model = SimpleNamespace(training=False)
    trainer.args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    trainer._metrics = {"eval": defaultdict(list)}
    settings = {
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "max_completion_length": 9,
        **args,
    }
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer._get_per_token_logps_and_entropies = lambda model, *rest, **more: (model, torch.zeros_like(model), None)
    return trainer


def padded(values, batch, fill):
    """(S, T) rows of flat (N,) values."""
    rows = [values[batch.sequence_ids == s] for s in range(len(LENGTHS))]
    return torch.stack([torch.nn.functional.pad(row, (0, WIDTH - row.shape[0]), value=fill) for row in rows])


def trl_inputs(batch):
    mask = padded(torch.ones(batch.targets.shape[0]), batch, 0.0).long()
    per_sequence = torch.stack([batch.advantages[batch.sequence_ids == s][0] for s in range(len(LENGTHS))])
    old = padded(batch.old_logprob, batch, -1.0)
    return {
        "prompt_ids": torch.ones((len(LENGTHS), 1), dtype=torch.long),
        "prompt_mask": torch.ones((len(LENGTHS), 1), dtype=torch.long),
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": per_sequence,
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "ref_per_token_logps": padded(batch.reference_logprob, batch, -1.0),
        "num_items_in_batch": mask.sum(),
    }


@pytest.mark.peer
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("loss_type", "norm", "length"),
    [("grpo", "sequence", None), ("dapo", "token", None), ("dr_grpo", "constant", 9)],
)
def test_grpo_equals_trl(loss_type, norm, length, beta):
    stats, batch = rollout_batch(dtype=torch.float32)
    trainer = trl_trainer("GRPOTrainer", loss_type=loss_type, beta=beta)
    theirs = trainer._compute_loss(padded(stats.logprob, batch, -1.0), trl_inputs(batch))
    ours = mean_loss(GRPOLoss(norm=norm, length=length, clip_high=0.28, beta=beta, kl="k3")(stats, batch))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x, stats.logprob)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.peer
def test_rloo_equals_trl():
    stats, batch = rollout_batch(dtype=torch.float32)
    trainer = trl_trainer("RLOOTrainer")
    theirs = trainer._compute_loss(padded(stats.logprob, batch, -1.0), trl_inputs(batch))
    ours = mean_loss(RLOOLoss(clip_high=0.28)(stats, batch))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x, stats.logprob)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
