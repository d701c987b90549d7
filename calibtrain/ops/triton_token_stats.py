"""Linear token statistics on CUDA: launches of the kernels in `triton_kernels` and the two products of the backward.

The forward holds (splits, N) partial statistics and no logits. The backward holds the gradient of a block of logits, all
tokens by as many token ids as GRADIENT_BYTES allows, and gives it to cuBLAS for the gradients of hidden and weight.

Block sizes come from the table BLOCKS and are never searched for at run time, and no kernel uses atomics: on one kind of
GPU equal inputs give equal bits, whether or not torch.use_deterministic_algorithms is on (cuBLAS has its own rule).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from calibtrain.ops.head import Head

GRADIENT_BYTES = 2**27
"""Memory for the gradient of a block of logits (128 MiB), if that holds MIN_COLUMNS token ids."""
MIN_COLUMNS = 1024
"""Token ids at least in a block of the backward: narrower ones would wait for memory, not for arithmetic."""
FEW_TOKENS = 64
"""Up to here the forward takes the blocks for few tokens: it is bound by reading the weight."""
WAVES = 8
"""Programs of the forward per multiprocessor, at least: the last, half-empty wave is then a small part."""
GROUP = 8
"""Column blocks whose programs run side by side in the backward, to share rows in the L2 cache."""
COMBINE_TOKENS = 128
TEMPERATURE_TERMS, TEMPERATURE_WARPS = 4096, 4
"""Logits times temperatures that a program of `temperature_sums` holds at once, and its warps."""


class Blocks(NamedTuple):
    """Logits a program holds, how many of their H terms it loads at once, and how it is run."""

    tokens: int
    vocabulary: int
    hidden: int
    warps: int
    stages: int


class Table(NamedTuple):
    """Blocks of one GPU architecture for one size of input elements."""

    statistics: Blocks
    statistics_few: Blocks
    gradients: Blocks


# Chosen from registers, shared memory and spills of the compiled kernels (docs/kernels.md), not from timings: none of
# these has run on a GPU. Rows of sm_80 stay under 99 KiB of shared memory, which sm_86, sm_89 and sm_120 have.
BLOCKS: dict[tuple[int, int], Table] = {
    (80, 2): Table(Blocks(128, 128, 64, 8, 3), Blocks(64, 64, 64, 4, 3), Blocks(128, 128, 32, 8, 4)),
    (80, 4): Table(Blocks(64, 64, 32, 4, 3), Blocks(64, 64, 32, 4, 3), Blocks(64, 64, 32, 4, 3)),
    (90, 2): Table(Blocks(128, 128, 64, 8, 4), Blocks(64, 128, 64, 4, 4), Blocks(128, 128, 64, 8, 4)),
    (90, 4): Table(Blocks(128, 64, 32, 8, 4), Blocks(64, 64, 32, 4, 4), Blocks(128, 64, 32, 4, 4)),
    (100, 2): Table(Blocks(128, 64, 64, 8, 4), Blocks(64, 64, 64, 4, 4), Blocks(128, 128, 64, 8, 4)),
    (100, 4): Table(Blocks(128, 64, 32, 8, 4), Blocks(64, 64, 32, 4, 4), Blocks(128, 64, 32, 4, 4)),
}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # of A100, H100 and B200: a constant, so that results are one's own


def architecture(major: int) -> int:
    """Key of BLOCKS for a CUDA compute capability: consumer GPUs take the rows that need the least shared memory."""
    return {9: 90, 10: 100}.get(major, 80)


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> tuple[Tensor, ...]:
    """logprob, entropy, sum_p2, confidence, correct, peak and log_normalizer, (N,) each; bool and float32.

    `hidden` (N, H) and `weight` (V, H) are float32, bfloat16 or float16; targets are in [0, V).
    """
    from calibtrain.ops import triton_kernels

    num_tokens, arch = hidden.shape[0], _architecture_of(hidden)
    statistics = hidden.new_empty((6, num_tokens), dtype=torch.float32)
    correct = hidden.new_empty((num_tokens,), dtype=torch.bool)
    if num_tokens == 0:
        return *(row.clone() for row in statistics[:4]), correct, *(row.clone() for row in statistics[4:])
    table = BLOCKS[arch, hidden.element_size()]
    blocks = table.statistics_few if num_tokens <= FEW_TOKENS else table.statistics
    row_blocks, column_blocks = _ceil(num_tokens, blocks.tokens), _ceil(weight.shape[0], blocks.vocabulary)
    per_split = _ceil(column_blocks, _ceil(WAVES * MULTIPROCESSORS[arch], row_blocks))
    splits = _ceil(column_blocks, per_split)
    partials = hidden.new_empty((5, splits, num_tokens), dtype=torch.float32)
    tops = hidden.new_empty((splits, num_tokens), dtype=torch.int32)
    shared = _shared_arguments(hidden, weight, bias, softcap, logit_scale, blocks)
    targets = targets.contiguous()
    with torch.cuda.device_of(hidden):
        triton_kernels.partial_statistics[row_blocks, splits](
            targets=targets, partials=partials, tops=tops, blocks_per_split=per_split, **shared
        )
        triton_kernels.combine_statistics[(_ceil(num_tokens, COMBINE_TOKENS),)](
            partials, tops, targets, statistics, correct.view(torch.int8), num_tokens, splits, COMBINE_TOKENS
        )
    # Copies: an operator's outputs may not share memory.
    logprob, entropy, sum_p2, confidence, peak, log_normalizer = (row.clone() for row in statistics)
    return logprob, entropy, sum_p2, confidence, correct, peak, log_normalizer


def backward(
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
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias where `needed`, in their dtypes; an empty tensor for each of the others."""
    from calibtrain.ops.token_stats import logit_coefficients

    need_hidden, need_weight, need_bias = needed
    coefficients = torch.stack(
        [
            peak,
            log_normalizer,
            *logit_coefficients(grad_logprob, grad_entropy, grad_sum_p2, logprob, entropy, sum_p2),
        ]
    )
    hidden, weight, targets = _rows(hidden), _rows(weight), targets.contiguous()
    num_tokens, vocabulary = hidden.shape[0], weight.shape[0]
    sums = hidden.new_zeros(hidden.shape if need_hidden else 0, dtype=torch.float32)
    grad_weight = weight.new_empty(weight.shape if need_weight else 0)
    grad_bias = hidden.new_empty(vocabulary if need_bias else 0, dtype=torch.float32 if bias is None else bias.dtype)
    if num_tokens == 0 or not any(needed):
        return sums.to(hidden.dtype), grad_weight.zero_(), grad_bias.zero_()
    blocks = BLOCKS[_architecture_of(hidden), hidden.element_size()].gradients
    width = _backward_columns(num_tokens, vocabulary, hidden.element_size(), blocks.vocabulary)
    block = hidden.new_empty((num_tokens, width))
    for start in range(0, vocabulary, width):
        columns = slice(start, min(start + width, vocabulary))
        gradients = block[:, : columns.stop - start]
        bias_sums = _launch_gradients(
            hidden, weight, targets, bias, softcap, logit_scale, coefficients, gradients, start, need_bias, blocks
        )
        if need_hidden:
            _add_product(sums, gradients, weight[columns])
        if need_weight:
            torch.mm(gradients.t(), hidden, out=grad_weight[columns])
        if need_bias:
            grad_bias[columns] = bias_sums.sum(dim=0)
    return sums.to(hidden.dtype), grad_weight, grad_bias


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
    """As `block_torch.update_temperatures`, for float32 products and bias, all contiguous: one launch."""
    import triton

    from calibtrain.ops import triton_kernels

    if not inverse.numel():
        return
    num_tokens, width = products.shape
    kinds = triton.next_power_of_2(inverse.shape[0])
    with torch.cuda.device_of(products):
        triton_kernels.temperature_sums[(num_tokens,)](
            products, products if bias is None else bias, targets, inverse, state, rest, num_tokens, start, width,
            inverse.shape[0], head.softcap or 1.0, head.logit_scale,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=head.softcap is not None,
            BLOCK_V=max(16, TEMPERATURE_TERMS // kinds), BLOCK_K=kinds, num_warps=TEMPERATURE_WARPS,
        )  # fmt: skip


def _launch_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    coefficients: Tensor,
    gradients: Tensor,
    first_column: int,
    need_bias: bool,
    blocks: Blocks,
) -> Tensor:
    """Fill `gradients` (N, columns) from `first_column` on; returns each row block's sum over its tokens, if needed."""
    from calibtrain.ops import triton_kernels

    num_tokens, num_columns = gradients.shape
    row_blocks = _ceil(num_tokens, blocks.tokens)
    bias_partials = hidden.new_empty((row_blocks, num_columns) if need_bias else 0, dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        triton_kernels.logit_gradients[(row_blocks * _ceil(num_columns, blocks.vocabulary),)](
            targets=targets,
            coefficients=coefficients,
            gradients=gradients,
            bias_partials=bias_partials,
            first_column=first_column,
            num_columns=num_columns,
            gradient_stride=gradients.stride(0),
            NEED_BIAS=need_bias,
            GROUP=GROUP,
            **_shared_arguments(hidden, weight, bias, softcap, logit_scale, blocks),
        )
    return bias_partials


def _shared_arguments(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float, blocks: Blocks
) -> dict[str, Any]:
    """Arguments of both kernels that make logits; the kernels read every tensor but `hidden` and `weight` as contiguous."""
    from triton import knobs

    hidden, weight = _rows(hidden), _rows(weight)
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": weight if bias is None else bias.contiguous(),
        "num_tokens": hidden.shape[0],
        "vocabulary": weight.shape[0],
        "hidden_size": hidden.shape[1],
        "hidden_stride": hidden.stride(0),
        "weight_stride": weight.stride(0),
        "softcap": softcap or 1.0,
        "scale": logit_scale,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "EVEN_H": hidden.shape[1] % blocks.hidden == 0,
        "UPCAST": knobs.runtime.interpret,
        "PRECISION": "tf32" if tf32_allowed() else "ieee",
        "BLOCK_N": blocks.tokens,
        "BLOCK_V": blocks.vocabulary,
        "BLOCK_H": blocks.hidden,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def tf32_allowed() -> bool:
    """Whether float32 products may run in TF32, by torch's new setting (2.9) or its old one.

    Where a user has set the new one, torch raises for every read of the old. The new one knows of both.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to float32 `total`; a product of 16-bit matrices is summed and left in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=torch.float32)
    else:  # the interpreter's tensors: PyTorch has that product on CUDA alone
        total.addmm_(left.float(), right.float())


def _backward_columns(num_tokens: int, vocabulary: int, element_size: int, multiple: int) -> int:
    """Token ids per block of the backward: a multiple of the kernel's, within the budget."""
    columns = max(MIN_COLUMNS, GRADIENT_BYTES // (element_size * num_tokens))
    return min(vocabulary, _ceil(columns, multiple) * multiple)


def _architecture_of(tensor: Tensor) -> int:
    return architecture(torch.cuda.get_device_capability(tensor.device)[0]) if tensor.is_cuda else 80


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _ceil(size: int, block: int) -> int:
    return -(-size // block)
