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

RIDGES = (3.0, 10.0, 30.0, 100.0)
"""Shares of the mean second moment to choose from. Smaller ones would often be chosen and serve new questions worse: the
blocks before have been fitted to both halves of the texts."""
BLOCK = 128
"""Columns whose errors are spread among themselves first, and over the others together."""


@dataclass(slots=True)
class Moments:
    """Sums over weighted tokens of what a layer reads, x, and of what its output lacks, e = y - W x, in two halves."""

    inputs: Tensor  # sum of w x xᵀ, (2, in, in) float32: half the Hessian of the squared output error
    lacking: Tensor  # sum of w e xᵀ, (2, out, in) float32

    @classmethod
    def of(cls, weight: Tensor) -> Moments:
        """Of no tokens yet, for a layer of `weight` (out, in)."""
        out, width = weight.shape
        return cls(*(torch.zeros(2, rows, width, device=weight.device) for rows in (width, out)))

    def update(self, x: Tensor, lacking: Tensor, weights: Tensor, second: Tensor) -> None:
        """Add tokens x (N, in), what the output lacks there (N, out), how much each counts and in which half it is (N,)."""
        for half, mine in enumerate((~second, second)):
            read = x[mine].float()
            weighted = read * weights[mine, None]
            self.inputs[half].addmm_(weighted.T, read)
            self.lacking[half].addmm_(lacking[mine].float().T, weighted)

    def all_reduce(self) -> None:
        """Sum over ranks, where there are several. Collective."""
        over_ranks(self.inputs, dist.ReduceOp.SUM)
        over_ranks(self.lacking, dist.ReduceOp.SUM)


def corrected(weight: Tensor, moments: Moments) -> Tensor:
    """Weights whose outputs lack as little as can be, before they are rounded: W + E (H + ridge)^-1. (out, in) float32.

    What comes in is already off, since the layers before are rounded; the least-squares weights for that are these
    (the asymmetric calibration of GPTAQ, Li et al. 2025, arXiv 2504.02692). With a few hundred texts they fit those and
    no others unless they are held back: the ridge is the one by which each half of the texts serves the other best.
    """
    errors = []
    for ridge in RIDGES:
        changes = [_change(moments.inputs[half], moments.lacking[half], ridge) for half in (0, 1)]
        if any(change is None for change in changes):
            errors.append(torch.inf)
            continue
        errors.append(
            sum(_error(change, moments, 1 - half) for half, change in enumerate(changes) if change is not None)
        )
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    change = _change(moments.inputs.sum(0), moments.lacking.sum(0), RIDGES[best])
    if change is None or not errors[best] < 0:  # 0: as it is
        return weight.float()
    return weight.float() + change


def _change(inputs: Tensor, lacking: Tensor, ridge: float) -> Tensor | None:
    """E (H + ridge)^-1, or None where there is none."""
    factor, failed = torch.linalg.cholesky_ex(_damped(inputs, ridge))
    if int(failed) or not bool(torch.isfinite(factor).all()):
        return None
    return torch.cholesky_solve(lacking.T, factor).T


def _error(change: Tensor, moments: Moments, half: int) -> float:
    """Squared error of a half's outputs after a change of the weights, less that before: tr(D H Dᵀ) - 2 tr(D Eᵀ)."""
    return float(((change @ moments.inputs[half]) * change).sum() - 2 * (change * moments.lacking[half]).sum())


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
