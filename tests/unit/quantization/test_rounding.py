"""Rounding that makes up for its own errors, and weights that make up for what comes in."""

from __future__ import annotations

import pytest
import torch

from calibtrain.quantization.affine import from_grid, quantize_weight, to_grid
from calibtrain.quantization.rounding import Moments, corrected, round_compensated
from calibtrain.quantization.schemes import scheme_of

W4, W8 = scheme_of("w4a16", group_size=32), scheme_of("w8a8")


def correlated(n, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width // 4, width, generator=generator)
    noise = 0.1 * torch.randn(n, width, generator=generator)
    return torch.randn(n, width // 4, generator=generator) @ mixing + noise


def weight_of(out, width, seed=1):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def textbook(weight, hessian, scheme, damping):
    """Optimal brain quantisation in float64, one column after the other with the inverse Hessian of those that are left."""
    nearest = quantize_weight(weight, scheme.weights, scheme.group_size)
    width = weight.shape[1]
    left, h = weight.double().clone(), hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    size, q = scheme.group_size or width, torch.zeros_like(left)
    remaining = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    while remaining:
        inverse = torch.linalg.inv(h[remaining][:, remaining])
        column = remaining[0]
        s, z = nearest.scale[:, column // size].double(), nearest.zero[:, column // size].double()
        q[:, column] = to_grid(left[:, column], s, z, scheme.weights)
        error = (left[:, column] - from_grid(q[:, column], s, z)) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0]
        remaining = remaining[1:]
    return q.to(torch.int8)


@pytest.mark.parametrize("scheme", [W4, W8, scheme_of("w4a16", group_size=64, asymmetric=True)], ids=lambda s: s.label)
def test_it_is_the_textbook_update(scheme):
    # 192 columns: errors are spread within a block and over the next.
    weight, x = weight_of(24, 192), correlated(1000, 192)
    found = round_compensated(weight, x.T @ x, scheme, 0.01, torch.float32)
    wanted = textbook(weight, x.T @ x, scheme, 0.01)
    assert (
        float((found.values == wanted).float().mean()) > 0.99
    )  # float32 falls the other way near a tie, and what follows with it
    assert torch.equal(found.scale, quantize_weight(weight, scheme.weights, scheme.group_size).scale)


def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest():
    weight = weight_of(16, 64)
    diagonal = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1)
    found = round_compensated(weight, diagonal, W4, 0.0, torch.float32)
    assert torch.equal(found.values, quantize_weight(weight, W4.weights, 32).values)


def test_what_cannot_be_solved_leaves_the_weights():
    weight = weight_of(8, 64)
    assert torch.equal(corrected(weight, Moments.of(weight), 3.0), weight)


@pytest.mark.parametrize("broken", [torch.zeros(64, 64), torch.full((64, 64), float("nan"))])
def test_without_inputs_it_rounds_to_nearest(broken):
    weight = weight_of(16, 64)
    found = round_compensated(weight, broken, W4, 0.1, torch.float32)
    assert torch.equal(found.values, quantize_weight(weight, W4.weights, 32).values)


def test_outputs_are_nearer_than_by_rounding_to_nearest():
    weight, x, unseen = weight_of(64, 128), correlated(2000, 128), correlated(500, 128, seed=0)[250:]

    def error(found):
        return float(((found.dequantized() - weight) @ unseen.T).square().mean())

    nearest = quantize_weight(weight, W4.weights, 32)
    assert error(round_compensated(weight, x.T @ x, W4, 0.01, torch.float32)) < 0.5 * error(nearest)


def moments_of(weight, wanted, x, weights=None):
    moments = Moments.of(weight)
    counted = torch.ones(len(x)) if weights is None else weights
    for part in torch.arange(len(x)).split(97):
        moments.update(x[part], wanted[part] - x[part] @ weight.T, counted[part])
    return moments


def test_weights_are_found_that_make_what_was_wanted():
    weight, truth, x = weight_of(16, 64), weight_of(16, 64, seed=5), correlated(4000, 64)
    better = corrected(weight, moments_of(weight, x @ truth.T, x), 1e-4)
    lacking = (x @ (truth - better).T).square().mean() / (x @ (truth - weight).T).square().mean()
    assert lacking < 0.01


def test_the_ridge_holds_back_what_a_few_texts_would_fit():
    weight, x = weight_of(16, 64), correlated(60, 64)  # fewer texts than inputs: anything can be fitted
    noise = x @ weight.T + torch.randn(60, 16, generator=torch.Generator().manual_seed(3))
    moments, unseen = moments_of(weight, noise, x), correlated(500, 64, seed=0)
    held, free = (corrected(weight, moments, ridge) - weight for ridge in (3.0, 1e-3))
    assert float((unseen @ held.T).square().mean()) < 0.3 * float((unseen @ free.T).square().mean())


def test_tokens_count_by_their_weight_and_in_any_order():
    weight, x = weight_of(8, 64), correlated(300, 64)
    wanted, counted = x @ weight_of(8, 64, seed=7).T, torch.rand(300, generator=torch.Generator().manual_seed(4))
    one = moments_of(weight, wanted, x, counted)
    expected = sum(w * torch.outer(v, v) for w, v in zip(counted.double(), x.double(), strict=True))
    torch.testing.assert_close(one.inputs.double(), expected, rtol=1e-4, atol=1e-3)
    back = torch.arange(299, -1, -1)
    other = Moments.of(weight)
    other.update(x[back], (wanted - x @ weight.T)[back], counted[back])
    torch.testing.assert_close(other.inputs, one.inputs, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(other.lacking, one.lacking, rtol=1e-4, atol=1e-3)
