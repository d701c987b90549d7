"""Which sequences of a batch are the two answers of one preference pair, and the logistic loss of their margin."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from calibtrain.errors import UserError
from calibtrain.losses.terms import CHOSEN, REJECTED, Batch, LossTerm, sequence_token_counts


class Pairs(NamedTuple):
    """Where the pairs of a batch are. There are at most S of them, so their shapes need no device-to-host copy."""

    completion_tokens: Tensor  # (S,) int64
    chosen: Tensor  # (S,) int64: pair of a chosen sequence with tokens, S elsewhere
    rejected: Tensor  # (S,) int64: pair of a rejected sequence with tokens, S elsewhere
    complete: Tensor  # (S,) bool, by pair id

    @property
    def members(self) -> Tensor:
        """Sequences of pairs, complete or not, that have tokens. (S,) bool."""
        return torch.minimum(self.chosen, self.rejected) < self.chosen.shape[0]

    def split(self, values: Tensor, fill: float) -> tuple[Tensor, Tensor]:
        """`values` (S,) of the chosen and of the rejected sequences, by pair (S,); `fill` where no pair is complete."""
        chosen, rejected = (
            torch.where(self.complete, by_pair(values, slots), fill) for slots in (self.chosen, self.rejected)
        )
        return chosen, rejected

    def term(self, losses: Tensor) -> LossTerm:
        """Sum of `losses` (S,), by pair, over the complete pairs."""
        return LossTerm(torch.where(self.complete, losses, 0.0).sum(), self.complete.sum())


def find_pairs(batch: Batch, usable: Tensor | None = None) -> Pairs:
    """Pairs that have exactly one chosen and one rejected completion, neither empty and both `usable` (S,) bool."""
    num_sequences = batch.roles.shape[0]
    tokens = sequence_token_counts(batch.is_completion, batch.sequence_ids, num_sequences)
    paired = (batch.pair_ids >= 0) & (tokens > 0)
    if usable is not None:
        paired = paired & usable
    chosen, rejected = (
        torch.where(paired & (batch.roles == role), batch.pair_ids, num_sequences) for role in (CHOSEN, REJECTED)
    )
    one_chosen, one_rejected = (by_pair(torch.ones_like(tokens), slots) == 1 for slots in (chosen, rejected))
    return Pairs(tokens, chosen, rejected, one_chosen & one_rejected)


def by_pair(values: Tensor, slots: Tensor) -> Tensor:
    """Sum of `values` (S,) by pair, (S,); slot S takes what belongs to no pair and is dropped."""
    size = values.shape[0]
    return values.new_zeros(size + 1).index_add(0, slots, values)[:size]


def preference_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), e = `label_smoothing`: least at m = log((1 - e) / e).

    That is the log odds of a preference that holds with probability 1 - e (Mitchell 2023, "A note on DPO with noisy
    preferences"). `margin` of any shape, float32 or float64; finite in value and gradient everywhere.
    """
    if label_smoothing == 0.0:
        return -logsigmoid(margin)
    return -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise UserError for a share of wrong preferences at which they would say nothing, or the reverse."""
    if not 0.0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")


def check_positive(**options: float) -> None:
    """Raise UserError for an option that is not above 0."""
    for name, value in options.items():
        if not value > 0.0:
            raise UserError(f"{name} must be positive, got {value}")
