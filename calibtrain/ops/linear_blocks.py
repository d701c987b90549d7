"""The walk over blocks of the vocabulary that every CPU path shares: products, where their logits are kept, gradients.

Forward, a block's logits update the running sums of all N tokens. Backward, its logits become their gradient in place,
which gives the block's rows of the weight's gradient in one product over all tokens, finished and rounded once, and adds
to the hidden states' gradient, summed in float32. No buffer of (V, H) float32 is needed.

Three products are the least (logits, gradient of hidden, gradient of weight); a fourth computes a block's logits again.
Kept logits save it. They wait inside the memory of the weight's own gradient, which is free until their turn comes, and
in half as much memory beside it; what fits into neither is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from calibtrain.ops import block_cpp, block_torch
from calibtrain.ops.block_torch import MOMENT, PEAK, POISON, REST, SQUARES, TARGET, new_state
from calibtrain.ops.head import Head

BLOCK_LOGITS = 2**22
"""Logits of one block (elements): 8 MiB in bfloat16, which a level-3 cache holds."""

LEAST_WIDTH = 512
"""Vocabulary entries of a block however many tokens there are: below it the matrix products slow down."""


def kept_sizes(weight: Tensor, keep: bool, for_weight: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two places of kept logits: the weight's gradient, and the memory beside it.

    A frozen weight has no gradient to keep logits in; all of what that would take is then beside.
    """
    size = weight.numel()
    beside = 0 if not keep else size // 2 if for_weight else size
    return (tuple(weight.shape) if keep and for_weight else (0,)), (beside,)


@dataclass(frozen=True)
class Blocks:
    """Blocks of the vocabulary for N tokens and where the logits of each are."""

    tokens: int
    vocabulary: int
    width: int
    in_gradient: Tensor  # (V, H) or empty; holds the first `kept_in_gradient` blocks, at its end
    beside: Tensor  # holds the next `kept_beside` blocks
    kept_in_gradient: int
    kept_beside: int
    scratch: Tensor  # for a block of the rest

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First entry and one past the last of each block."""
        return [(start, min(start + self.width, self.vocabulary)) for start in range(0, self.vocabulary, self.width)]

    def kept(self, block: int) -> bool:
        """Whether the logits of a block stay until the backward pass."""
        return block < self.kept_in_gradient + self.kept_beside

    def place(self, block: int) -> Tensor:
        """Memory of a block's logits, (N, width of the block)."""
        width = min(self.width, self.vocabulary - block * self.width)
        size = self.tokens * self.width
        if block < self.kept_in_gradient:
            memory, start = self.in_gradient.view(-1), self.in_gradient.numel() - (self.kept_in_gradient - block) * size
        elif self.kept(block):
            memory, start = self.beside, (block - self.kept_in_gradient) * size
        else:
            memory, start = self.scratch, 0
        return memory[start : start + self.tokens * width].view(self.tokens, width)


