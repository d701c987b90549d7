"""Log-probs of a few tokens at every target position, without holding the (N, V) logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calibtrain.ops.checks import check_token_set
from calibtrain.ops.dispatch import ops_path
from calibtrain.ops.linear_blocks import compute_dtype


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

    Differentiable in hidden, weight, bias and `target_logprob`. The products run and stay in float32 (float64 for float64)
    whatever the dtype of `hidden`, and so do the sums of their gradients: the differences between the tokens of the set
    are those of float32 logits. A log-prob is never above 0.

    Args:
        hidden: (N, H) floating.
        weight: (V, H) in the dtype of `hidden`.
        targets: (N,) int64, the targets y that `target_logprob` belongs to.
        target_logprob: (N,) float32 or float64, `TokenStats.logprob` of the same inputs.
        token_set: (K,) int64 token ids.
        bias: (V,) floating, or None.
        softcap: bound of the logits; None leaves tanh out.
        logit_scale: inverse temperature.

    Returns:
        (N, K) in the dtype of `target_logprob`.

    Raises:
        UserError: `token_set` is not of int64, or a token is outside [0, V); on a GPU a device-side assertion finds the
            latter, so that the host need not wait.
    """
    check_token_set(token_set, weight.shape[0])
    # One gather of both kinds of rows: its backward makes one gradient of the weight's size, two would make two.
    size = targets.shape[0]
    rows = torch.cat([targets, token_set])
    with torch.autocast(hidden.device.type, enabled=False):
        vectors, wide = _Rows.apply(weight, rows), hidden.to(compute_dtype(hidden))
        z_set = wide @ vectors[size:].t()
        z_target = (wide * vectors[:size]).sum(dim=1)
    if ops_path(hidden) in ("cpp", "torch"):
        # There the target's log-prob holds its logit rounded to the inputs' dtype: the same one must leave it again.
        z_target = z_target + (z_target.to(hidden.dtype).to(z_target.dtype) - z_target).detach()
    if bias is not None:
        offsets = _Rows.apply(bias, rows).to(z_set.dtype)
        z_set, z_target = z_set + offsets[size:], z_target + offsets[:size]
    z_set, z_target = (logit_scale * z for z in (z_set, z_target))
    if softcap is not None:
        z_set, z_target = (softcap * torch.tanh(z / softcap) for z in (z_set, z_target))
    logprobs = target_logprob[:, None] + (z_set - z_target[:, None]).to(target_logprob.dtype)
    # Rounding may lift it above 0. The gradient passes all the same: it is right, only the value was not.
    return logprobs - (logprobs.detach().clamp(min=0.0))


class _Rows(torch.autograd.Function):
    """Rows of a matrix, or entries of a vector, in float32 or better; the gradient of a repeated row is summed in that.

    Summed in bfloat16, thousands of equal rows lose what is small beside the sum. Equal rows lie side by side once sorted:
    the sums take as much memory as the rows, not as the matrix, and no row is counted on the host.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape, ctx.dtype = matrix.shape, matrix.dtype
        return matrix[rows].to(compute_dtype(matrix))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,), (grad,) = ctx.saved_tensors, grads
        total = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        if rows.numel() == 0:
            return total, None
        ordered, order = rows.sort()
        first = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()]).cumsum(0)
        sums = torch.zeros_like(grad).index_put_((first,), grad[order], accumulate=True)
        # Sums that are left over are 0 and go to row 0.
        places = torch.zeros_like(rows).index_put_((first,), ordered)
        return total.index_put_((places,), sums.to(ctx.dtype), accumulate=True), None
