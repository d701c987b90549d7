"""Statistics of a language model's next-token distribution at N target tokens, without holding the (N, V) logits.

The matrix products run in the input dtype, as a model's own head does; everything after them runs in float32 (float64
for float64 inputs). `linear_blocks` walks over the vocabulary, `dispatch` says which implementation does it.

Letters: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from calibtrain.ops import linear_blocks
from calibtrain.ops.checks import check_inputs, check_targets
from calibtrain.ops.dispatch import ops_path, triton_kernels
from calibtrain.ops.head import Head
from calibtrain.ops.linear_blocks import compute_dtype


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
    is NaN. Where no gradient is asked for, none is prepared.

    Args:
        hidden: (N, H) floating, N may be 0.
        weight: (V, H) in the dtype of `hidden`.
        targets: (N,) int64 token ids in [0, V).
        bias: (V,) floating, or None.
        softcap: bound of the logits (Gemma 2, arXiv 2408.00118); None leaves tanh out.
        logit_scale: inverse temperature.

    Raises:
        UserError: shapes, dtypes or devices do not fit, or a target is outside [0, V). On a GPU the host does not wait to
            find the latter out: a device-side assertion fails, as in PyTorch's own cross-entropy.
    """
    check_inputs(hidden, weight, targets, bias, softcap)
    path = ops_path(hidden)
    if path == "reference":
        from calibtrain.ops.reference import reference_token_stats

        check_targets(targets, weight.shape[0])
        dtype = compute_dtype(hidden)
        return reference_token_stats(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            bias=None if bias is None else bias.to(dtype),
            softcap=softcap,
            logit_scale=logit_scale,
        )
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    keep = differentiable and path != "triton"
    results = torch.ops.calibtrain.linear_token_stats(
        hidden, weight, targets, bias, softcap, logit_scale, keep, keep and weight.requires_grad
    )
    return TokenStats(*results[:5])


@torch.no_grad()
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Log-prob of each target, (N,), no gradient: for evaluation, reference models and rollouts.

    One matrix product and one pass over a block of logits at a time; the arguments, the precision and the errors are
    those of `fused_linear_token_stats`.
    """
    return fused_linear_token_stats(
        hidden, weight, targets, bias=bias, softcap=softcap, logit_scale=logit_scale
    ).logprob


@torch.library.custom_op(
    "calibtrain::linear_token_stats",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float? softcap, float logit_scale, bool keep,"
    " bool for_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    keep: bool,
    for_weight: bool,
) -> tuple[Tensor, ...]:
    """The fields of TokenStats; the largest logit and log(sum_v exp(z_v - largest)); the two places of kept logits."""
    check_targets(targets, weight.shape[0])
    path = ops_path(hidden)
    in_gradient, beside = (hidden.new_empty(size) for size in linear_blocks.kept_sizes(weight, keep, for_weight))
    if path == "triton":
        results = triton_kernels().forward(hidden, weight, targets, bias, softcap, logit_scale)
    else:
        blocks = linear_blocks.plan_blocks(hidden, weight, in_gradient, beside)
        results = linear_blocks.forward(hidden, weight, targets, bias, Head(logit_scale, softcap), path, blocks)
    return *results, in_gradient, beside


@_forward.register_fake
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    keep: bool,
    for_weight: bool,
) -> tuple[Tensor, ...]:
    dtype, size = compute_dtype(hidden), hidden.shape[0]
    dtypes = (dtype, dtype, dtype, dtype, torch.bool, dtype, dtype)
    kept = linear_blocks.kept_sizes(weight, keep, for_weight)
    return *(hidden.new_empty((size,), dtype=output) for output in dtypes), *(hidden.new_empty(one) for one in kept)


@torch.library.custom_op(
    "calibtrain::linear_token_stats_backward",
    mutates_args=("in_gradient", "beside"),
    schema="(Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_sum_p2, Tensor hidden, Tensor weight,"
    " Tensor targets, Tensor? bias, float? softcap, float logit_scale, Tensor logprob, Tensor entropy, Tensor sum_p2,"
    " Tensor peak, Tensor log_normalizer, Tensor(a!) in_gradient, Tensor(b!) beside, bool has_kept, bool[] needed)"
    " -> (Tensor, Tensor, Tensor)",
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
    logprob: Tensor,
    entropy: Tensor,
    sum_p2: Tensor,
    peak: Tensor,
    log_normalizer: Tensor,
    in_gradient: Tensor,
    beside: Tensor,
    has_kept: bool,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias where `needed`; an empty tensor stands for each of the others.

    Where `in_gradient` is not empty, it takes the weight's gradient, and the second result is empty.
    """
    upstream = (grad_logprob, grad_entropy, grad_sum_p2)
    path = ops_path(hidden)
    if path == "triton":
        return triton_kernels().backward(
            *upstream, hidden, weight, targets, bias, softcap, logit_scale, logprob, entropy, sum_p2, peak,
            log_normalizer, needed,
        )  # fmt: skip
    head, blocks = Head(logit_scale, softcap), linear_blocks.plan_blocks(hidden, weight, in_gradient, beside)
    coefficients = torch.stack([peak, log_normalizer, *logit_coefficients(*upstream, logprob, entropy, sum_p2)])
    fresh = weight.new_empty(weight.shape if needed[1] and in_gradient.numel() == 0 else 0)
    grad_weight = None if not needed[1] else fresh if in_gradient.numel() == 0 else in_gradient
    grad_hidden, grad_bias = linear_blocks.backward(
        hidden, weight, targets, bias, head, path, blocks, has_kept, coefficients, grad_weight, needed
    )
    return grad_hidden, fresh, grad_bias if bias is None else grad_bias.to(bias.dtype)


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
    logprob: Tensor,
    entropy: Tensor,
    sum_p2: Tensor,
    peak: Tensor,
    log_normalizer: Tensor,
    in_gradient: Tensor,
    beside: Tensor,
    has_kept: bool,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    bias_dtype = compute_dtype(hidden) if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape if needed[0] else 0),
        weight.new_empty(weight.shape if needed[1] and in_gradient.numel() == 0 else 0),
        hidden.new_empty(weight.shape[0] if needed[2] else 0, dtype=bias_dtype),
    )


