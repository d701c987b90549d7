"""The polar factor of a weight matrix, and singular bases with a fixed sign."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def polar_factor(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, when out < in): U V^T of the SVD `matrix` = U S V^T.

    (out, in) floating, computed in float32 or better; returns that dtype. It is unique for a matrix of full rank.
    """
    left, _, right = torch.linalg.svd(_wide_enough(matrix), full_matrices=False)
    return left @ right


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


def _wide_enough(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()
