"""Statistics of a language model's next-token distribution at N target tokens, without holding the (N, V) logits.

The matrix products run in the input dtype, as a model's own head does; everything after them runs in float32 (float64
for float64 inputs). A chunk of tokens is processed at a time, forward and backward, and the backward pass computes each
chunk's logits once more instead of keeping them.

Letters: N tokens, H hidden size, V vocabulary, K temperatures, n tokens of one chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from calibtrain.errors import UserError

CHUNK_LOGITS = 2**23
"""Logits held at once (elements; 32 MiB in float32, what glibc still reuses, beside two buffers of that size)."""


class TokenStats(NamedTuple):
    """Statistics of N target tokens, each (N,); float32, or float64 where the inputs are."""

    logprob: Tensor  # log p_y, differentiable
    entropy: Tensor  # -sum_v p_v log p_v in nats, differentiable
    sum_p2: Tensor  # sum_v p_v^2, differentiable; the token's Brier score is 1 - 2 p_y + sum_p2
    confidence: Tensor  # max_v p_v, not differentiable
    correct: Tensor  # bool: argmax_v p_v is the target


def fused_linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenStats:
    """Token statistics of softmax(z), z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap).

    Differentiable once in hidden, weight and bias, exactly, for any upstream gradients of logprob, entropy and sum_p2.
    `logprob` keeps its relative precision as the target's probability rounds to 1. A row with a non-finite logit
    is NaN.

    Args:
        hidden: (N, H) floating, N may be 0.
        weight: (V, H) in the dtype of `hidden`.
        targets: (N,) int64 token ids in [0, V).
        bias: (V,) floating, or None.
        softcap: bound of the logits (Gemma 2, arXiv 2408.00118); None leaves tanh out.
        logit_scale: inverse temperature.

    Raises:
        UserError: shapes, dtypes or devices do not fit, or a target is outside [0, V).
    """
    _check_inputs(hidden, weight, targets, bias, softcap)
    logprob, entropy, sum_p2, confidence, correct, _, _ = torch.ops.calibtrain.linear_token_stats(
        hidden, weight, targets, bias, softcap, logit_scale
    )
    return TokenStats(logprob, entropy, sum_p2, confidence, correct)


@torch.no_grad()
def answer_logprobs_at(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperatures: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Log-prob of each target at each temperature: log p_T(y) = z_y / T - logsumexp(z / T). (N, K), no gradient.

    `temperatures` is (K,) and positive; the other arguments, the precision and the errors are those of
    `fused_linear_token_stats`.
    """
    _check_inputs(hidden, weight, targets, bias, softcap)
    _check_targets(targets, weight.shape[0])
    scales = [1.0 / float(t) if t > 0 else float("nan") for t in temperatures.tolist()]
    if any(scale != scale for scale in scales):
        raise UserError(f"temperatures must be positive, got {temperatures.tolist()}")
    result = hidden.new_empty((hidden.shape[0], len(scales)), dtype=_compute_dtype(hidden))
    for rows in _chunks(hidden.shape[0], weight.shape[0]):
        z = _logits(hidden[rows], weight, bias, softcap, logit_scale)
        peak, top = z.max(dim=1, keepdim=True)
        z -= peak
        target_z = z.gather(1, targets[rows, None])[:, 0]
        buffer = torch.empty_like(z)
        for k, scale in enumerate(scales):
            torch.mul(z, scale, out=buffer)
            rest = buffer.exp_().scatter_(1, top, 0.0).sum(dim=1)
            result[rows, k] = target_z * scale - rest.log1p()
    return result


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunks(num_tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _check_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise UserError(f"hidden (N, H) and weight (V, H) do not fit: {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise UserError(f"targets must be ({hidden.shape[0]},) int64, got {tuple(targets.shape)} {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise UserError(f"hidden and weight must share a floating dtype, got {hidden.dtype} and {weight.dtype}")
    if softcap is not None and not softcap > 0:
        raise UserError(f"softcap must be positive or None, got {softcap}")
    if len({tensor.device for tensor in (hidden, weight, targets, bias) if tensor is not None}) > 1:
        raise UserError("hidden, weight, targets and bias must be on one device")


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if targets.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0 or high >= vocabulary:
        raise UserError(
            f"targets must be token ids in [0, {vocabulary}), found {low if low < 0 else high}: leave padding and "
            "ignored positions out of targets, and check that the tokenizer belongs to the model"
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """(n, V) logits in the compute dtype, in a buffer of their own."""
    z = (hidden @ weight.t()).to(_compute_dtype(hidden))
    if bias is not None:
        z += bias
    if logit_scale != 1.0:
        z *= logit_scale
    if softcap is not None:
        low, high = torch.aminmax(z, dim=1, keepdim=True)
        z.div_(softcap).tanh_().mul_(softcap)
        z += (high - low) * 0.0  # tanh would hide an infinite logit: make its row NaN
    return z


@torch.library.custom_op(
    "calibtrain::linear_token_stats",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float? softcap, float logit_scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> tuple[Tensor, ...]:
    """The fields of TokenStats, then for the backward the largest logit and log(sum_v exp(z_v - largest)), (N,)."""
    _check_targets(targets, weight.shape[0])
    outputs = _allocate(hidden)
    logprob, entropy, sum_p2, confidence, correct, peak, log_normalizer = outputs
    for rows in _chunks(hidden.shape[0], weight.shape[0]):
        z = _logits(hidden[rows], weight, bias, softcap, logit_scale)
        chunk_peak, top = z.max(dim=1, keepdim=True)
        z -= chunk_peak
        target_z = z.gather(1, targets[rows, None])[:, 0]
        # The largest term is exactly 1: without it, log1p keeps what a sum near 1 would round away.
        e = z.exp().scatter_(1, top, 0.0)
        rest = e.sum(dim=1)
        normalizer, log_normalizer[rows], peak[rows] = 1.0 + rest, rest.log1p(), chunk_peak[:, 0]
        entropy[rows] = log_normalizer[rows] - z.mul_(e).sum(dim=1) / normalizer
        sum_p2[rows] = (1.0 + e.square_().sum(dim=1)) / normalizer.square()
        confidence[rows] = normalizer.reciprocal()
        logprob[rows] = target_z - log_normalizer[rows]
        correct[rows] = top[:, 0] == targets[rows]
    poison = entropy * 0.0  # NaN where any logit of the row is not finite
    for output in (logprob, sum_p2, confidence):
        output += poison
    return outputs


@_forward.register_fake
def _allocate(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype, size = _compute_dtype(hidden), hidden.shape[0]
    dtypes = (dtype, dtype, dtype, dtype, torch.bool, dtype, dtype)
    return tuple(hidden.new_empty((size,), dtype=output) for output in dtypes)


@torch.library.custom_op(
    "calibtrain::linear_token_stats_backward",
    mutates_args=(),
    schema="(Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_sum_p2, Tensor hidden, Tensor weight,"
    " Tensor targets, Tensor? bias, float? softcap, float logit_scale, Tensor entropy, Tensor sum_p2, Tensor peak,"
    " Tensor log_normalizer, bool[] needed) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_sum_p2: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: Tensor,
    sum_p2: Tensor,
    peak: Tensor,
    log_normalizer: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias where `needed`; an empty tensor stands for each of the others."""
    upstream = (grad_logprob, grad_entropy, grad_sum_p2)
    need_hidden, need_weight, need_bias = needed
    dtype = _compute_dtype(hidden)
    chunks = _chunks(hidden.shape[0], weight.shape[0])
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    # Over several chunks bf16 would lose small contributions to a large running sum.
    accumulate = need_weight and len(chunks) != 1
    grad_weight = weight.new_zeros(weight.shape if accumulate else 0, dtype=dtype)
    grad_bias = hidden.new_zeros(weight.shape[0] if need_bias else 0, dtype=dtype)
    for rows in chunks:
        z = _logits(hidden[rows], weight, bias, softcap, logit_scale)
        slope = None if softcap is None else (z / softcap).square_().neg_().add_(1.0)  # of softcap * tanh(u / softcap)
        logp = z.sub_(peak[rows, None]).sub_(log_normalizer[rows, None])
        chunk_upstream = [None if grad is None else grad[rows].to(dtype) for grad in upstream]
        grad_z = _grad_logits(logp, targets[rows], entropy[rows], sum_p2[rows], *chunk_upstream)
        if slope is not None:
            grad_z *= slope
        if logit_scale != 1.0:
            grad_z *= logit_scale
        if need_bias:
            grad_bias += grad_z.sum(dim=0)
        grad_z = grad_z.to(hidden.dtype)
        if need_hidden:
            torch.mm(grad_z, weight, out=grad_hidden[rows])
        if accumulate:
            _add_product(grad_weight, grad_z, hidden[rows])
        elif need_weight:
            grad_weight = grad_z.t() @ hidden
    bias_dtype = dtype if bias is None else bias.dtype
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)


def _add_product(total: Tensor, grad_z: Tensor, hidden: Tensor) -> None:
    """Add grad_z.T @ hidden to `total` (V, H), a block of rows at a time: the product and its cast stay small."""
    block = max(1, CHUNK_LOGITS // 2 // hidden.shape[1])
    for rows, columns in zip(total.split(block), grad_z.split(block, dim=1), strict=True):
        rows += columns.t() @ hidden


def _grad_logits(
    logp: Tensor,
    targets: Tensor,
    entropy: Tensor,
    sum_p2: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_sum_p2: Tensor | None,
) -> Tensor:
    """Gradient of the logits of one chunk, (n, V); overwrites `logp` (n, V). The other arguments are (n,).

    d logprob / dz_v = [v = y] - p_v, d entropy / dz_v = -p_v (log p_v + entropy) and
    d sum_p2 / dz_v = 2 p_v (p_v - sum_p2).
    """
    p = logp.exp()
    column = targets[:, None]
    target_logp = logp.gather(1, column)[:, 0]
    # p_v times what the logprob contributes everywhere (constant), plus what the others do (also at the target).
    others = torch.zeros_like(target_logp)
    factor = None
    if grad_entropy is not None:
        others = others - grad_entropy * (target_logp + entropy)
        factor = logp.add_(entropy[:, None]).mul_(-grad_entropy[:, None])
    if grad_sum_p2 is not None:
        others = others + 2.0 * grad_sum_p2 * (target_logp.exp() - sum_p2)
        gap = (p - sum_p2[:, None]).mul_(2.0 * grad_sum_p2[:, None])
        factor = gap if factor is None else factor.add_(gap)
    at_target = target_logp.exp() * others
    if grad_logprob is not None:
        # 1 - p_y by expm1: it must not vanish before p_y is exactly 1, since 1 / (1 - p_y) can follow upstream.
        at_target = at_target - grad_logprob * target_logp.expm1()
        factor = -grad_logprob[:, None] if factor is None else factor.sub_(grad_logprob[:, None])
    if factor is None:
        return p.zero_()
    return p.mul_(factor).scatter_(1, column, at_target[:, None])


@_backward.register_fake
def _backward_fake(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_sum_p2: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: Tensor,
    sum_p2: Tensor,
    peak: Tensor,
    log_normalizer: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    bias_dtype = _compute_dtype(hidden) if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape if needed[0] else 0),
        weight.new_empty(weight.shape if needed[1] else 0),
        hidden.new_empty(weight.shape[0] if needed[2] else 0, dtype=bias_dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, ctx.softcap, ctx.logit_scale = inputs
    _, entropy, sum_p2, confidence, correct, peak, log_normalizer = output
    ctx.mark_non_differentiable(confidence, correct, peak, log_normalizer)
    ctx.set_materialize_grads(False)  # an unused statistic costs nothing in the backward pass
    ctx.save_for_backward(hidden, weight, targets, bias, entropy, sum_p2, peak, log_normalizer)


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias, *saved = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias, _, _ = ctx.needs_input_grad
    needed = [need_hidden, need_weight, need_bias]
    gradients = torch.ops.calibtrain.linear_token_stats_backward(
        *grads[:3], hidden, weight, targets, bias, ctx.softcap, ctx.logit_scale, *saved, needed
    )
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(gradients, needed, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