def logit_coefficients(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_sum_p2: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    sum_p2: Tensor,
) -> tuple[Tensor, ...]:
    """(a, b, c, at_target), (N,) each: the gradient in z_v is p_v (a + b log p_v + c p_v), and at_target for v = y.

    From d logprob / dz_v = [v = y] - p_v, d entropy / dz_v = -p_v (log p_v + entropy) and
    d sum_p2 / dz_v = 2 p_v (p_v - sum_p2).
    """
    upstream = (grad_logprob, grad_entropy, grad_sum_p2)
    of_logprob, of_entropy, of_sum = (
        torch.zeros_like(logprob) if grad is None else grad.to(logprob.dtype) for grad in upstream
    )
    p = logprob.exp()
    # 1 - p_y by expm1: it must not vanish before p_y is exactly 1, since 1 / (1 - p_y) can follow upstream.
    at_target = p * (2.0 * of_sum * (p - sum_p2) - of_entropy * (logprob + entropy)) - of_logprob * logprob.expm1()
    everywhere = -of_logprob - of_entropy * entropy - 2.0 * of_sum * sum_p2
    return everywhere, -of_entropy, 2.0 * of_sum, at_target


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, ctx.softcap, ctx.logit_scale, keep, _ = inputs
    logprob, entropy, sum_p2, confidence, correct, peak, log_normalizer, *kept = output
    ctx.kept = kept if keep else None
    ctx.mark_non_differentiable(confidence, correct, peak, log_normalizer, *kept)
    ctx.set_materialize_grads(False)  # an unused statistic costs nothing in the backward pass
    ctx.save_for_backward(hidden, weight, targets, bias, logprob, entropy, sum_p2, peak, log_normalizer)


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias, *saved = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    needed = [need_hidden, need_weight, need_bias]
    # Kept logits serve once, and their memory leaves with the weight's gradient; a second backward finds none.
    has_kept = ctx.kept is not None
    kept, ctx.kept = ctx.kept or [hidden.new_empty(0), hidden.new_empty(0)], None
    grad_hidden, grad_weight, grad_bias = torch.ops.calibtrain.linear_token_stats_backward(
        *grads[:3], hidden, weight, targets, bias, ctx.softcap, ctx.logit_scale, *saved, *kept, has_kept, needed
    )
    if kept[0].numel():
        grad_weight = kept[0]
    gradients = (g if need else None for g, need in zip((grad_hidden, grad_weight, grad_bias), needed, strict=True))
    grad_hidden, grad_weight, grad_bias = gradients
    return grad_hidden, grad_weight, None, grad_bias, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
