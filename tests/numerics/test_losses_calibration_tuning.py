"""The correctness query and the divergence anchor against the authors' formulas, and what they promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy

from calibtrain.errors import UserError
from calibtrain.losses.calibration_tuning import (
    CorrectnessQueryLoss,
    DivergenceAnchor,
    correctness_query_loss,
    jensen_shannon,
    token_divergence,
)
from calibtrain.losses.terms import ANSWER, CHOSEN, QUERY
from tests.numerics.dense import NAN, Head, Row, batch_of

NO, YES = 12, 4


def rows():
    """Queries of uneven length, one without a grade, one of another loss, and sequences that are no queries."""
    return [
        Row(CHOSEN, [YES, 9]),
        Row(QUERY, [NO, 9], correct=0.0),
        Row(QUERY, [3, 3, YES, 9, 9, 9], prompt=2, correct=1.0),
        Row(ANSWER, [YES], correct=1.0),
        Row(QUERY, [NO, 9]),
        Row(QUERY, [7, YES], correct=1.0),
        Row(QUERY, [YES], correct=1.0),
    ]


WHERE, GRADES = torch.tensor([2, 6, 15]), torch.tensor([0, 1, 1])


@pytest.mark.parametrize("sharp", [1.0, 8.0])
def test_query_equals_the_authors_cross_entropy(sharp):
    head = Head(16, sharp=sharp)
    loss = CorrectnessQueryLoss(token_set=[NO, YES], weight=0.5)
    head.assert_equals(loss, batch_of(rows()), lambda z: 0.5 * cross_entropy(z[WHERE][:, [NO, YES]], GRADES))


def test_query_reads_only_its_places():
    """Not the last position of each row, as a padded batch would have it."""
    head, loss = Head(16), CorrectnessQueryLoss(token_set=[NO, YES])
    hidden, _ = head.gradients(head.through_ops(loss, batch_of(rows())))
    assert hidden.abs().sum(1).nonzero().flatten().tolist() == WHERE.tolist()
    assert int(loss.counts(batch_of(rows()))["correctness_query"]) == 3


def test_queries_weigh_the_same_in_any_batch():
    """One query beside two: the mean over all three, not of two means (what mean reductions of micro-batches give)."""
    head, loss = Head(16), CorrectnessQueryLoss(token_set=[NO, YES])
    whole = head.through_ops(loss, batch_of(rows()))
    parts = []
    for start, stop, first, last in ((0, 2, 0, 4), (2, 7, 4, 16)):
        part = Head(16)
        part.hidden = part.hidden.detach()[first:last].requires_grad_()
        batch = batch_of(rows()[start:stop])
        count = int(loss.counts(batch)["correctness_query"])
        parts.append((part.through_ops(loss, batch) * count, count))
    assert [count for _, count in parts] == [1, 2]
    torch.testing.assert_close(sum(total for total, _ in parts) / 3, whole)
    assert abs(sum(total / count for total, count in parts) / 2 - whole) > 1e-3


@pytest.mark.parametrize("truth", [0.1, 0.35, 0.8])
def test_query_is_proper(truth):
    grades = (torch.rand(1000, generator=torch.Generator().manual_seed(0)) < truth).double()
    q = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    logits = torch.stack([(1 - q).log(), q.log()], dim=1)
    means = torch.stack([correctness_query_loss(one.expand(len(grades), 2), grades).mean() for one in logits])
    assert abs(q[means.argmin()] - grades.mean()) <= 0.005
    assert abs(grades.mean() - truth) < 0.05


def test_query_gradcheck_soft_grades_and_edges():
    logits = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grades = torch.tensor([0.0, 1.0, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: correctness_query_loss(x, grades), (logits,))
    soft = torch.stack([1 - grades, grades], dim=1)
    torch.testing.assert_close(correctness_query_loss(logits, grades).mean(), cross_entropy(logits, soft))
    edge = torch.tensor([[0.0, -1e4], [-1e4, 0.0]], requires_grad=True)
    values = correctness_query_loss(edge, torch.tensor([1.0, 1.0]))
    values.sum().backward()
    assert values.tolist() == [1e4, 0.0]
    assert edge.grad.isfinite().all()
    for wrong in ([1], [1, 1], [1, 2, 3]):
        with pytest.raises(UserError, match="two distinct"):
            CorrectnessQueryLoss(token_set=wrong)


def published_jsd(logits, reference):
    p, r = Categorical(probs=logits.softmax(-1)), Categorical(probs=reference.softmax(-1))
    mix = Categorical(probs=(p.probs + r.probs) / 2)
    return (kl_divergence(p, mix) + kl_divergence(r, mix)) / 2


@pytest.mark.parametrize("sharp", [1.0, 6.0])
def test_jensen_shannon_equals_the_authors(sharp):
    generator = torch.Generator().manual_seed(0)
    logits, reference = (sharp * torch.randn(5, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    ours = jensen_shannon(logits.log_softmax(-1), reference.log_softmax(-1))
    theirs = published_jsd(logits, reference)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    gradients = [torch.autograd.grad(one.sum(), logits)[0] for one in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)  # Categorical clamps probabilities


def test_jensen_shannon_bounds():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log().requires_grad_()
    r = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).log()
    value = jensen_shannon(p, r)
    torch.testing.assert_close(value, torch.tensor([0.0, math.log(2.0)]))


def test_token_divergence_is_a_lower_bound_of_the_whole():
    """Telling one token from the rest cannot show more than all of them do, and shows all of it for two tokens."""
    generator = torch.Generator().manual_seed(2)
    for vocabulary in (2, 3, 50):
        logits, reference = (2 * torch.randn(30, vocabulary, generator=generator).double() for _ in range(2))
        tokens = torch.randint(vocabulary, (30, 1), generator=generator)
        whole = jensen_shannon(logits.log_softmax(-1), reference.log_softmax(-1))
        one = token_divergence(*(z.log_softmax(-1).gather(1, tokens)[:, 0] for z in (logits, reference)))
        assert (one <= whole + 1e-12).all()
        assert one.min() > 0
        if vocabulary == 2:
            torch.testing.assert_close(one, whole)


@given(st.floats(-1e4, 0.0, width=32), st.floats(-1e4, 0.0, width=32))
def test_token_divergence_is_finite_everywhere(p, r):
    logprob = torch.tensor([p], requires_grad=True)
    value = token_divergence(logprob, torch.tensor([r]))
    value.sum().backward()
    assert -1e-6 <= value.item() <= math.log(2.0) + 1e-6
    assert logprob.grad.isfinite().all()


def test_token_divergence_gradcheck_and_minimum():
    reference = torch.tensor([-0.2, -1.0, -4.0], dtype=torch.float64)
    logprob = torch.tensor([-0.3, -0.5, -4.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: token_divergence(x, reference), (logprob,))
    same = reference.clone().requires_grad_()
    value = token_divergence(same, reference)
    value.sum().backward()
    assert value.abs().max() < 1e-15
    assert same.grad.abs().max() < 1e-12


def anchored_batch():
    known = torch.tensor([NAN, -0.5, -1.5, NAN, -2.0, -0.1, NAN])
    return batch_of([Row(CHOSEN, [1, 2, 3], prompt=1), Row(ANSWER, [4], correct=1.0), Row(ANSWER, [5, 6, 7])], known)


def test_anchor_sums_over_tokens_and_averages_over_sequences():
    batch, head = anchored_batch(), Head(7)

    def dense(logits):
        where = torch.tensor([1, 2, 4, 5])
        p = logits.softmax(-1).gather(1, batch.targets[:, None])[:, 0][where]
        r = batch.reference_logprob[where].double().exp()
        two = [Categorical(probs=torch.stack([one, 1 - one], 1)) for one in (p, r)]
        mix = Categorical(probs=(two[0].probs + two[1].probs) / 2)
        each = (kl_divergence(two[0], mix) + kl_divergence(two[1], mix)) / 2
        return 3.0 * each.sum() / 2  # two sequences have reference log-probs

    head.assert_equals(DivergenceAnchor(weight=3.0), batch, dense)


def test_anchor_without_references_is_zero():
    batch, head = batch_of([Row(CHOSEN, [1, 2])]), Head(2)
    loss = DivergenceAnchor()
    assert int(loss.counts(batch)["divergence_anchor"]) == 0
    value = head.through_ops(loss, batch)
    assert value == 0
    assert all(one.abs().max() == 0 for one in head.gradients(value))
