"""The ops in plain PyTorch, written as their formulas: slow, holding every logit, and what tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from calibtrain.ops.token_stats import TokenStats


def reference_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """All logits, softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap): (N, V) in the inputs' dtype."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = logit_scale * logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenStats:
    """`fused_linear_token_stats` from the log-softmax of all logits, in the dtype of the inputs (give it float64)."""
    logits = reference_logits(hidden, weight, bias=bias, softcap=softcap, logit_scale=logit_scale)
    return token_stats_of_logits(logits, targets)


def token_stats_of_logits(logits: Tensor, targets: Tensor) -> TokenStats:
    """Statistics of `targets` (N,) from all logits (N, V), in their dtype."""
    logp = torch.log_softmax(logits, dim=1)
    p = logp.exp()
    confidence, top = p.detach().max(dim=1)
    return TokenStats(
        logprob=logp.gather(1, targets[:, None])[:, 0],
        entropy=-(p * logp).sum(dim=1),
        sum_p2=p.square().sum(dim=1),
        confidence=confidence,
        correct=top == targets,
    )
