"""Rounding that makes up for its own errors: GPTQ (Frantar et al. 2022, arXiv 2210.17323) on weighted tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from calibtrain.quantization.affine import (
    FLOAT8,
    QuantizedWeight,
    from_grid,
    quantize_weight,
    to_grid,
)
from calibtrain.quantization.inputs import over_ranks
from calibtrain.quantization.schemes import Scheme

BLOCK = 128
"""Columns whose errors are spread among themselves first, and over the others together."""


@dataclass(slots=True)
class Hessian:
    """Second moments of what a layer reads, sum of w x xᵀ over tokens: half the Hessian of its squared output error."""

    total: Tensor  # (in, in) float32

    @classmethod
    def of(cls, width: int, device: torch.device | str = "cpu") -> Hessian:
        """Of no tokens yet."""
        return cls(torch.zeros(width, width, device=device))

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens x (N, in), each with its weight (N,)."""
        x = x.float()
        self.total.addmm_((x if weights is None else x * weights[:, None]).T, x)

    def all_reduce(self) -> None:
        """Sum over ranks, where there are several. Collective."""
        over_ranks(self.total, dist.ReduceOp.SUM)


def round_compensated(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    damping: float,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> QuantizedWeight:
    """Quantise column after column, letting the columns to come make up for the error of each (OBS update).

    weight (out, in); hessian (in, in) of its inputs; damping: share of the mean diagonal added to it, which keeps the
    result good on inputs that were not seen. Grids are fixed beforehand from the weights' range, or from low and high
    (out, groups), so that columns may be taken in the order of their second moments without reordering groups.
    """
    nearest = quantize_weight(weight, scheme.weights, scheme.group_size, low, high)
    width = weight.shape[1]
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    damped = hessian[order][:, order] + damping * diagonal.mean() * torch.eye(width, device=hessian.device)
    factor = _inverse_factor(damped)
    if factor is None:  # nothing was read, or nothing finite
        return nearest
    owner = torch.arange(width, device=weight.device) // (scheme.group_size or width)
    scale, zero = nearest.scale[:, owner[order]], nearest.zero[:, owner[order]]
    left, q = weight.float()[:, order], torch.empty(weight.shape, device=weight.device)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors = torch.empty(weight.shape[0], end - start, device=weight.device)
        for column in range(start, end):
            w, s, z = left[:, column], scale[:, column], zero[:, column]
            q[:, column] = to_grid(w, s, z, scheme.weights)
            error = (w - from_grid(q[:, column], s, z)) / factor[column, column]
            left[:, column:end] -= error[:, None] * factor[column, column:end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    values = torch.empty_like(q)
    values[:, order] = q
    values = values.to(FLOAT8 if scheme.weights.floating else torch.int8)
    return QuantizedWeight(values, nearest.scale, nearest.zero, scheme.weights, scheme.group_size, weight.dtype)


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """Upper Cholesky factor of the inverse; None where there is none."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed or not bool(torch.isfinite(lower).all()):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed else upper
