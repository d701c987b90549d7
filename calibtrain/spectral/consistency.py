"""Do left and right singular vectors turn together? NF of He, Cao (2025, arXiv 2509.17866), and what noise makes of it.

    Q_U = U0^T U,  Q_V = V0^T V,  NF = |Q_U^T Q_V - I|_F / sqrt(k)

0 where one rotation turned both bases, sqrt(2) where two independent ones did. The paper's normaliser is not printed; ours
is sqrt(k). For a square matrix of full rank NF is |polar(W) - polar(W0)|_F / sqrt(k).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibtrain.spectral.split import Bases, bases_of


def consistency(left: Tensor, right: Tensor) -> float:
    """NF of the overlaps Q_U = `left` and Q_V = `right` (k, k)."""
    together = left.mT @ right
    together.diagonal().sub_(1.0)
    return float(together.norm()) / math.sqrt(left.shape[0])


@torch.no_grad()
def null_consistency(first: Bases, norm: float, seeds: int, generator: torch.Generator, matrix: Tensor) -> list[float]:
    """NF of W0 = `matrix` (m, n) plus Gaussian noise of Frobenius `norm`, `seeds` times."""
    deviation = norm / math.sqrt(matrix.numel())
    found = []
    for _ in range(seeds if norm > 0 else 0):
        if first.full:
            found.append(_by_gram(first, deviation, generator))
        else:
            noise = torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype, device=matrix.device)
            second = bases_of(matrix + noise * deviation, first.rank, generator)
            found.append(consistency(first.left.mT @ second.left, first.right.mT @ second.right))
    return found


def _by_gram(first: Bases, deviation: float, generator: torch.Generator) -> float:
    """One draw in the bases of W0, where noise is noise again; an eigenproblem of W^T W takes the place of an SVD.

    With W = [B; E], B = S0 + noise, and W^T W = V L V^T: U = W V L^-1/2, so that Q_U^T Q_V = L^-1/2 V^T B^T V.
    """
    m, k = first.left.shape[0], first.rank
    dtype, device = first.values.dtype, first.values.device

    def noise(rows: int) -> Tensor:
        return torch.randn((rows, k), generator=generator, device=device).to(dtype).mul_(deviation)

    inside = noise(k)
    inside.diagonal().add_(first.values)
    gram = inside.mT @ inside
    if m > k:
        outside = noise(m - k)
        gram = gram.addmm_(outside.mT, outside)
    values, vectors = torch.linalg.eigh(gram)
    seen = inside @ vectors
    lengths = values.clamp(min=torch.finfo(dtype).tiny).rsqrt()
    squared = float((seen.square().sum(0) * lengths.square()).sum())
    trace = float(((seen * vectors).sum(0) * lengths).sum())
    return math.sqrt(max(0.0, squared + k - 2.0 * trace) / k)
