"""Which sequences of a batch are the two answers of one preference pair."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from calibtrain.losses.terms import CHOSEN, REJECTED, Batch, sequence_token_counts


class Pairs(NamedTuple):
    """Where the pairs of a batch are. There are at most S of them, so their shapes need no device-to-host copy."""

    completion_tokens: Tensor  # (S,) int64
    chosen: Tensor  # (S,) int64: pair of a chosen sequence with tokens, S elsewhere
    rejected: Tensor  # (S,) int64: pair of a rejected sequence with tokens, S elsewhere
    complete: Tensor  # (S,) bool, by pair id

    def split(self, values: Tensor, fill: float) -> tuple[Tensor, Tensor]:
        """`values` (S,) of the chosen and of the rejected sequences, by pair (S,); `fill` where no pair is complete."""
        chosen, rejected = (
            torch.where(self.complete, by_pair(values, slots), fill) for slots in (self.chosen, self.rejected)
        )
        return chosen, rejected


def find_pairs(batch: Batch) -> Pairs:
    """Pairs that have exactly one chosen and one rejected completion, neither empty."""
    num_sequences = batch.roles.shape[0]
    tokens = sequence_token_counts(batch.is_completion, batch.sequence_ids, num_sequences)
    paired = (batch.pair_ids >= 0) & (tokens > 0)
    chosen, rejected = (
        torch.where(paired & (batch.roles == role), batch.pair_ids, num_sequences) for role in (CHOSEN, REJECTED)
    )
    one_chosen, one_rejected = (by_pair(torch.ones_like(tokens), slots) == 1 for slots in (chosen, rejected))
    return Pairs(tokens, chosen, rejected, one_chosen & one_rejected)


def by_pair(values: Tensor, slots: Tensor) -> Tensor:
    """Sum of `values` (S,) by pair, (S,); slot S takes what belongs to no pair and is dropped."""
    size = values.shape[0]
    return values.new_zeros(size + 1).index_add(0, slots, values)[:size]
