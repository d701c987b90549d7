"""The affine quantiser: real numbers to integers on a grid and back, as compressed-tensors defines it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Grid:
    """Numbers that a weight or an activation may take: integers of `bits` bits, or float8 e4m3."""

    bits: int
    symmetric: bool = True
    floating: bool = False  # float8 e4m3 (bits=8, symmetric)

    @property
    def low(self) -> float:
        """Smallest number before scaling."""
        return -448.0 if self.floating else -(2.0 ** (self.bits - 1))

    @property
    def high(self) -> float:
        """Largest number before scaling."""
        return 448.0 if self.floating else 2.0 ** (self.bits - 1) - 1


def scale_and_zero(low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Scale and zero point, each of the shape of `low`, of a grid that spans [low, high] and holds 0.

    Symmetric: s = max(|low|, |high|) / ((q_max - q_min) / 2), z = 0. Asymmetric: s = (high - low) / (q_max - q_min),
    z = clamp(round(q_min - low / s)). The scale is rounded to `dtype`, in which it is stored, before anything is divided
    by it. A range of 0 gets the smallest step of that dtype.
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    span = grid.high - grid.low
    raw = torch.maximum(low.abs(), high.abs()) / (span / 2) if grid.symmetric else (high - low) / span
    scale = raw.to(dtype).float()
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    if grid.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (grid.low - low / scale).clamp(grid.low, grid.high).round()


def to_grid(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Numbers of the grid, as floats: clamp(round(x / s + z)). Shapes broadcast; ties go to the even number."""
    q = (x / scale + zero).clamp(grid.low, grid.high)
    return q.to(FLOAT8).to(x.dtype) if grid.floating else q.round()


def from_grid(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(q - z) s."""
    return (q - zero) * scale


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """A view of a weight (out, in) as (out, groups, group_size); None: one group a row."""
    return weight.unflatten(-1, (-1, group_size or weight.shape[-1]))


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One quantised matrix. What a layer multiplies by is `dequantized()`."""

    values: Tensor  # (out, in): int8, or float8_e4m3fn
    scale: Tensor  # (out, groups), float32 holding numbers of `dtype`
    zero: Tensor  # (out, groups), float32 whole numbers; all 0 where symmetric
    grid: Grid
    group_size: int | None
    dtype: torch.dtype  # of the model, in which the scale is stored and the layer multiplies

    def dequantized(self) -> Tensor:
        """(out, in) in `dtype`: (q - z) s, rounded once."""
        q = grouped(self.values.float(), self.group_size)
        return from_grid(q, self.scale[..., None], self.zero[..., None]).flatten(-2).to(self.dtype)


def quantize_weight(
    weight: Tensor,
    grid: Grid,
    group_size: int | None,
    low: Tensor | None = None,
    high: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """Round to nearest. weight (out, in); low and high (out, groups) where a search has narrowed the min-max range.

    dtype: of the layer, where it is not that of `weight`.
    """
    dtype = dtype or weight.dtype
    parts = grouped(weight.float(), group_size)
    low = parts.amin(-1) if low is None else low
    high = parts.amax(-1) if high is None else high
    scale, zero = scale_and_zero(low, high, grid, dtype)
    q = to_grid(parts, scale[..., None], zero[..., None], grid).flatten(-2)
    return QuantizedWeight(q.to(FLOAT8 if grid.floating else torch.int8), scale, zero, grid, group_size, dtype)


def quantize_tokens(x: Tensor, grid: Grid) -> Tensor:
    """Activations (..., in) on a grid of their own for each token, back in their dtype (dynamic quantisation)."""
    scale, zero = scale_and_zero(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), grid, x.dtype)
    return from_grid(to_grid(x.float(), scale, zero, grid), scale, zero).to(x.dtype)
