"""Elementary functions that stay finite, in value and in gradient, where their formulas do not."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` itself, or in float32 where it is of half precision: bf16 keeps 8 bits, too few for a log-prob near 0."""
    return x if x.dtype == torch.float64 else x.float()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0 of any shape; float32, or float64 for float64 input.

    Two formulas joined at -ln 2 (Maechler 2012, "Accurately computing log(1 - exp(-|a|))"). Above -1e-19 (float32), or
    where the gradient would overflow in the dtype of `x`, the value is held constant: it is finite and its gradient 0.
    """
    values = at_least_float32(x)
    ceiling = -max(torch.finfo(values.dtype).tiny ** 0.5, 2.0 / torch.finfo(x.dtype).max)
    values = values.clamp(max=ceiling)
    near_zero = values > -math.log(2.0)
    # torch.where also differentiates the branch it does not take: near 0 log1p needs a harmless input.
    far = torch.where(near_zero, -1.0, values)
    return torch.where(near_zero, torch.log(-torch.expm1(values)), torch.log1p(-torch.exp(far)))
