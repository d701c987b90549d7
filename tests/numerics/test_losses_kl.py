"""KL estimators against the exact divergence of two categorical distributions, and their gradients against its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from calibtrain.losses.calibration_tuning import token_divergence
from calibtrain.losses.kl import KL_ESTIMATORS, kl_k1, kl_k2, kl_k3, kl_straight_through, tangent_exp

K = 6


@pytest.fixture
def policies():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(K, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(K, generator=generator, dtype=torch.float64).log_softmax(0)
    return logits, reference


def reference_formulas(d):
    k1, k2, k3 = d, d * d / 2, math.exp(-d) - 1 + d
    return {"k1": k1, "k2": k2, "k3": k3, "k3+": k3}


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@pytest.mark.parametrize("d", [-15.0, -1.5, -1.0, -0.3, 0.0, 0.3, 4.0, 700.0])
def test_value_is_the_formula(name, d):
    actual = KL_ESTIMATORS[name](torch.tensor([d], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert actual.item() == pytest.approx(reference_formulas(d)[name], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("divergence", [*KL_ESTIMATORS.values(), token_divergence])
def test_the_reference_is_data(divergence):
    """Also where it comes from weights that are trained, such as those below an adapter."""
    logprob, reference = torch.tensor([[-1.0, -2.0], [-1.5, -0.5]], dtype=torch.float64, requires_grad=True).unbind(0)
    gradients = torch.autograd.grad(divergence(logprob, reference).sum(), (logprob, reference), allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert gradients[1] is None


def test_k3_keeps_its_digits_near_the_reference():
    """exp(-d) - 1 + d loses them all in float32 where training starts."""
    reference = torch.tensor([0.0])
    assert kl_k3(torch.tensor([1e-3]), reference).item() == pytest.approx(4.998e-7, rel=1e-2)
    assert (kl_k3(torch.linspace(-1e-3, 1e-3, 1001), reference) >= -1e-10).all()


def gradient_of_mean(estimator, logits, reference, draws=None):
    """Gradient of the estimator's mean as a trainer takes it: the samples are data, each is differentiated through."""
    logprob = logits.log_softmax(0)
    if draws is None:
        weights = logprob.exp().detach()
        return torch.autograd.grad((weights * estimator(logprob, reference)).sum(), logits)[0]
    return torch.autograd.grad(estimator(logprob[draws], reference[draws]).mean(), logits)[0]


def test_means_and_gradients_by_enumeration(policies):
    logits, reference = policies
    p = logits.log_softmax(0).exp()
    kl = (p * (p.log() - reference)).sum()
    (kl_gradient,) = torch.autograd.grad(kl, logits)
    other = (reference.exp() * (reference - logits.log_softmax(0))).sum()  # KL(reference || policy)
    (other_gradient,) = torch.autograd.grad(other, logits)
    means = {name: (p * f(p.log(), reference)).sum().item() for name, f in KL_ESTIMATORS.items()}
    for name in ("k1", "k3", "k3+"):
        assert means[name] == pytest.approx(kl.item(), abs=1e-12)
    assert abs(means["k2"] - kl.item()) > 0.01  # biased, and only in value
    for name, expected in (
        ("k1", torch.zeros(K).double()),
        ("k2", kl_gradient),
        ("k3", other_gradient),
        ("k3+", kl_gradient),
    ):
        gradient = gradient_of_mean(KL_ESTIMATORS[name], logits, reference)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert (kl_gradient - other_gradient).abs().max() > 0.01


def test_means_and_gradients_by_simulation(policies):
    """Within three standard errors of the truth at 10,000 draws from the policy."""
    logits, reference = policies
    p = logits.log_softmax(0).exp().detach()
    draws = torch.multinomial(p, 10_000, replacement=True, generator=torch.Generator().manual_seed(1))
    kl = (p * (p.log() - reference)).sum().item()
    for name in ("k1", "k3", "k3+"):
        values = KL_ESTIMATORS[name](p.log()[draws], reference[draws])
        assert abs(values.mean().item() - kl) < 3 * values.std().item() / 100
    for name in ("k2", "k3+"):
        sampled = gradient_of_mean(KL_ESTIMATORS[name], logits, reference, draws)
        exact = gradient_of_mean(kl_k2, logits, reference)
        d = (p.log() - reference)[draws]
        scores = torch.nn.functional.one_hot(draws, K) - p
        error = (d[:, None] * scores).std(0) / 100
        assert ((sampled - exact).abs() < 3 * error).all()


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_gradcheck(name):
    logprob = torch.tensor([-5.0, -1.0, -0.1, -30.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -5.0, -0.2, -1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: KL_ESTIMATORS[name](x, reference), (logprob,))


def test_straight_through_is_k3_forward_and_k2_backward():
    logprob = torch.linspace(-8, -0.01, 50, requires_grad=True)
    reference = torch.full((50,), -3.0)
    through = kl_straight_through(logprob, reference)
    assert through.equal(kl_k3(logprob, reference))
    ours, k2 = (torch.autograd.grad(x.sum(), logprob)[0] for x in (through, kl_k2(logprob, reference)))
    assert ours.equal(k2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_finite_and_push_the_right_way(dtype):
    """A clamped exponent would leave the gradient of +d: down, where the policy should go up to its reference."""
    logprob = torch.tensor([-1e4, -500.0, -40.0, -1.0, 0.0], dtype=dtype, requires_grad=True)
    reference = torch.tensor([0.0, -1.0, -1.0, -1.0, -1e4], dtype=dtype)
    for name, estimator in KL_ESTIMATORS.items():
        values = estimator(logprob, reference)
        (gradient,) = torch.autograd.grad(values.sum(), logprob)
        assert values.isfinite().all()
        assert gradient.isfinite().all()
        if name != "k1":
            assert (values >= 0).all()
            assert (gradient[:3] < 0).all()
            assert gradient[4] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tangent_exp_has_the_gradient_of_exp(dtype):
    x = torch.linspace(-30, 19.9, 200, dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(tangent_exp(x).sum(), x)
    torch.testing.assert_close(slope, x.detach().exp())


def test_tangent_exp_joins_smoothly():
    x = torch.tensor([19.999, 20.0, 20.001, 25.0], dtype=torch.float64, requires_grad=True)
    y = tangent_exp(x)
    assert y[3].item() == pytest.approx(math.exp(20) * 6)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, torch.tensor([math.exp(19.999), *[math.exp(20)] * 3]).double())
    assert torch.autograd.gradcheck(tangent_exp, (torch.tensor([-3.0, 0.0, 19.0, 22.0]).double().requires_grad_(),))


def test_k1_has_both_signs():
    assert kl_k1(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0])).tolist() == [1.0, -1.0]
