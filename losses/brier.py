"""Brier scores of tokens: of the whole next-token distribution, and of a confidence stated in one token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.losses.token_terms import learned_tokens, query_tokens, readable, sum_term
from calibtrain.ops import TokenStats, at_least_float32


def token_brier(logprob: Tensor, sum_p2: Tensor) -> Tensor:
    """sum_v (p_v - [v = y])^2 = 1 - 2 p_y + sum_v p_v^2 (Brier 1950), in [0, 2]; strictly proper.

    `logprob` and `sum_p2` (N,) floating, of `TokenStats`; returns (N,). Its rounding is absolute, that of 1. The gradient
    vanishes as p_y goes to 0, so it stands beside a cross-entropy, not in its place.
    """
    return 1.0 - 2.0 * at_least_float32(logprob).exp() + at_least_float32(sum_p2)


def tokenized_brier(set_logprob: Tensor, correct: Tensor) -> Tensor:
    """sum_i q_i (c - i/N)^2, q the softmax over the N + 1 confidence tokens alone (Li, Xiong, Wu, Hooi 2025, 2508.18847).

    `set_logprob` (M, N + 1) floating: log-probs or logits of the tokens of confidence 0, 1/N, ..., 1, in this order;
    `correct` (M,) in [0, 1]. Returns (M,) in [0, 1]. The confidence that minimises it is the nearest to P(c = 1). It is
    linear in q: the optimum is a point mass on that token, not a distribution to read more from, and the gradient
    vanishes as q reaches any point mass.
    """
    set_logprob = at_least_float32(set_logprob)
    levels = torch.linspace(0.0, 1.0, set_logprob.shape[-1], dtype=set_logprob.dtype, device=set_logprob.device)
    scores = (correct[:, None].to(set_logprob.dtype) - levels).square()
    return (set_logprob.softmax(dim=-1) * scores).sum(dim=-1)


class TokenBrierLoss(nn.Module):
    """Penalty: mean Brier score of the completion tokens of the CHOSEN sequences.

    Args:
        weight: of the term in the loss.
    """

    name = "token_brier"

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`token_brier`: the tokens. () int64."""
        return {"token_brier": learned_tokens(batch).sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `token_brier`."""
        read = learned_tokens(batch)
        safe = readable(stats, read)
        return {"token_brier": sum_term(token_brier(safe.logprob, safe.sum_p2), read, self.weight)}


class TokenizedBrierLoss(nn.Module):
    """Penalty: tokenised Brier score of the confidence that a QUERY sequence asks for, against the answer's grade.

    It reads the first completion token of each graded QUERY sequence whose target is a confidence token, wherever in its
    row that stands.

    Args:
        token_set: ids of the tokens of confidence 0, 1/N, ..., 1; calibtrain.data.queries.choice_ids finds them.
        weight: of the term in the loss.
    """

    name = "tokenized_brier"
    token_set: Tensor

    def __init__(self, *, token_set: Sequence[int], weight: float = 1.0) -> None:
        super().__init__()
        if len(token_set) < 2 or len(set(token_set)) != len(token_set):
            raise UserError(f"token_set must be two or more distinct token ids, got {list(token_set)}")
        self.register_buffer("token_set", torch.tensor(list(token_set), dtype=torch.int64), persistent=False)
        self.weight = weight

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`tokenized_brier`: the stated confidences. () int64."""
        return {"tokenized_brier": query_tokens(batch, self.token_set).sum()}

    def forward(self, stats: TokenStats, batch: Batch, set_logprob: Tensor) -> dict[str, LossTerm]:
        """One term, `tokenized_brier`; `set_logprob` (N, K) are the log-probs of `token_set` at every target."""
        read = query_tokens(batch, self.token_set)
        scores = tokenized_brier(
            torch.where(read[:, None], set_logprob, 0.0),
            torch.where(read, batch.correct[batch.sequence_ids], 0.0),
        )
        return {"tokenized_brier": sum_term(scores, read, self.weight)}


CATALOG = (
    LossEntry(
        name="token_brier",
        kind="penalty",
        title="Brier score of every next-token distribution",
        paper="Brier 1950, Monthly Weather Review 78(1)",
        equation="1 - 2 p_y + sum_v p_v^2",
        cost="none: reads TokenStats",
        compared_with="float64 formula over all logits",
        largest_deviation="3e-7 (value, float32), 1e-11 (value and gradient, float64)",
    ),
    LossEntry(
        name="tokenized_brier",
        kind="penalty",
        title="Brier score of a confidence stated in one token (ConfTuner)",
        paper="Li, Xiong, Wu, Hooi 2025, arXiv 2508.18847",
        equation="sum_i q_i (c - i/N)^2",
        cost="K + 1 dot products a target token, K the confidence tokens; the queries' own forward pass",
        compared_with="the authors' formula in float64 over all logits",
        largest_deviation="1e-11 (value and gradient, float64)",
        differs=(
            "The confidence is read where the data says it stands, not at position -1 of a padded batch. Tokens are "
            "checked to be single and distinct: the authors take the first token of each number, which a tokenizer that "
            "splits digits makes the same for 1, 10 and 100. Their code's default is another loss, a soft-target "
            "cross-entropy; this is the paper's. Gradients accumulate."
        ),
    ),
)
