"""Focal loss, restricted label smoothing and the confidence penalty against formulas and peers, and what they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from calibtrain.losses.focal import (
    ConfidencePenalty,
    FocalLoss,
    LabelSmoothingLoss,
    focal_loss,
    sample_gamma,
    smoothed_nll,
)
from calibtrain.losses.terms import ANSWER, CHOSEN, REJECTED
from tests.numerics.dense import Head, Row, batch_of

ROWS = [Row(CHOSEN, [1, 2, 3, 4], prompt=1), Row(ANSWER, [5, 6], correct=1.0), Row(REJECTED, [0]), Row(CHOSEN, [7, 22])]
READ = torch.tensor([1, 2, 3, 7, 8])


def published_gammas(p, gamma):
    """The authors' loop: 5 below 0.2, 3 below 0.5, else the constructor's."""
    gammas = []
    for one in p.tolist():
        if one >= 0.5:
            gammas.append(gamma)
            continue
        for key, value in ((0.2, 5.0), (0.5, 3.0)):
            if one < key:
                gammas.append(value)
                break
    return torch.tensor(gammas, dtype=p.dtype)


@pytest.mark.parametrize("sharp", [1.0, 5.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("sample_dependent", [False, True])
def test_focal_equals_formula(gamma, sample_dependent, sharp):
    batch, head = batch_of(ROWS), Head(9, sharp=sharp)

    def dense(logits):
        logp = logits.log_softmax(1).gather(1, batch.targets[:, None])[:, 0][READ]
        p = logp.exp()
        exponent = published_gammas(p.detach(), gamma) if sample_dependent else gamma
        return (-((1 - p) ** exponent) * logp).mean()

    head.assert_equals(FocalLoss(gamma=gamma, sample_dependent=sample_dependent), batch, dense)


def test_gamma_zero_is_cross_entropy_to_the_bit():
    logprob = torch.tensor([0.0, -1e-9, -0.3, -7.0, -1e4], requires_grad=True)
    values = focal_loss(logprob, 0.0)
    assert torch.equal(values, -logprob)
    values.sum().backward()
    assert torch.equal(logprob.grad, torch.full((5,), -1.0))


def test_sample_gamma_steps():
    p = torch.tensor([1e-9, 0.1999, 0.2, 0.4999, 0.5, 0.9, 1.0], dtype=torch.float64)
    assert sample_gamma(p.log(), 2.0).tolist() == [5.0, 5.0, 3.0, 3.0, 2.0, 2.0, 2.0]
    assert sample_gamma(p.log()).tolist() == [5.0, 5.0, 3.0, 3.0, 3.0, 3.0, 3.0]


@given(st.floats(min_value=-1e4, max_value=0.0, width=32), st.sampled_from([0.0, 0.3, 1.0, 3.0, 5.0]))
def test_focal_is_finite_everywhere(point, gamma):
    for edge in (point, 0.0, -1e-30, -1e-8):
        logprob = torch.tensor([edge], requires_grad=True)
        value = focal_loss(logprob, gamma)
        value.sum().backward()
        assert value.isfinite().all()
        assert value >= 0
        assert logprob.grad.isfinite().all()


def test_the_formula_as_written_has_a_nan_gradient_at_one():
    """Why (1 - p)^gamma is taken through log(1 - p)."""
    logprob = torch.tensor([0.0], requires_grad=True)
    (-((1 - logprob.exp()) ** 0.5) * logprob).sum().backward()
    assert logprob.grad.isnan().all()


def test_focal_gradcheck():
    logprob = torch.tensor([-0.01, -0.5, -3.0], dtype=torch.float64, requires_grad=True)
    for gamma in (0.5, 2.0, torch.tensor([0.0, 3.0, 5.0], dtype=torch.float64)):
        assert torch.autograd.gradcheck(lambda x, gamma=gamma: focal_loss(x, gamma), (logprob,))


def test_focal_holds_confidence_back():
    """Over drawn labels its minimum is less sure than the truth, the more the larger gamma; with gamma 0 it is the truth."""
    q = torch.linspace(0.01, 0.99, 981, dtype=torch.float64)
    best = []
    for gamma in (0.0, 1.0, 3.0):
        expected = 0.8 * focal_loss(q.log(), gamma) + 0.2 * focal_loss((1 - q).log(), gamma)
        best.append(q[expected.argmin()].item())
    assert best[0] == pytest.approx(0.8, abs=1e-3)
    assert best[0] > best[1] > best[2] > 0.5


SET = [2, 22, 9]


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.6])
def test_smoothing_equals_soft_targets(epsilon):
    batch, head = batch_of(ROWS), Head(9, sharp=2.0)

    def dense(logits):
        onehot = torch.nn.functional.one_hot(batch.targets, logits.shape[1]).double()
        within = torch.zeros(logits.shape[1], dtype=torch.float64)
        within[SET] = 1 / len(SET)
        inside = torch.isin(batch.targets, torch.tensor(SET))[:, None]
        soft = torch.where(inside, (1 - epsilon) * onehot + epsilon * within, onehot)
        return cross_entropy(logits[READ], soft[READ])

    head.assert_equals(LabelSmoothingLoss(token_set=SET, epsilon=epsilon), batch, dense)


def test_smoothing_over_everything_is_torchs():
    batch, head = batch_of(ROWS), Head(9)
    loss = LabelSmoothingLoss(token_set=list(range(23)), epsilon=0.2)
    head.assert_equals(loss, batch, lambda z: cross_entropy(z[READ], batch.targets[READ], label_smoothing=0.2))


def test_smoothing_touches_nothing_else():
    """The smoothed gradient minus cross-entropy's is nonzero only at set targets, and there only along the set's tokens."""
    batch = batch_of(ROWS)
    logits = torch.randn(9, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    logp = logits.log_softmax(1)
    at_target = logp.gather(1, batch.targets[:, None])[:, 0]
    inside = torch.isin(batch.targets, torch.tensor(SET))
    (smoothed,) = torch.autograd.grad(
        smoothed_nll(at_target, logp[:, SET], inside, 0.3).sum(), logits, retain_graph=True
    )
    (plain,) = torch.autograd.grad(-at_target.sum(), logits)
    change = smoothed - plain
    assert change[~inside].abs().max() == 0
    others = [v for v in range(23) if v not in SET]
    assert change[inside][:, others].abs().max() < 1e-15
    assert change[inside][:, SET].abs().min() > 0.05


def test_smoothing_gradcheck():
    logprob = torch.tensor([-0.3, -2.0], dtype=torch.float64, requires_grad=True)
    others = torch.tensor([[-1.0, -2.0], [-0.1, -9.0]], dtype=torch.float64, requires_grad=True)
    inside = torch.tensor([True, False])
    assert torch.autograd.gradcheck(lambda x, y: smoothed_nll(x, y, inside, 0.2), (logprob, others))


@pytest.mark.parametrize("sharp", [1.0, 5.0])
def test_confidence_penalty_equals_formula(sharp):
    batch, head = batch_of(ROWS), Head(9, sharp=sharp)

    def dense(logits):
        return -0.4 * torch.distributions.Categorical(logits=logits[READ]).entropy().mean()

    head.assert_equals(ConfidencePenalty(weight=0.4), batch, dense)


@pytest.fixture(scope="module")
def torch_uncertainty():
    """Its classification losses, loaded as one file: the package itself also imports Lightning and torchvision."""
    spec = importlib.util.find_spec("torch_uncertainty")
    if spec is None:
        pytest.skip("torch-uncertainty is the oracle of the focal loss and the confidence penalty")
    path = Path(spec.submodule_search_locations[0]) / "losses" / "classification.py"
    file = importlib.util.spec_from_file_location("torch_uncertainty_losses", path)
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module


@pytest.mark.peer
@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0])
def test_focal_equals_torch_uncertainty(torch_uncertainty, gamma):
    batch, head = batch_of(ROWS), Head(9, sharp=3.0)
    theirs = torch_uncertainty.FocalLoss(gamma)
    loss = FocalLoss(gamma=gamma, sample_dependent=False)
    head.assert_equals(loss, batch, lambda z: theirs(z[READ], batch.targets[READ]), tolerance=1e-11)


@pytest.mark.peer
def test_confidence_penalty_equals_torch_uncertainty(torch_uncertainty):
    batch, head = batch_of(ROWS), Head(9, sharp=3.0)
    theirs = torch_uncertainty.ConfidencePenaltyLoss(reg_weight=0.4, eps=0.0)

    def dense(logits):  # less cross-entropy and the constant beta log V
        z, y = logits[READ], batch.targets[READ]
        return theirs(z, y) - cross_entropy(z, y) - 0.4 * torch.tensor(float(logits.shape[1])).log()

    head.assert_equals(ConfidencePenalty(weight=0.4), batch, dense, tolerance=1e-7)  # its constant is float32


@pytest.mark.peer
def test_confidence_penalty_is_netcals_with_the_papers_sign():
    """Their function gives -beta H, as the paper does; their module for training gives +beta H, which rewards confidence."""
    regularization = pytest.importorskip(
        "netcal.regularization", reason="netcal is an oracle of the confidence penalty"
    )
    batch, head = batch_of(ROWS), Head(9, sharp=3.0)
    theirs = regularization.ConfidencePenalty(weight=0.4, reduction="batchmean")
    head.assert_equals(ConfidencePenalty(weight=0.4), batch, lambda z: -theirs(z[READ]), tolerance=1e-9)
    value = regularization.confidence_penalty(head.logits[READ].softmax(1).detach().numpy(), 0.4)
    assert head.through_ops(ConfidencePenalty(weight=0.4), batch).item() == pytest.approx(value, abs=1e-5)
