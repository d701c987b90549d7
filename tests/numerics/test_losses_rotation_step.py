"""The decoupled step of the weight penalties: its size, its aim, and that sampling matrices and probes keeps its mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from calibtrain.errors import UserError
from calibtrain.losses.rotation_probes import NAMES
from calibtrain.losses.rotation_step import DecoupledPenalty, DenseMatrix
from calibtrain.spectral.polar import polar_factor
from tests.numerics.test_losses_rotation import exact, normal

SHAPES = [(6, 4), (4, 6), (5, 5), (6, 4), (3, 5)]


def parameters(drift=0.2):
    """Parameters, where they started, and where they are now."""
    starts = [normal(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    moved = [w0 + drift * normal(*shape, seed=50 + i) for i, (w0, shape) in enumerate(zip(starts, SHAPES, strict=True))]
    return [nn.Parameter(one.clone()) for one in starts], starts, moved


def held(name, given, moved, weight, **settings):
    """The penalty on the parameters' first values; then they move."""
    polars = [polar_factor(one.detach()) if name == "polar_drift" else None for one in given]
    matrices = [DenseMatrix.of(name, one, polar=polar) for one, polar in zip(given, polars, strict=True)]
    for one, value in zip(given, moved, strict=True):
        one.data.copy_(value)
    return DecoupledPenalty(name, weight, matrices, **settings)


def test_angle_budget_of_zero_decays_to_the_start_as_weight_decay_does_to_zero():
    given, starts, moved = parameters()
    penalty = held("angle_budget", given, moved, weight=0.3)
    penalty.step(0, learning_rate=0.1)
    for one, w0, weight in zip(given, starts, moved, strict=True):
        torch.testing.assert_close(one.data, weight - 0.1 * 0.3 * (weight - w0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_exact_step_follows_the_gradient(name):
    given, starts, moved = parameters()
    value = held(name, given, moved, weight=1e-6, probes=None).step(0, learning_rate=1.0)
    expected = []
    for one, w0, weight in zip(given, starts, moved, strict=True):
        leaf = weight.clone().requires_grad_()
        found = exact(name, leaf, w0)
        expected.append(found.item())
        (gradient,) = torch.autograd.grad(found, leaf)
        torch.testing.assert_close(one.data - weight, -1e-6 * w0.square().sum() / 2 * gradient, rtol=1e-6, atol=1e-13)
    assert value.item() == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_sampled_matrices_and_probes_take_the_exact_step_on_average():
    """10,000 steps from the same weights, one matrix of five and one probe each: within 3 standard errors."""
    name = "polar_drift"
    given, starts, moved = parameters()
    penalty = held(name, given, moved, weight=1e-6, probes=1, layer_fraction=0.2)
    directions = [normal(*shape, seed=80 + i) for i, shape in enumerate(SHAPES)]
    draws = torch.zeros(10_000, dtype=torch.float64)
    for step in range(len(draws)):
        penalty.step(step, learning_rate=1.0)
        for one, weight, direction in zip(given, moved, directions, strict=True):
            draws[step] += ((one.data - weight) * direction).sum()
            one.data.copy_(weight)
    truth = 0.0
    for w0, weight, direction in zip(starts, moved, directions, strict=True):
        leaf = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(exact(name, leaf, w0), leaf)
        truth += float(-1e-6 * w0.square().sum() / 2 * (gradient * direction).sum())
    assert abs(draws.mean() - truth) < 3 * draws.std() / math.sqrt(len(draws))
    assert abs(truth) > 5 * draws.std() / math.sqrt(len(draws))  # and it is told apart from nothing


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_makes_it_diverge(name):
    """The Polyak step ends at the penalty's own zero, however large the weight."""
    given, starts, moved = parameters()
    penalty = held(name, given, moved, weight=1e12, probes=None)
    for step in range(60):
        penalty.step(step, learning_rate=1.0)
    for one, w0, weight in zip(given, starts, moved, strict=True):
        before, after = float(exact(name, weight, w0)), float(exact(name, one.data, w0))
        assert after < 1e-2 * before
        assert (one.data - w0).norm() < 1.01 * (weight - w0).norm()


def test_a_step_is_a_function_of_seed_and_number():
    results = []
    for seed, step in ((1, 7), (1, 7), (1, 8), (2, 7)):
        given, _, moved = parameters()
        held("row_stretch", given, moved, 1.0, probes=1, layer_fraction=0.4, seed=seed).step(step, 1e-3)
        results.append(torch.cat([one.data.flatten() for one in given]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("rotation", {}, "row_gram_drift, column_gram_drift"),
        ("row_stretch", {"layer_fraction": 0.0}, "layer_fraction"),
        ("row_stretch", {"probes": 0}, "probes at least 1"),
        ("row_stretch", {"weight": -1.0}, "weight must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(name, settings, words):
    weight = nn.Parameter(normal(3, 3, seed=0))
    with pytest.raises(UserError, match=words):
        DecoupledPenalty(name, **{"weight": 1.0, "matrices": [DenseMatrix.of("row_stretch", weight)], **settings})
    with pytest.raises(UserError, match="no matrix"):
        DecoupledPenalty("row_stretch", 1.0, [])


@pytest.mark.parametrize(
    ("name", "weight", "words"),
    [
        ("row_stretch", torch.zeros(3), "contiguous matrix"),
        ("row_stretch", torch.zeros(4, 3).t(), "contiguous matrix"),
        ("row_stretch", torch.zeros(3, 3, dtype=torch.bfloat16), "fp32 masters"),
        ("polar_drift", torch.zeros(3, 3), "polar"),
    ],
)
def test_a_matrix_that_cannot_be_held_is_refused(name, weight, words):
    with pytest.raises(UserError, match=words):
        DenseMatrix.of(name, nn.Parameter(weight))
