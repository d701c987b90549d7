"""ORPO: odds-ratio preference optimisation without a reference model (Hong, Lee, Thorne 2024, arXiv 2403.07691)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from calibtrain.losses.sft import NLLNorm, NLLScope, SFTLoss
from calibtrain.losses.terms import CHOSEN, REJECTED, Batch, LossTerm, sequence_sums, sequence_token_counts
from calibtrain.ops import TokenStats, log1mexp


def log_odds(logprob_mean: Tensor) -> Tensor:
    """log(P / (1 - P)) with P = exp(logprob_mean) (eq. 4). Any shape; finite at logprob_mean = 0 (see `log1mexp`)."""
    return logprob_mean - log1mexp(logprob_mean)


def orpo_odds_ratio_loss(chosen_logprob_mean: Tensor, rejected_logprob_mean: Tensor) -> Tensor:
    """L_OR = -log sigmoid(log odds(y_w|x) - log odds(y_l|x)) of each pair (eqs. 5 and 7 of arXiv 2403.07691).

    Both (P,) floating: log-probs of the completions divided by their lengths, (1/m) log P(y|x). Returns (P,) float32 or
    float64. Finite, in value and gradient, for log-probs from 0 to -1e4 and below.
    """
    return -logsigmoid(log_odds(chosen_logprob_mean) - log_odds(rejected_logprob_mean))


class ORPOLoss(nn.Module):
    """Negative log-likelihood of the chosen sequences plus beta times the odds-ratio loss of the pairs (eq. 6).

    The odds ratio uses the completion tokens whatever `nll_scope` is. A pair counts when it has exactly one chosen and
    one rejected completion, neither empty. ANSWER sequences are ignored.

    Args:
        beta: weight of the odds-ratio term, the paper's lambda.
        nll_scope: "completion", or "full" for prompt and completion, as TRL and the authors' code do.
        nll_norm: "token" weighs every token alike, "sequence" every sequence.
    """

    name = "orpo"

    def __init__(self, *, beta: float = 0.5, nll_scope: NLLScope = "completion", nll_norm: NLLNorm = "token") -> None:
        super().__init__()
        self.beta = beta
        self.nll_scope = nll_scope
        self.nll_norm = nll_norm
        self.sft = SFTLoss(nll_scope=nll_scope, nll_norm=nll_norm)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`nll` as in SFTLoss; `odds_ratio`: the complete pairs. () int64 each."""
        return {**self.sft.counts(batch), "odds_ratio": _find_pairs(batch).complete.sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """Two terms: `nll` with weight 1, `odds_ratio` with weight beta."""
        pairs = _find_pairs(batch)
        logprob = torch.where(batch.is_completion, stats.logprob, 0.0)
        sums = sequence_sums(logprob, batch.sequence_ids, batch.roles.shape[0])
        means = sums / pairs.completion_tokens.clamp(min=1)
        chosen, rejected = (
            torch.where(pairs.complete, _by_pair(means, slots), -1.0) for slots in (pairs.chosen, pairs.rejected)
        )
        losses = torch.where(pairs.complete, orpo_odds_ratio_loss(chosen, rejected), 0.0)
        return {**self.sft(stats, batch), "odds_ratio": LossTerm(losses.sum(), pairs.complete.sum(), self.beta)}


class _Pairs(NamedTuple):
    """Where the pairs of a batch are. There are at most S of them, so their shapes need no device-to-host copy."""

    completion_tokens: Tensor  # (S,) int64
    chosen: Tensor  # (S,) int64: pair of a chosen sequence with tokens, S elsewhere
    rejected: Tensor  # (S,) int64: pair of a rejected sequence with tokens, S elsewhere
    complete: Tensor  # (S,) bool, by pair id


def _find_pairs(batch: Batch) -> _Pairs:
    num_sequences = batch.roles.shape[0]
    tokens = sequence_token_counts(batch.is_completion, batch.sequence_ids, num_sequences)
    paired = (batch.pair_ids >= 0) & (tokens > 0)
    chosen, rejected = (
        torch.where(paired & (batch.roles == role), batch.pair_ids, num_sequences) for role in (CHOSEN, REJECTED)
    )
    one_chosen, one_rejected = (_by_pair(torch.ones_like(tokens), slots) == 1 for slots in (chosen, rejected))
    return _Pairs(tokens, chosen, rejected, one_chosen & one_rejected)


def _by_pair(values: Tensor, slots: Tensor) -> Tensor:
    """Sum of `values` (S,) by pair, (S,); slot S takes what belongs to no pair and is dropped."""
    size = values.shape[0]
    return values.new_zeros(size + 1).index_add(0, slots, values)[:size]
