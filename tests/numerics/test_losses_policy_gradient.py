"""PPO, RLOO and GRPO against written-out formulas; batches cut up at will."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibtrain.errors import UserError
from calibtrain.losses import ANSWER, CHOSEN, policy_gradient
from calibtrain.losses.kl import KL_ESTIMATORS
from calibtrain.losses.policy_gradient import (
    GRPOLoss,
    PPOLoss,
    RLOOLoss,
    clipped_policy_loss,
    clipped_value_loss,
    token_norm_sum,
)
from calibtrain.losses.terms import mean_loss
from calibtrain.ops import TokenStats
from tests.unit.losses.batches import Example, make_batch

LENGTHS = [3, 1, 5, 2, 4, 4]


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


def test_dual_clip_bounds_what_is_blamed():
    lp, old, a = 2 * torch.randn(3, 300, dtype=torch.float64)
    expected = []
    for new, before, advantage in zip(lp.tolist(), old.tolist(), a.tolist(), strict=True):
        loss = clipped(new, before, advantage)
        expected.append(min(loss, -3.0 * advantage) if advantage < 0 else loss)
    found = clipped_policy_loss(lp, old, a, dual_clip=3.0)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert (found < clipped_policy_loss(lp, old, a)).any()
    x = torch.tensor([-0.1, -0.4, -3.0], dtype=torch.float64, requires_grad=True)
    before, credit = torch.tensor([-0.15, -3.0, -0.5]).double(), torch.tensor([-1.0, -2.0, -1.0]).double()
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, before, credit, dual_clip=3.0), (x,))
    with pytest.raises(UserError, match="dual_clip"):
        GRPOLoss(clip_high=0.5, dual_clip=1.4)


def test_an_earlier_policys_samples_give_the_kl_of_the_present_one():
    """Over all tokens that the earlier one may draw: k3+ weighted by its ratio has the value and the gradient of the KL."""
    generator = torch.Generator().manual_seed(4)
    logits, old, reference = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logprob, old, reference = logits.log_softmax(0), old.log_softmax(0), reference.log_softmax(0)
    exact = (logprob.exp() * (logprob - reference)).sum()
    _, batch = rollout_batch(lengths=[12])
    batch = replace(batch, old_logprob=old, reference_logprob=reference)
    each = policy_gradient._kl(TokenStats(logprob, *[logprob.detach()] * 4), batch, "k3+")
    mean = (old.exp() * each).sum()
    assert mean.item() == pytest.approx(exact.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mean, exact)))
    unweighted = (old.exp() * KL_ESTIMATORS["k3+"](logprob, reference)).sum()
    assert (
        torch.autograd.grad(unweighted, logits, retain_graph=True)[0] - torch.autograd.grad(exact, logits)[0]
    ).abs().max() > 0.01


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
