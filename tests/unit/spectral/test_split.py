"""The fit of scale and shared rotation, and models with one part of their change undone."""

from __future__ import annotations

import pytest
import torch

from calibtrain.errors import UserError
from calibtrain.spectral.polar import polar_by_products, polar_factor, top_singular_by_products
from calibtrain.spectral.split import bases_of, split, without
from tests.unit.spectral.truth import orthonormal, pair, small_rotation, spectrum

SHAPES = ((40, 40), (56, 32), (32, 56))


def structured(shape, seed=0):
    """W0, its bases and the Q, a and W = a (U0 Q) S0 (V0 Q)^T of a change with both parts."""
    draw = torch.Generator().manual_seed(seed)
    k = min(shape)
    s, left, right = spectrum(k, draw, False), orthonormal(shape[0], k, draw), orthonormal(shape[1], k, draw)
    q = small_rotation(k, 0.1, draw)
    return (left * s) @ right.mT, (left @ q * s) @ (right @ q).mT


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_that_were_put_in_are_taken_out(shape):
    w0, turned = structured(shape)
    w = 1.05 * turned
    assert torch.allclose(without("scale", w0, w), turned, atol=1e-9)
    assert torch.allclose(without("rotation", w0, w), 1.05 * w0, atol=1e-9)
    assert torch.allclose(without("residual", w0, w), w, atol=1e-9)
    # Something else on top stays, but for what a fit takes it for.
    extra = 1e-4 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (without("residual", w0, w + extra) - w).norm() < extra.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_random_rotation_turns_as_far_and_elsewhere(shape):
    w0, w = structured(shape)
    other = without("rotation", w0, w, random_rotation=3)
    assert float((other - w0).norm() / (w - w0).norm()) == pytest.approx(1, abs=0.02)
    assert float((other - w).norm() / (w - w0).norm()) > 1
    assert torch.allclose(torch.linalg.svdvals(other), torch.linalg.svdvals(w0), atol=1e-9)
    assert torch.equal(other, without("rotation", w0, w, random_rotation=3))
    assert not torch.equal(other, without("rotation", w0, w, random_rotation=4))
    # As a shared rotation of W0 it is still one.
    first = bases_of(w0 if shape[0] >= shape[1] else w0.mT)
    change = (other - w0) if shape[0] >= shape[1] else (other - w0).mT
    assert split(first, first.inside(change), float(change.square().sum())).rest_share < 1e-9


def test_no_nearby_rotation_fits_better():
    w0, w = pair("noise", (32, 32), 0, size=0.1)
    first = bases_of(w0)
    inner, total = first.inside(w - w0), float((w - w0).square().sum())
    fit = split(first, inner, total)
    s = torch.diag(first.values)

    def left_over(scale, rotation):
        return float((inner + s - scale * rotation @ s @ rotation.mT).square().sum() / total)

    best = left_over(fit.scale, fit.rotation)
    assert best == pytest.approx(fit.rest_share, rel=1e-9)
    draw = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.3):
        for _ in range(10):
            assert left_over(fit.scale, fit.rotation @ small_rotation(32, size, draw)) > best
        assert left_over(fit.scale + size, fit.rotation) > best


def test_parts_without_a_name_are_refused():
    with pytest.raises(UserError, match="unknown part 'spectrum'"):
        without("spectrum", torch.eye(2), torch.eye(2))
    with pytest.raises(UserError, match="takes the rotation's place"):
        without("scale", torch.eye(2), torch.eye(2), random_rotation=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_polar_factor_by_products_is_the_svds(shape):
    w0, _ = pair("noise", shape, 0)
    found, error = polar_by_products(w0)
    assert error < 1e-5
    assert (found - polar_factor(w0)).norm() / w0.shape[0] ** 0.5 < 1e-5
    assert polar_by_products(w0.float())[0].dtype == torch.float32


def test_an_error_tells_where_products_cannot_know_the_factor():
    w0, _ = pair("noise", (40, 40), 0)
    left, values, right = torch.linalg.svd(w0)
    values[-10:] = 0.0
    assert polar_by_products((left * values) @ right)[1] > 0.1
    top = top_singular_by_products((left * values) @ right, 30, torch.Generator().manual_seed(0))
    assert top[3] < 1e-6
    assert torch.allclose(top[1], values[:30], atol=1e-9)
