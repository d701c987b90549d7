"""DPO, IPO, SimPO and KTO: their formulas in high precision, and where training with them ends on answers known exactly."""

from __future__ import annotations

import math
from functools import partial

import mpmath
import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.losses import (
    DPOLoss,
    IPOLoss,
    KTOLoss,
    SimPOLoss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    simpo_loss,
)

EDGES = [-1e4, -300.0, -1.0, -1e-7, 0.0, 0.5, 300.0, 1e4]
FINITE = {
    "dpo": partial(dpo_loss, beta=0.3),
    "cdpo": partial(dpo_loss, beta=0.3, label_smoothing=0.2),
    "ipo": partial(ipo_loss, beta=0.3),
    "simpo": partial(simpo_loss, beta=2.5, gamma=1.2),
    "simpo_smoothed": partial(simpo_loss, beta=2.5, gamma=1.2, label_smoothing=0.2),
    "kto": lambda h, z: kto_loss(h, h < 0.1, z, beta=0.3, desirable_weight=1.3, undesirable_weight=0.7),
}


def log_sigmoid(x):
    return -mpmath.log(1 + mpmath.exp(-mpmath.mpf(x)))


def logistic(margin, e):
    return -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin)


def formula(name, a, b):
    """Each loss of one pair of edges, as its paper writes it."""
    e = 0.2 if name in ("cdpo", "simpo_smoothed") else 0.0
    a, b = mpmath.mpf(a), mpmath.mpf(b)
    if name in ("dpo", "cdpo"):
        return logistic(mpmath.mpf(0.3) * (a - b), e)
    if name == "ipo":
        return (a - b - 1 / (2 * mpmath.mpf(0.3))) ** 2
    if name == "kto":
        value = 1 / (1 + mpmath.exp(-mpmath.mpf(0.3) * (a - b if a < 0.1 else b - a)))
        return mpmath.mpf(1.3 if a < 0.1 else 0.7) * (1 - value)
    return logistic(mpmath.mpf(2.5) * (a - b) - mpmath.mpf(1.2), e)


