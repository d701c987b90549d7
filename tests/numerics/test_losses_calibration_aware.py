"""The isotonic fit against scikit-learn, the score against its formula, and what the regulariser does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from calibtrain.losses.calibration_aware import (
    CalibrationAwareLoss,
    calibration_aware_score,
    held_out_target,
    isotonic_fit,
)
from calibtrain.losses.terms import ANSWER, CHOSEN
from calibtrain.ops import TokenStats
from tests.numerics.dense import Head, Row, batch_of


def held_out(count=300, seed=0, over=0.25):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(count, generator=generator, dtype=torch.float64)
    return confidence, (torch.rand(count, generator=generator) < confidence - over).double()


points = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=12)


@given(points)
def test_fit_equals_scikit_learn(sample):
    confidence, correct = (torch.tensor([float(one[i]) for one in sample], dtype=torch.float64) for i in (0, 1))
    model = IsotonicRegression(out_of_bounds="clip").fit(confidence.numpy(), correct.numpy())
    everywhere = torch.linspace(-0.0, 1.0, 41, dtype=torch.float64)
    ours = held_out_target(everywhere, *isotonic_fit(confidence, correct))
    torch.testing.assert_close(ours, torch.from_numpy(model.predict(everywhere.numpy())), rtol=0, atol=1e-12)


def test_fit_of_a_larger_sample():
    confidence, correct = held_out()
    model = IsotonicRegression(out_of_bounds="clip").fit(confidence.numpy(), correct.numpy())
    knots, accuracy = isotonic_fit(confidence, correct)
    torch.testing.assert_close(accuracy, torch.from_numpy(model.predict(knots.numpy())), rtol=0, atol=1e-12)
    assert (accuracy.diff() >= 0).all()


def rows():
    return [
        Row(CHOSEN, [1, 2]),
        Row(ANSWER, [3, 4, 5], prompt=1),
        Row(ANSWER, [6], correct=0.0),
        Row(ANSWER, [7], prompt=1),
    ]


def test_loss_equals_formula():
    head, batch = Head(7), batch_of(rows())
    loss = CalibrationAwareLoss(weight=2.0)
    loss.fit(*held_out(over=0.0))
    knots, accuracy = (one.numpy() for one in loss.knots)
    model = IsotonicRegression(out_of_bounds="clip").fit(knots, accuracy)

    def dense(logits):
        p = logits.softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        q = torch.stack([p[3] * p[4], p[5]])
        target = torch.from_numpy(model.predict(q.detach().numpy()))
        return 2.0 * (q - target).square().mean()

    head.assert_equals(loss, batch, dense)


def test_no_gradient_through_the_target():
    q = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    target = held_out_target(q, *isotonic_fit(*held_out()))
    assert not target.requires_grad
    calibration_aware_score(q, target).sum().backward()
    torch.testing.assert_close(q.grad, 2 * (q.detach() - target))
    assert torch.autograd.gradcheck(lambda x: calibration_aware_score(x, target), (q,))


def test_before_the_first_fit_it_is_zero():
    head, loss = Head(7), CalibrationAwareLoss()
    loss.fit(torch.zeros(0), torch.zeros(0))  # an empty round of answers
    value = head.through_ops(loss, batch_of(rows()))
    assert value == 0
    assert all(one.abs().max() == 0 for one in head.gradients(value))
    assert int(loss.counts(batch_of(rows()))["calibration_aware"]) == 2


@pytest.mark.parametrize("fitted", [False, True])
def test_state_goes_through_a_checkpoint(fitted):
    loss, fresh = CalibrationAwareLoss(), CalibrationAwareLoss()
    if fitted:
        loss.fit(*held_out())
    fresh.load_state_dict(loss.state_dict())
    assert (fresh.knots is None) is not fitted
    if fitted:
        assert all(torch.equal(*pair) for pair in zip(fresh.knots, loss.knots, strict=True))


@pytest.mark.parametrize("logprob", [0.0, -1e-9, -50.0, -1e4])
def test_edges_are_finite(logprob):
    loss = CalibrationAwareLoss()
    loss.fit(torch.tensor([0.2]), torch.tensor([1.0]))  # a single knot
    leaf = torch.full((1,), logprob, requires_grad=True)
    zeros = torch.zeros(1)
    (term,) = loss(TokenStats(leaf, zeros, zeros, zeros, zeros > 0), batch_of([Row(ANSWER, [0])])).values()
    term.total.backward()
    assert term.total.item() == pytest.approx((math.exp(logprob) - 1.0) ** 2)
    assert leaf.grad.isfinite().all()


def test_overconfidence_goes_away_with_fresh_fits():
    """Confidences of an overconfident model, fitted anew every 10 steps, come to their accuracies; their order stays."""
    truth = torch.linspace(0.1, 0.8, 50, dtype=torch.float64)
    logits = torch.logit(truth + 0.1).requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=50.0)
    loss, batch, zeros = CalibrationAwareLoss(), batch_of([Row(ANSWER, [0])] * 50), torch.zeros(50)
    for step in range(100):
        if step % 10 == 0:
            loss.fit(logits.sigmoid(), truth)  # so many held-out answers that their shares are the accuracies
        stats = TokenStats(torch.nn.functional.logsigmoid(logits), zeros, zeros, zeros, zeros > 0)
        optimizer.zero_grad()
        (loss(stats, batch)["calibration_aware"].total / 50).backward()
        optimizer.step()
    assert (logits.sigmoid() - truth).abs().max() < 0.01  # 0.1 before
    assert (logits.diff() > 0).all()
