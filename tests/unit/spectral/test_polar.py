"""Polar factors and signed singular bases."""

import torch

from calibtrain.spectral.polar import polar_factor, top_singular


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_polar_factor_is_the_nearest_orthonormal_matrix():
    for shape in ((8, 5), (5, 8), (6, 6)):
        matrix = normal(*shape)
        factor = polar_factor(matrix)
        small = factor.mT @ factor if shape[0] >= shape[1] else factor @ factor.mT
        assert torch.allclose(small, torch.eye(min(shape), dtype=torch.float64))
        stretch = factor.mT @ matrix if shape[0] >= shape[1] else matrix @ factor.mT
        assert torch.allclose(stretch, stretch.mT)
        assert torch.linalg.eigvalsh(stretch).min() > 0
        for seed in range(20):
            other = torch.linalg.qr(
                normal(*shape, seed=seed + 1) if shape[0] >= shape[1] else normal(*shape, seed=seed).mT
            )[0]
            other = other if shape[0] >= shape[1] else other.mT
            assert (matrix - factor).norm() < (matrix - other).norm()


def test_polar_factor_keeps_float64_and_lifts_bf16():
    assert polar_factor(normal(4, 3)).dtype == torch.float64
    assert polar_factor(normal(4, 3).bfloat16()).dtype == torch.float32


def test_top_singular_signs_do_not_depend_on_the_svd():
    matrix = normal(7, 5)
    left, values, right = top_singular(matrix, 3)
    assert torch.allclose(left.mT @ matrix @ right, torch.diag(values))
    assert (values[:-1] > values[1:]).all()
    assert torch.allclose(values, torch.linalg.svdvals(matrix)[:3])
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    turned = torch.linalg.qr(normal(5, 5, seed=9))[0]
    assert torch.allclose(top_singular(matrix @ turned, 3)[0], left)
