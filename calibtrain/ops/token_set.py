"""Log-probs of a few tokens at every target position, without holding the (N, V) logits."""

from __future__ import annotations

import torch
from torch import Tensor

from calibtrain.errors import UserError


def token_set_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_logprob: Tensor,
    token_set: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return log p_v = log p_y + z_v - z_y for each token v of a set: K + 1 dot products a position instead of V.

    Differentiable in hidden, weight, bias and `target_logprob`. The error is absolute, that of a logit; a log-prob is
    never above 0. The products run in the dtype of `hidden`, as those of `fused_linear_token_stats` do.

    Args:
        hidden: (N, H) floating.
        weight: (V, H) in the dtype of `hidden`.
        targets: (N,) int64, the targets y that `target_logprob` belongs to.
        target_logprob: (N,) float32 or float64, `TokenStats.logprob`.
        token_set: (K,) int64 token ids.
        bias: (V,) floating, or None.
        softcap: bound of the logits; None leaves tanh out.
        logit_scale: inverse temperature.

    Returns:
        (N, K) in the dtype of `target_logprob`.

    Raises:
        UserError: a token of the set is outside [0, V).
    """
    if token_set.numel() and not 0 <= int(token_set.min()) <= int(token_set.max()) < weight.shape[0]:
        raise UserError(f"token_set must be token ids in [0, {weight.shape[0]}), got {token_set.tolist()}")
    # One gather of both kinds of rows: its backward makes one gradient of the weight's size, two would make two.
    size = targets.shape[0]
    rows = torch.cat([targets, token_set])
    vectors = weight[rows]
    dtype = target_logprob.dtype
    z_set = (hidden @ vectors[size:].t()).to(dtype)
    z_target = (hidden.to(dtype) * vectors[:size].to(dtype)).sum(dim=1).to(hidden.dtype).to(dtype)
    if bias is not None:
        offsets = bias[rows].to(dtype)
        z_set, z_target = z_set + offsets[size:], z_target + offsets[:size]
    z_set, z_target = (logit_scale * z for z in (z_set, z_target))
    if softcap is not None:
        z_set, z_target = (softcap * torch.tanh(z / softcap) for z in (z_set, z_target))
    logprobs = target_logprob[:, None] + z_set - z_target[:, None]
    # Rounding may lift it above 0. The gradient passes all the same: it is right, only the value was not.
    return logprobs - (logprobs.detach().clamp(min=0.0))
