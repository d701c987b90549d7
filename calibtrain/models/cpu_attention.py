"""Attention for training in bf16 on a CPU: batched matrix products where torch's fused kernel is slow.

The backward pass of `scaled_dot_product_attention` on CPU spends, in bf16 and on rows as short as answers are, ten times
the products themselves (8 rows of 40 tokens, 9 heads of 64: 17 ms, here 3 ms; of 192 tokens: 52 ms, here 30 ms). This is
transformers' own eager attention, softmax in float32, without copying keys and values for grouped queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "cpu_products"
"""Its name among transformers' attention implementations, once registered."""
WIDEST_ROW = 512
"""Tokens; wider rows would hold (heads, T, T) probabilities of every layer, and the fused kernel catches up."""


def register() -> str:
    """Make the attention known to transformers. Returns its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:  # what stands there may have been wrapped (sequence_parallel)
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of query (B, heads, T, D) over key and value (B, groups, T, D). Returns (B, T, heads, D).

    `attention_mask` is (B, 1, T, T), boolean or additive; None is causal. What this does not do itself (no gradient,
    decoding, wide rows, dropout, other dtypes or devices, options) goes to transformers' SDPA attention.
    """
    plain = all(options.get(name) is None for name in ("softcap", "position_bias", "cache", "s_aux", "is_causal"))
    width = query.shape[2]
    suits = query.dtype == torch.bfloat16 and query.device.type == "cpu" and 1 < width <= WIDEST_ROW
    if not (suits and plain and not dropout and key.shape[2] == width and query.requires_grad):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    # The queries of a group meet their key and value as one taller matrix.
    scores = (query * scale).reshape(batch, groups, -1, size) @ key.transpose(2, 3)
    scores = scores.view(batch, groups, heads // groups, width, width)
    if attention_mask is None:
        later = torch.ones(width, width, dtype=torch.bool, device=query.device).triu_(1)
        scores = scores.masked_fill(later, float("-inf"))
    elif attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask[:, :, None], torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask[:, :, None]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = weights.view(batch, groups, -1, width) @ value
    return mixed.view(batch, heads, width, size).transpose(1, 2).contiguous(), None