@pytest.mark.parametrize("name", FINITE)
def test_formula_and_finite_at_every_edge(name):
    a, b = (
        torch.tensor(EDGES, dtype=torch.float64)[i].requires_grad_()
        for i in torch.cartesian_prod(*[torch.arange(8)] * 2).t()
    )
    losses = FINITE[name](a, b)
    with mpmath.workdps(60):
        expected = [float(formula(name, x, y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)
    losses.sum().backward()
    assert all(one.isfinite().all() for one in (losses, a.grad, b.grad))


@pytest.mark.parametrize("name", FINITE)
def test_gradcheck(name):
    a, b = torch.randn(2, 9, dtype=torch.float64).unbind()
    if name == "kto":
        a = a + 0.2 * a.sign()  # away from where the label turns
    assert torch.autograd.gradcheck(FINITE[name], (a.requires_grad_(), b.requires_grad_()))


def test_reference_point_is_a_number_without_gradient_and_never_negative():
    ratios = torch.tensor([1.0, -0.5, 2.5], requires_grad=True)
    assert kto_reference_point(ratios) == 1.0
    assert not kto_reference_point(ratios).requires_grad
    assert kto_reference_point(-ratios) == 0.0


# Where training ends: a policy over three answers of 1, 2 and 5 tokens, whose preferences are known exactly.

REWARDS = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
LENGTHS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
BRADLEY_TERRY = torch.sigmoid(REWARDS[:, None] - REWARDS)  # [i, j]: that i is preferred to j


def end_of_training(loss, preferred=BRADLEY_TERRY):
    """Log-probs (3,) that make the expected loss of a pair of different answers least; `loss` takes log pi of both sides."""
    logits = torch.tensor([0.4, 0.1, -0.3], dtype=torch.float64, requires_grad=True)
    first, second = (one.flatten() for one in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
    weight = preferred.flatten() * (first != second)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=300, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        logprob = logits.log_softmax(0)
        total = (weight * loss(logprob, first, second)).sum()
        total.backward()
        return total

    optimiser.step(closure)
    return logits.detach().log_softmax(0)


def against_reference(loss):
    return lambda logprob, first, second: loss((logprob - REFERENCE)[first], (logprob - REFERENCE)[second])


def by_length(loss):
    return lambda logprob, first, second: loss((logprob / LENGTHS)[first], (logprob / LENGTHS)[second])


def test_dpo_ends_at_the_reference_tilted_by_the_reward():
    end = end_of_training(against_reference(partial(dpo_loss, beta=0.4)))
    torch.testing.assert_close(end, (REFERENCE + REWARDS / 0.4).log_softmax(0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_smoothed_dpo_of_certain_preferences_ends_where_the_noise_says(smoothing):
    """Two answers, one always preferred: the margin is the log odds of a preference that is right 1 - e of the time."""
    certain = torch.zeros(3, 3, dtype=torch.float64)
    certain[0, 1] = 1.0
    end = end_of_training(against_reference(partial(dpo_loss, beta=0.4, label_smoothing=smoothing)), certain)
    margin = (end - REFERENCE)[0] - (end - REFERENCE)[1]
    assert 0.4 * margin.item() == pytest.approx(math.log((1 - smoothing) / smoothing), abs=1e-6)


def test_dpo_of_certain_preferences_never_ends_and_ipo_does():
    margin = torch.tensor([3.0, 30.0, 300.0], dtype=torch.float64, requires_grad=True)
    dpo_loss(margin, torch.zeros(3), beta=0.4).sum().backward()
    assert (margin.grad < 0).all()  # surer at every margin
    certain = torch.zeros(3, 3, dtype=torch.float64)
    certain[2, 1] = 1.0
    end = end_of_training(against_reference(partial(ipo_loss, beta=0.4)), certain)
    assert ((end - REFERENCE)[2] - (end - REFERENCE)[1]).item() == pytest.approx(1 / (2 * 0.4), abs=1e-7)


def test_ipo_ends_at_the_reference_tilted_by_the_probability_of_winning():
    """pi = pi_ref exp(p / tau): p is the mean over all three opponents, one's own self among them."""
    end = end_of_training(against_reference(partial(ipo_loss, beta=0.4)))
    torch.testing.assert_close(end, (REFERENCE + BRADLEY_TERRY.mean(1) / 0.4).log_softmax(0), rtol=0, atol=1e-7)


def test_simpo_without_margin_ends_where_mean_logprobs_are_the_rewards():
    """Wherever it started: SimPO has no reference."""
    means = end_of_training(by_length(partial(simpo_loss, beta=2.0, gamma=0.0))) / LENGTHS
    torch.testing.assert_close(means - means[0], (REWARDS - REWARDS[0]) / 2.0, rtol=0, atol=1e-7)


def test_simpos_margin_makes_it_surer_than_the_preferences_are():
    gamma, p = 1.0, 0.7
    two = torch.zeros(3, 3, dtype=torch.float64)
    two[0, 1], two[1, 0] = p, 1 - p
    means = end_of_training(by_length(partial(simpo_loss, beta=2.0, gamma=gamma)), two) / LENGTHS
    g = math.exp(gamma)
    u = ((2 * p - 1) * g + math.sqrt((2 * p - 1) ** 2 * g * g + 4 * p * (1 - p))) / (2 * (1 - p))
    assert 2.0 * (means[0] - means[1]).item() == pytest.approx(math.log(u), abs=1e-7)
    assert math.log(u) > math.log(p / (1 - p)) + 0.4


def test_kto_ends_nowhere_short_of_certainty():
    """Two answers, found desirable with .6 and .4: the first is driven up for ever, as if its labels were certain."""
    desirable = torch.tensor([0.6, 0.4], dtype=torch.float64)
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    ends = []
    for _ in range(600):
        ratio = logits.log_softmax(0) - math.log(0.5)
        point = kto_reference_point(2 * ratio.softmax(0) * ratio)  # the KL itself
        likes, dislikes = (kto_loss(ratio, torch.tensor([label] * 2), point, beta=0.5) for label in (True, False))
        (gradient,) = torch.autograd.grad((desirable * likes + (1 - desirable) * dislikes).sum(), logits)
        assert gradient[0] < 0 < gradient[1]
        with torch.no_grad():
            logits -= gradient
        ends.append(logits.softmax(0)[0].item())
    assert 0.6 < ends[50] < ends[100] < ends[300] < ends[599]
    assert ends[599] > 0.99
    # Weights decide where the majority is: with 2 for dislikes the first one, too, is driven down.
    ratio = torch.tensor([3.0, -3.0], dtype=torch.float64, requires_grad=True)
    weights = {"beta": 0.5, "undesirable_weight": 2.0}
    likes, dislikes = (
        kto_loss(ratio, torch.tensor([label] * 2), torch.zeros(()), **weights) for label in (True, False)
    )
    (desirable * likes + (1 - desirable) * dislikes).sum().backward()
    assert (ratio.grad > 0).all()


@pytest.mark.parametrize(
    ("loss", "options", "named"),
    [
        (DPOLoss, {"beta": 0.0}, "beta"),
        (DPOLoss, {"label_smoothing": 0.5}, "label_smoothing"),
        (IPOLoss, {"beta": -1.0}, "beta"),
        (SimPOLoss, {"gamma": -0.1}, "gamma"),
        (SimPOLoss, {"beta": float("nan")}, "beta"),
        (SimPOLoss, {"label_smoothing": 0.7}, "label_smoothing"),
        (KTOLoss, {"desirable_weight": -1.0}, "desirable_weight"),
        (KTOLoss, {"desirable_weight": 0.0, "undesirable_weight": 0.0}, "not both 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(loss, options, named):
    with pytest.raises(UserError, match=named):
        loss(**options)
