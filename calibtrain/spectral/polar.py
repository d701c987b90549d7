"""Polar factors of weight matrices, and singular bases with a fixed sign: exactly, or by products alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OVERSAMPLING = 16
"""Directions drawn beyond the wanted rank (Halko, Martinsson, Tropp 2011, arXiv 0909.4061)."""


@torch.no_grad()
def polar_factor(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, when out < in): U V^T of the SVD `matrix` = U S V^T.

    (out, in) floating, computed in float32 or better; returns that dtype. It is unique for a matrix of full rank.
    """
    left, _, right = torch.linalg.svd(_wide_enough(matrix), full_matrices=False)
    return left @ right


@torch.no_grad()
def polar_by_products(matrix: Tensor, tolerance: float = 1e-5, most: int = 60) -> tuple[Tensor, float]:
    """`polar_factor` by Newton-Schulz steps, scaled as by Chen and Chow (2014): products only, no SVD.

    (out, in) to the factor and its error |O^T O - I|_F / sqrt(min(out, in)). Singular values below about 1e-8 of the
    largest stay short of 1 after `most` steps, and the error tells.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    x = _wide_enough(matrix if tall else matrix.mT)
    x = x / spectral_norm(x).clamp(min=torch.finfo(x.dtype).tiny) / 1.05
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    # The scaling sends the largest value to the level of the lowest: a lower bound here would cost float32 its digits.
    lowest, error = 1e-3, math.inf
    for _ in range(most):
        gram = x.mT @ x
        error = float((gram - eye).norm()) / math.sqrt(x.shape[1])
        if error <= tolerance:
            break
        rate = math.sqrt(3.0 / (1.0 + lowest + lowest**2)) if lowest < 0.9 else 1.0
        x = x @ (1.5 * rate * eye - 0.5 * rate**3 * gram)
        lowest = min(1.0, 0.5 * rate * lowest * (3.0 - rate**2 * lowest**2))
    return (x if tall else x.mT), error


@torch.no_grad()
def spectral_norm(matrix: Tensor, steps: int = 50) -> Tensor:
    """Largest singular value () by power iteration: from below, to about 1e-3 where the first values lie close."""
    generator = torch.Generator(device=matrix.device).manual_seed(0)
    vector = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype, device=matrix.device)
    for _ in range(steps):
        vector = matrix.mT @ (matrix @ vector)
        vector = vector / vector.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    return (matrix @ vector).norm()


@torch.no_grad()
def singular_triples(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, n), S (n,) descending, V (n, n) of an upright matrix (m, n), m >= n, in float32 or better.

    In float64 from the eigenproblem of W^T W, less than half the time of an SVD, where that loses no more than 1e-9 of
    U^T U = I (it squares the condition number); else an SVD. Signs as they fall.
    """
    matrix = _wide_enough(matrix)
    if matrix.dtype == torch.float64:
        squares, right = torch.linalg.eigh(matrix.mT @ matrix)
        squares, right = squares.flip(0), right.flip(1)
        if float(squares[-1]) * 1e-9 > torch.finfo(matrix.dtype).eps * float(squares[0]):
            left = matrix @ right
            values = left.norm(dim=0)
            order = values.argsort(descending=True, stable=True)
            return (left / values)[:, order], values[order], right[:, order]
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right.mT


@torch.no_grad()
def top_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triples: U (out, r), S (r,) descending, V (in, r), in float32 or better.

    Each pair of vectors has the sign that makes the largest entry of its u positive, so that a rotation learnt between
    pairs means the same wherever the SVD is done again.
    """
    left, values, right = torch.linalg.svd(_wide_enough(matrix), full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank].mT
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    return left * signs, values, right * signs


@torch.no_grad()
def top_singular_by_products(
    matrix: Tensor, rank: int, generator: torch.Generator, passes: int = 6
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The `rank` largest singular triples by subspace iteration (arXiv 0909.4061), and their error.

    U (out, r), S (r,), V (in, r) as of `top_singular`, signs left as they fall; the error is |W^T U - V S|_F / |S|_F, 0
    for exact triples. Costs 4 `passes` out in r FLOPs.
    """
    matrix = _wide_enough(matrix)
    count = min(rank + OVERSAMPLING, *matrix.shape)
    probes = torch.randn(matrix.shape[1], count, generator=generator, dtype=matrix.dtype, device=matrix.device)
    basis = torch.linalg.qr(matrix @ probes).Q
    for _ in range(passes):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    small, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    left, values, right = (basis @ small)[:, :rank], values[:rank], right[:rank].mT
    error = (matrix.mT @ left - right * values).norm() / values.norm().clamp(min=torch.finfo(values.dtype).tiny)
    return left, values, right, float(error)


def _wide_enough(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()
