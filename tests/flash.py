"""FlashAttention's functions in plain products, for machines without it: what transformers hands over is what counts."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """`flash_attn_varlen_func` on (tokens, heads, D): each stretch of `cu_seqlens` attends within itself."""
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q[0] == 0
    assert cu_seqlens_q[-1] == len(q)
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert causal
    assert dropout_p == 0.0
    lengths = cu_seqlens_q.diff()
    assert int(lengths.min()) > 0
    assert int(lengths.max()) <= max_seqlen_q == max_seqlen_k
    parts = [one.split(lengths.tolist()) for one in (q, k, v)]
    mixed = [_attend(*three, softmax_scale, window_size[0], softcap) for three in zip(*parts, strict=True)]
    return torch.cat(mixed)


def fixed(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """`flash_attn_func` on (rows, tokens, heads, D)."""
    rows, width = q.shape[:2]
    starts = torch.arange(0, rows * width + 1, width, dtype=torch.int32)
    flat = (one.flatten(0, 1) for one in (q, k, v))
    return varlen(*flat, starts, starts, width, width, **options).view_as(q)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, left: int, softcap: float) -> Tensor:
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for one in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    back = torch.arange(len(q))[:, None] - torch.arange(len(q))
    unseen = (back < 0) | ((back > left) if left >= 0 else torch.zeros_like(back, dtype=torch.bool))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)


def use_stand_in(monkeypatch) -> None:
    """Let transformers' flash_attention_2 call these."""
    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2", raising=False)
    for name, value in {
        "_flash_fn": fixed,
        "_flash_varlen_fn": varlen,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": flash._pad_input,
        "_unpad_fn": flash._unpad_input,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(varlen),
        "_process_with_kvcache_kwargs_fn": dict,
    }.items():
        monkeypatch.setattr(flash, name, value, raising=False)
