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

TEMPERATURE_LOGITS = 2**23
"""Entries worked on at once where each stands once for every temperature."""

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
        here, place = _place(targets[rows] - start, z.shape[1])
        # Where the target is elsewhere an entry keeps its value: to choose those rows would make the host wait for a GPU.
        gradient.scatter_(1, place, torch.where(here, at_target, gradient.gather(1, place)))
        if slope is not None:
            gradient *= slope
        if head.logit_scale != 1.0:
            gradient *= head.logit_scale
        products[rows] = gradient


def new_temperature_state(tokens: int, temperatures: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `new_state` for K temperatures: (6, n) float64, of which PEAK, TARGET and POISON are used, and (K, n) float64.

    The latter holds the sum of exp((z - m) / T) over all entries but the largest, m.
    """
    state, _ = new_state(tokens, device)
    return state, torch.full((temperatures, tokens), -1.0, dtype=torch.float64, device=device)


def update_temperatures(
    state: Tensor,
    rest: Tensor,
    products: Tensor,
    start: int,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    inverse: Tensor,
) -> None:
    """Take a block into the running sums `state` and `rest`. `inverse` (K,) float64 is 1 / T."""
    size = max(1, TEMPERATURE_LOGITS // (products.shape[1] * max(1, inverse.shape[0])))
    for first in range(0, products.shape[0], size):
        rows = slice(first, first + size)
        z = _logits(products[rows], bias, head, products.dtype)
        largest, at = z.max(dim=1)
        here, place = _place(targets[rows] - start, z.shape[1])
        known = state[:, rows]
        known[POISON] += (products[rows].sum(dim=1) * 0.0).double()
        known[TARGET] = torch.where(here, z.gather(1, place).double(), known[TARGET, :, None])[:, 0]
        larger = largest.double() > known[PEAK]
        gap = torch.where(larger, known[PEAK] - largest.double(), 0.0)
        rest[:, rows] = (inverse[:, None] * gap).exp() * (larger.double() + rest[:, rows])
        known[PEAK] = torch.where(larger, largest.double(), known[PEAK])
        z -= known[PEAK, :, None].to(z.dtype)
        z.scatter_(1, at[:, None], torch.where(larger[:, None], -torch.inf, z.gather(1, at[:, None])))
        rest[:, rows] += (z * inverse.to(z.dtype)[:, None, None]).exp_().sum(dim=2)


def _place(local: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Whether a token's target is in a block, (n, 1) bool, and its column there, (n, 1), some column where it is not."""
    return ((local >= 0) & (local < width))[:, None], local.clamp(0, width - 1)[:, None]


def _update_rows(
    state: Tensor, top: Tensor, products: Tensor, start: int, targets: Tensor, bias: Tensor | None, head: Head
) -> None:
    z = _logits(products, bias, head, torch.promote_types(products.dtype, torch.float32))
    largest, at = z.max(dim=1)
    state[POISON] += (products.sum(dim=1, dtype=z.dtype) * 0.0).double()
    here, place = _place(targets - start, z.shape[1])
    state[TARGET] = torch.where(here, z.gather(1, place).double(), state[TARGET, :, None])[:, 0]
    # The former largest entry joins the sums; the new one leaves them: near 1, log1p keeps what a sum would round.
    larger = largest.double() > state[PEAK]
    gap = torch.where(larger, state[PEAK] - largest.double(), 0.0)
    decay, one = gap.exp(), larger.double()
    state[MOMENT] = decay * (state[MOMENT] + gap * (one + state[REST]))
    state[SQUARES] = decay * decay * (one + state[SQUARES])
    state[REST] = decay * (one + state[REST])
    state[PEAK] = torch.where(larger, largest.double(), state[PEAK])
    top.copy_(torch.where(larger, at + start, top))
    z -= state[PEAK, :, None].to(z.dtype)
    e = z.exp()
    e.scatter_(1, at[:, None], torch.where(larger[:, None], 0.0, e.gather(1, at[:, None])))
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
