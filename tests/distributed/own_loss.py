"""A loss of one's own, as a user would write it."""

from __future__ import annotations

import torch
from torch import Tensor

from calibtrain.losses import Batch, LossTerm
from calibtrain.ops import TokenStats


class Mine(torch.nn.Module):
    """The mean surprise at the completions' tokens, squared."""

    name = "mine"

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Completion tokens."""
        return {"mine": batch.is_completion.sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """Over this micro-batch."""
        surprise = stats.logprob[batch.is_completion].square().sum()
        return {"mine": LossTerm(0.1 * surprise, batch.is_completion.sum())}
