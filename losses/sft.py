"""Supervised fine-tuning: negative log-likelihood of the chosen sequences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.terms import Batch, LossTerm, sequence_sums, sequence_token_counts
from calibtrain.losses.token_terms import NLLScope, learned_tokens
from calibtrain.ops import TokenStats, at_least_float32

NLLNorm = Literal["token", "sequence"]


def nll_token_sum(logprob: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """-sum_t w_t mask_t log p_t. `logprob` and `weights` (N,) floating, `mask` (N,) bool; returns (), 0 without tokens."""
    kept = torch.where(mask, at_least_float32(logprob), 0.0)
    return -(kept if weights is None else kept * weights.to(kept)).sum()


def nll_sequence_sum(
    logprob: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int, weights: Tensor | None = None
) -> Tensor:
    """-sum_s w_s (sum_{t in s} mask_t log p_t) / (sum_{t in s} mask_t), over the sequences that have tokens.

    `logprob` (N,) floating, `mask` (N,) bool, `sequence_ids` (N,) int64 in [0, num_sequences), `weights` (num_sequences,)
    floating; returns ().
    """
    logprob = torch.where(mask, at_least_float32(logprob), 0.0)
    sums = sequence_sums(logprob, sequence_ids, num_sequences)
    means = sums / sequence_token_counts(mask, sequence_ids, num_sequences).clamp(min=1)
    return -(means if weights is None else means * weights.to(means)).sum()


class SFTLoss(nn.Module):
    """Cross-entropy on the completions, or on prompts and completions, of the CHOSEN sequences; others are ignored.

    A sequence of weight w (`batch.weights`) counts as if it stood w times in the batch.

    Args:
        nll_scope: "completion", or "full" for every target token of the sequence.
        nll_norm: "token" weighs every token alike, "sequence" every sequence.
    """

    name = "sft"

    def __init__(self, *, nll_scope: NLLScope = "completion", nll_norm: NLLNorm = "token") -> None:
        super().__init__()
        if nll_scope not in ("completion", "full") or nll_norm not in ("token", "sequence"):
            raise UserError(
                f"nll_scope must be completion|full and nll_norm token|sequence, got {nll_scope!r}, {nll_norm!r}"
            )
        self.nll_scope = nll_scope
        self.nll_norm = nll_norm

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`nll`: the tokens, or the sequences that have any, () int64; where they have weights their sum, () float64."""
        mask = learned_tokens(batch, self.nll_scope)
        if self.nll_norm == "sequence":
            mask = sequence_token_counts(mask, batch.sequence_ids, batch.roles.shape[0]) > 0
        if batch.weights is None:
            return {"nll": mask.sum()}
        weights = batch.weights if self.nll_norm == "sequence" else batch.weights[batch.sequence_ids]
        return {"nll": torch.where(mask, weights.double(), 0.0).sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `nll`."""
        mask = learned_tokens(batch, self.nll_scope)
        if self.nll_norm == "token":
            weights = None if batch.weights is None else batch.weights[batch.sequence_ids]
            total = nll_token_sum(stats.logprob, mask, weights)
        else:
            total = nll_sequence_sum(stats.logprob, mask, batch.sequence_ids, batch.roles.shape[0], batch.weights)
        return {"nll": LossTerm(total, self.counts(batch)["nll"])}


CATALOG = (
    LossEntry(
        name="sft",
        kind="objective",
        title="Cross-entropy of the completions",
        paper="Good 1952, J. R. Stat. Soc. B 14(1): the logarithmic score",
        equation="-log p_y",
        cost="none: reads TokenStats",
        compared_with="transformers 5.23.0, the model's own loss",
        largest_deviation="1e-6 (value), 1e-5 (gradient)",
        differs="One global mean over ranks and micro-batches, of tokens or of sequences.",
    ),
)
