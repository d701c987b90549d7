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
class Moments:
    """Sums over weighted tokens of what a layer reads, x, and of what its output lacks, e = y - W x."""

    inputs: Tensor  # sum of w x xᵀ, (in, in) float32: half the Hessian of the squared output error
    lacking: Tensor  # sum of w e xᵀ, (out, in) float32

    @classmethod
    def of(cls, weight: Tensor) -> Moments:
        """Of no tokens yet, for a layer of `weight` (out, in)."""
        out, width = weight.shape
        return cls(*(torch.zeros(rows, width, device=weight.device) for rows in (width, out)))

    def update(self, x: Tensor, lacking: Tensor, weights: Tensor) -> None:
        """Add tokens x (N, in), what the output lacks there (N, out), and how much each counts (N,)."""
        weighted = x.float() * weights[:, None]
        self.inputs.addmm_(weighted.T, x.float())
        self.lacking.addmm_(lacking.float().T, weighted)

    def all_reduce(self) -> None:
        """Sum over ranks, where there are several. Collective."""
        over_ranks(self.inputs, dist.ReduceOp.SUM)
        over_ranks(self.lacking, dist.ReduceOp.SUM)


def corrected(weight: Tensor, moments: Moments, ridge: float) -> Tensor:
    """Weights whose outputs lack as little as can be, before they are rounded: W + E (H + ridge)^-1. (out, in) float32.

    What comes in is already off, since the layers before are rounded; the least-squares weights for that are these
    (the asymmetric calibration of GPTAQ, Li et al. 2025, arXiv 2504.02692). ridge: share of the mean diagonal of H that is
    added to it. Where there is no solution the weights stay.
    """
    factor, failed = torch.linalg.cholesky_ex(_damped(moments.inputs, ridge))
    if int(failed) or not bool(torch.isfinite(factor).all()):
        return weight.float()
    return weight.float() + torch.cholesky_solve(moments.lacking.T, factor).T


def round_compensated(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    damping: float,
    dtype: torch.dtype,
) -> QuantizedWeight:
    """Quantise column after column, letting the columns to come make up for the error of each (OBS update).

    weight (out, in) float32; hessian (in, in) of its inputs; damping: share of the mean diagonal added to it, which keeps
    the result good on inputs that were not seen; dtype: of the layer. Grids are fixed beforehand from the weights' range,
    so that columns may be taken in the order of their second moments without reordering groups.
    """
    nearest = quantize_weight(weight, scheme.weights, scheme.group_size, dtype=dtype)
    width = weight.shape[1]
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    factor = _inverse_factor(_damped(hessian, damping)[order][:, order])
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
    return QuantizedWeight(values, nearest.scale, nearest.zero, scheme.weights, scheme.group_size, dtype)


def _damped(hessian: Tensor, share: float) -> Tensor:
    return hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """Upper Cholesky factor of the inverse; None where there is none."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed or not bool(torch.isfinite(lower).all()):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed else upper
