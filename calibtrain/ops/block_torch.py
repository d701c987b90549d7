"""The elementwise work on one block of logits in PyTorch: for every dtype and device; `token_stats.cpp` is its twin.

A block holds the products hidden @ weight[start : start + width].T of n tokens, (n, width) and contiguous. It is cast
and worked on a slice of tokens at a time, so that temporaries stay small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibtrain.ops.head import Head

SLICE_LOGITS = 2**20
"""Entries worked on at once."""

PEAK, REST, SQUARES, MOMENT, TARGET, POISON = range(6)


def new_state(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Running sums of `tokens` tokens before their first block: (6, n) float64, and the largest entry's id (n,) int64.

    The rows are the largest logit m; over all entries but the largest, the sums of e = exp(z - m), of e^2 and of
    e (z - m); the target's logit; 0, or NaN once an entry was not finite.
    """
    state = torch.zeros((6, tokens), dtype=torch.float64, device=device)
    state[PEAK] = -1e300
    state[REST:MOMENT] = -1.0  # there is no largest entry yet to add to them
    return state, torch.zeros(tokens, dtype=torch.int64, device=device)


def update_stats(
    state: Tensor, top: Tensor, products: Tensor, start: int, targets: Tensor, bias: Tensor | None, head: Head
) -> None:
    """Take a block into the running sums `state` and `top`. `bias` is the block's, (width,)."""
    for rows in _slices(products):
        _update_rows(state[:, rows], top[rows], products[rows], start, targets[rows], bias, head)


def form_gradient(
    products: Tensor, start: int, targets: Tensor, coefficients: Tensor, bias: Tensor | None, head: Head
) -> None:
    """Overwrite a block with the gradient of the loss in its products.

    `coefficients` is (6, n): peak, log_normalizer, a, b, c, at_target. With log p = z - peak - log_normalizer the
    gradient in z is p (a + b log p + c p), and at_target at the target.
    """
    for rows in _slices(products):
        peak, log_normalizer, a, b, c, at_target = coefficients[:, rows, None].unbind()
        z = _logits(products[rows], bias, head, coefficients.dtype)
        slope = None if head.softcap is None else (z / head.softcap).square_().neg_().add_(1.0)
        logp = z.sub_(peak).sub_(log_normalizer)
        p = logp.exp()
        gradient = logp.mul_(b).add_(a).addcmul_(p, c).mul_(p)
        local = targets[rows] - start
        here = ((local >= 0) & (local < z.shape[1])).nonzero()[:, 0]
        gradient[here, local[here]] = at_target[here, 0]
        if slope is not None:
            gradient *= slope
        if head.logit_scale != 1.0:
            gradient *= head.logit_scale
        products[rows] = gradient


def _update_rows(
    state: Tensor, top: Tensor, products: Tensor, start: int, targets: Tensor, bias: Tensor | None, head: Head
) -> None:
    z = _logits(products, bias, head, torch.promote_types(products.dtype, torch.float32))
    largest, at = z.max(dim=1)
    state[POISON] += (products.sum(dim=1, dtype=z.dtype) * 0.0).double()
    local = targets - start
    here = (local >= 0) & (local < z.shape[1])
    at_target = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0].double()
    state[TARGET] = torch.where(here, at_target, state[TARGET])
    # The former largest entry joins the sums; the new one leaves them: near 1, log1p keeps what a sum would round.
    larger = largest.double() > state[PEAK]
    gap = torch.where(larger, state[PEAK] - largest.double(), 0.0)
    decay, one = gap.exp(), larger.double()
    state[MOMENT] = decay * (state[MOMENT] + gap * (one + state[REST]))
    state[SQUARES] = decay * decay * (one + state[SQUARES])
    state[REST] = decay * (one + state[REST])
    state[PEAK] = torch.where(larger, largest.double(), state[PEAK])
    top[larger] = at[larger] + start
    z -= state[PEAK, :, None].to(z.dtype)
    e = z.exp()
    e[larger, at[larger]] = 0.0
    state[REST] += e.sum(dim=1)
    state[MOMENT] += z.mul_(e).sum(dim=1)
    state[SQUARES] += e.square_().sum(dim=1)


def _logits(products: Tensor, bias: Tensor | None, head: Head, dtype: torch.dtype) -> Tensor:
    """Logits of some products, in `dtype` and a buffer of their own."""
    z = products.to(dtype, copy=True)
    if bias is not None:
        z += bias
    if head.logit_scale != 1.0:
        z *= head.logit_scale
    return z if head.softcap is None else z.div_(head.softcap).tanh_().mul_(head.softcap)


def _slices(products: Tensor) -> list[slice]:
    size = max(1, SLICE_LOGITS // products.shape[1])
    return [slice(start, start + size) for start in range(0, products.shape[0], size)]