def plan_blocks(hidden: Tensor, weight: Tensor, in_gradient: Tensor, beside: Tensor) -> Blocks:
    """Cut the vocabulary into blocks and fill both places with as many as they hold, whole blocks only.

    Gradient rows are written from the start of `in_gradient` while kept blocks are read towards its end: block b of k
    must end before rows of blocks 0 to b reach it, which is so for all b when it is for the first and the last.
    """
    tokens, (vocabulary, size) = hidden.shape[0], weight.shape
    width = block_width(tokens, vocabulary)
    number, full = -(-vocabulary // width), vocabulary // width
    logits, rows = tokens * width, size * width
    first = second = 0
    if tokens and in_gradient.numel():
        first = max(0, min((in_gradient.numel() - rows) // logits, (in_gradient.numel() - logits) // rows, full))
    if tokens:
        second = min(beside.numel() // logits, full - first)
        # A last, narrower block fits where whole ones have left room.
        second += first + second == full < number and beside.numel() >= second * logits + tokens * (vocabulary % width)
    scratch = hidden.new_empty(logits if first + second < number else 0)
    return Blocks(tokens, vocabulary, width, in_gradient, beside, first, second, scratch)


def block_width(tokens: int, vocabulary: int) -> int:
    """Vocabulary entries of a block of all tokens."""
    return min(vocabulary, max(LEAST_WIDTH, BLOCK_LOGITS // max(tokens, 1) // 64 * 64))


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head: Head, path: str, blocks: Blocks
) -> tuple[Tensor, ...]:
    """Logprob, entropy, sum_p2, confidence, correct, largest logit and log(sum_v exp(z_v - largest)), (N,) each."""
    state, top = _run(hidden, weight, targets, bias, head, path, blocks)
    poison, dtype = state[POISON], compute_dtype(hidden)
    normalizer, log_normalizer = 1.0 + state[REST], state[REST].log1p()
    logprob = state[TARGET] - state[PEAK] - log_normalizer
    entropy = log_normalizer - state[MOMENT] / normalizer
    sum_p2 = (1.0 + state[SQUARES]) / normalizer.square()
    numbers = (logprob, entropy, sum_p2, normalizer.reciprocal(), state[PEAK], log_normalizer)
    logprob, entropy, sum_p2, confidence, peak, log_normalizer = ((x + poison).to(dtype) for x in numbers)
    return logprob, entropy, sum_p2, confidence, top == targets, peak, log_normalizer


def backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    path: str,
    blocks: Blocks,
    has_kept: bool,
    coefficients: Tensor,
    grad_weight: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and bias, empty where not needed; fills `grad_weight` (V, H), where there is one.

    `coefficients` is that of `block_torch.form_gradient`; `grad_weight` may be the memory that holds kept logits.
    """
    need_hidden, _, need_bias = needed
    kernels, targets, dtype = _kernels(path), targets.contiguous(), compute_dtype(hidden)
    bias = None if bias is None else bias.to(dtype).contiguous()
    total = hidden.new_zeros(hidden.shape if need_hidden else 0, dtype=dtype)
    part = None if dtype == hidden.dtype else hidden.new_empty(total.shape)
    grad_bias = hidden.new_empty(weight.shape[0] if need_bias else 0, dtype=dtype)
    for block, (start, end) in enumerate(blocks.ranges if blocks.tokens else ()):
        rows, products = weight[start:end], blocks.place(block)
        if not (has_kept and blocks.kept(block)):
            torch.mm(hidden, rows.t(), out=products)
        block_bias = None if bias is None else bias[start:end]
        kernels.form_gradient(products, start, targets, coefficients, block_bias, head)
        if need_hidden and part is None:
            total.addmm_(products, rows)
        elif need_hidden:
            total += torch.mm(products, rows, out=part)
        if need_bias:
            grad_bias[start:end] = products.sum(dim=0, dtype=dtype)
        if grad_weight is not None:
            torch.mm(products.t(), hidden, out=grad_weight[start:end])
    if blocks.tokens == 0:
        grad_bias.zero_()
        if grad_weight is not None:
            grad_weight.zero_()
    return total.to(hidden.dtype), grad_bias


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _run(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head: Head, path: str, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Running sums over the whole vocabulary, and the largest entry's id."""
    kernels, targets = _kernels(path), targets.contiguous()
    bias = None if bias is None else bias.to(compute_dtype(hidden)).contiguous()
    state, top = new_state(blocks.tokens, hidden.device)
    for block, (start, end) in enumerate(blocks.ranges if blocks.tokens else ()):
        products = torch.mm(hidden, weight[start:end].t(), out=blocks.place(block))
        block_bias = None if bias is None else bias[start:end]
        kernels.update_stats(state, top, products, start, targets, block_bias, head)
    return state, top


def _kernels(path: str) -> ModuleType:
    return block_cpp if path == "cpp" and block_cpp.load() is not None else block_torch
