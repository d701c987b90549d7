"""The [IDK] loss against the authors' trainer written out over all logits, and where we part from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibtrain.errors import UserError
from calibtrain.losses.idk import IDKLoss, idk_loss, idk_weight
from calibtrain.losses.terms import ANSWER, CHOSEN
from tests.numerics.dense import Head, Row, batch_of

IDK = 19
TARGETS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def published(logits, targets, *, regularize, detached):
    """The adaptive schedule of the authors' trainer, with one-hot targets over the vocabulary."""
    p = logits.softmax(-1)
    onehot = torch.nn.functional.one_hot(targets, logits.shape[1]).double()
    wrong = logits.argmax(-1) != targets
    share = 0.2 * (1 - p.gather(1, targets[:, None])[:, 0] / p.max(-1).values)
    share = share.detach() if detached else share
    moved = (
        onehot * (1 - share[:, None]) + torch.nn.functional.one_hot(torch.tensor(IDK), logits.shape[1]) * share[:, None]
    )
    losses = -(logits.log_softmax(-1) * torch.where(wrong[:, None], moved, onehot)).sum(-1)
    if regularize:
        losses = losses + torch.where(wrong, 0.0, -torch.log1p(-p[:, IDK]))
    return losses.mean()


def right_and_wrong():
    """Twelve positions, half of whose targets are made the likeliest token."""
    head = Head(len(TARGETS), sharp=1.5)
    targets = list(TARGETS)
    with torch.no_grad():
        for row in range(0, len(TARGETS), 2):
            top = int(head.logits[row].argmax())
            targets[row] = top if top != IDK else targets[row]
    assert 2 < sum(t == int(z.argmax()) for t, z in zip(targets, head.logits, strict=True)) < 10
    return head, torch.tensor(targets)


@pytest.mark.parametrize("regularize", [False, True])
def test_equals_the_authors_formula_with_its_weight_detached(regularize):
    head, targets = right_and_wrong()
    batch = batch_of([Row(CHOSEN, targets.tolist())])
    head.assert_equals(
        IDKLoss(token_set=[IDK], regularize=regularize),
        batch,
        lambda z: published(z, targets, regularize=regularize, detached=True),
    )


def test_the_weight_carries_no_gradient():
    """As published it does, and the model can lower its loss through the weight: the gradients differ, the values do not."""
    head, targets = right_and_wrong()
    batch = batch_of([Row(CHOSEN, targets.tolist())])
    ours = head.through_ops(IDKLoss(token_set=[IDK], regularize=False), batch)
    theirs = published(head.logits, targets, regularize=False, detached=False)
    torch.testing.assert_close(ours, theirs)
    gap = head.gradients(ours)[0] - head.gradients(theirs)[0]
    assert gap.abs().max() > 1e-3
    logprob = torch.tensor([-3.0], requires_grad=True)
    assert not idk_weight(logprob, torch.tensor([0.5], requires_grad=True)).requires_grad


def test_weight_grows_from_zero_to_its_scale():
    confidence = torch.full((4,), 0.5)
    logprob = torch.tensor([0.5, 0.25, 1e-3, 0.0]).log()
    torch.testing.assert_close(idk_weight(logprob, confidence, 0.4), torch.tensor([0.0, 0.2, 0.4 * 0.998, 0.4]))


def test_scale_is_used():
    """The public code fixes the adaptive weight at 0.2 whatever its argument says."""
    head, targets = right_and_wrong()
    batch = batch_of([Row(CHOSEN, targets.tolist())])
    values = [head.through_ops(IDKLoss(token_set=[IDK], scale=scale), batch).item() for scale in (0.0, 0.2, 0.4)]
    assert len(set(values)) == 3
    none = head.through_ops(IDKLoss(token_set=[IDK], scale=0.0, regularize=False), batch)
    torch.testing.assert_close(none, torch.nn.functional.cross_entropy(head.logits, targets))


def test_where_idk_is_the_target_it_stays_likely():
    head = Head(1)
    with torch.no_grad():
        head.hidden[0] = head.weight[IDK] * 3
    batch = batch_of([Row(CHOSEN, [IDK])])
    with_it, without = (
        head.through_ops(IDKLoss(token_set=[IDK], regularize=flag), batch).item() for flag in (True, False)
    )
    assert with_it == without < 0.1


def test_descent_moves_wrong_mass_to_idk():
    """A question that the model cannot know: gold tokens drawn anew. [IDK] ends with the share that the loss gives it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(21, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        gold = torch.randint(0, 10, (64,), generator=generator)
        logp = logits.log_softmax(0)
        top = logp.exp().max().detach().expand(64)
        correct = gold == logp.argmax()
        loss = idk_loss(logp[gold], logp[20].expand(64), top, correct, scale=0.9, regularized=True).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    p = logits.softmax(0)
    assert p[20] > 0.3  # above any gold token, at 0.1 or less
    assert p[10:20].sum() < 0.01


@given(st.floats(-1e4, 0.0, width=32), st.floats(-1e4, 0.0, width=32), st.booleans(), st.booleans())
def test_finite_everywhere(gold, idk, correct, regularized):
    leaves = [torch.tensor([one], requires_grad=True) for one in (gold, idk)]
    confidence = torch.tensor([max(gold, -10.0)]).exp()
    value = idk_loss(*leaves, confidence, torch.tensor([correct]), regularized=regularized)
    value.sum().backward()
    assert value.isfinite().all()
    assert value >= 0
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_gradcheck():
    gold = torch.tensor([-0.3, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    idk = torch.tensor([-3.0, -0.5, -2.0], dtype=torch.float64, requires_grad=True)
    top, correct = torch.tensor([0.8, 0.6, 0.5], dtype=torch.float64), torch.tensor([True, False, False])
    # The weight is a constant of the gradient, so its numbers must not move with the differences.
    share = torch.where(correct, 0.0, idk_weight(gold, top))
    (ours,) = torch.autograd.grad(idk_loss(gold, idk, top, correct).sum(), gold)
    torch.testing.assert_close(ours, -(1 - share))
    assert torch.autograd.gradcheck(
        lambda x: idk_loss(gold.detach(), x, top, correct, regularized=torch.tensor([True, True, False])), (idk,)
    )


def test_other_roles_and_options():
    batch = batch_of([Row(ANSWER, [1, 2], correct=1.0), Row(CHOSEN, [3, 4], prompt=1)])
    assert int(IDKLoss(token_set=[IDK]).counts(batch)["idk"]) == 1
    assert int(IDKLoss(token_set=[IDK], nll_scope="full").counts(batch)["idk"]) == 2
    for wrong in ({"token_set": [1, 2]}, {"token_set": [1], "scale": 1.5}):
        with pytest.raises(UserError, match="token_set must be one token"):
            IDKLoss(**wrong)
