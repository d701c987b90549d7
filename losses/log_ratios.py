"""Log-probs of whole completions, alone and against a frozen reference: what preference optimisation compares."""

from __future__ import annotations

import torch
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.losses.terms import Batch, sequence_sums, sequence_token_counts
from calibtrain.ops import TokenStats, at_least_float32


def reference_known(batch: Batch) -> Tensor:
    """Sequences with a completion whose tokens all have a reference log-prob. (S,) bool."""
    if batch.reference_logprob is None:
        return torch.zeros_like(batch.roles, dtype=torch.bool)
    size = batch.roles.shape[0]
    tokens, known = (
        sequence_token_counts(mask, batch.sequence_ids, size)
        for mask in (batch.is_completion, batch.is_completion & ~batch.reference_logprob.isnan())
    )
    return (tokens > 0) & (known == tokens)


def log_ratios(stats: TokenStats, batch: Batch, read: Tensor) -> Tensor:
    """Log pi(y|x) - log pi_ref(y|x) of each completion where `read` (S,) bool holds, and 0 elsewhere. (S,).

    `read` is within `reference_known(batch)`. Raises UserError for a batch without reference log-probs.
    """
    if batch.reference_logprob is None:
        if batch.targets.numel():
            raise UserError(
                "this batch has no reference log-probs: give those of the starting model, "
                "dataclasses.replace(batch, reference_logprob=...)"
            )
        return at_least_float32(stats.logprob).new_zeros(batch.roles.shape[0])
    tokens = read[batch.sequence_ids] & batch.is_completion
    # Token by token: near the reference the ratio keeps digits that are lost in the sums.
    policy, reference = (torch.where(tokens, one, 0.0) for one in (stats.logprob, batch.reference_logprob))
    ratio = at_least_float32(policy) - at_least_float32(reference)
    return sequence_sums(ratio, batch.sequence_ids, batch.roles.shape[0])


def mean_logprobs(stats: TokenStats, batch: Batch, read: Tensor) -> Tensor:
    """Log pi(y|x) / |y| of each completion where `read` (S,) bool holds, and 0 elsewhere. (S,)."""
    size = batch.roles.shape[0]
    logprob = torch.where(read[batch.sequence_ids] & batch.is_completion, stats.logprob, 0.0)
    tokens = sequence_token_counts(batch.is_completion, batch.sequence_ids, size)
    return sequence_sums(logprob, batch.sequence_ids, size) / tokens.clamp(min=1)
