"""Log-probs of known answers at many temperatures at once: one product and one walk over the vocabulary for all."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from calibtrain.ops import block_cpp, block_torch
from calibtrain.ops.block_torch import PEAK, POISON, TARGET
from calibtrain.ops.checks import check_inputs, check_targets, check_temperatures
from calibtrain.ops.dispatch import ops_path, triton_kernels
from calibtrain.ops.head import Head
from calibtrain.ops.linear_blocks import block_width, compute_dtype

GPU_BLOCK_BYTES = 2**27
"""Memory for a block of logits on a GPU (128 MiB), whose kernel needs them there."""


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

    `temperatures` is (K,), floating and positive; the other arguments and the errors are those of
    `fused_linear_token_stats`. One matrix product for all temperatures.

    The logits are float32 here whatever the inputs' dtype (float64 for float64), since an error e of a logit is one of
    up to 2 e / T in a log-prob. With 49152 logits of 576 terms each and standard deviation 3 a log-prob is off by less
    than 1e-5 / T + 1e-6, in float32 and bfloat16 alike. Where TF32 is allowed, a GPU rounds float32 inputs to it.
    """
    check_inputs(hidden, weight, targets, bias, softcap)
    check_targets(targets, weight.shape[0])
    check_temperatures(temperatures)
    dtype, path = compute_dtype(hidden), ops_path(hidden)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    inverse = temperatures.to(hidden.device, torch.float64).reciprocal()
    state, rest = block_torch.new_temperature_state(tokens, inverse.shape[0], hidden.device)
    if tokens:
        kernel = _kernel(path)
        width = block_width(tokens, vocabulary)
        if path == "triton":
            width = min(vocabulary, max(width, GPU_BLOCK_BYTES // (4 * tokens)))
        left, targets, head = hidden.to(dtype), targets.contiguous(), Head(logit_scale, softcap)
        offsets = None if bias is None else bias.to(dtype).contiguous()
        block = left.new_empty(tokens * width)
        for start in range(0, vocabulary, width):
            rows = weight[start : start + width].to(dtype)
            products = torch.mm(left, rows.t(), out=block[: tokens * rows.shape[0]].view(tokens, rows.shape[0]))
            block_bias = None if offsets is None else offsets[start : start + width]
            kernel.update_temperatures(state, rest, products, start, targets, block_bias, head, inverse)
    below = (state[TARGET] - state[PEAK] + state[POISON])[:, None]
    return (below * inverse - rest.log1p().t()).to(dtype)


def _kernel(path: str) -> ModuleType:
    if path == "triton":
        return triton_kernels()
    return block_cpp if path == "cpp" and block_cpp.load() is not None else block_torch
