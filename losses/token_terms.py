"""Which tokens and answers of a batch the losses read, and the sum over them as a term."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from calibtrain.losses.terms import ANSWER, CHOSEN, QUERY, Batch, LossTerm, sequence_sums, sequence_token_counts
from calibtrain.ops import TokenStats

NLLScope = Literal["completion", "full"]


def learned_tokens(batch: Batch, nll_scope: NLLScope = "completion") -> Tensor:
    """Tokens of the CHOSEN sequences: of their completions, or all targets with nll_scope="full". (N,) bool."""
    chosen = (batch.roles == CHOSEN)[batch.sequence_ids]
    return chosen if nll_scope == "full" else chosen & batch.is_completion


def query_tokens(batch: Batch, token_set: Tensor) -> Tensor:
    """First completion token of each graded QUERY sequence, if it is of `token_set` (K,) int64. (N,) bool.

    So a sequence says itself where its one-token answer stands, and which loss it is for.
    """
    first = torch.ones_like(batch.is_completion)
    first[1:] = (batch.sequence_ids[1:] != batch.sequence_ids[:-1]) | ~batch.is_completion[:-1]
    graded = (batch.roles == QUERY) & ~batch.correct.isnan()
    return first & batch.is_completion & graded[batch.sequence_ids] & torch.isin(batch.targets, token_set)


def own_answers(batch: Batch, *, graded: bool) -> Tensor:
    """ANSWER sequences that have tokens and, where asked for, a grade. (S,) bool."""
    tokens = sequence_token_counts(answer_tokens(batch), batch.sequence_ids, batch.roles.shape[0])
    answers = (batch.roles == ANSWER) & (tokens > 0)
    return answers & ~batch.correct.isnan() if graded else answers


def answer_logprob(stats: TokenStats, batch: Batch, answers: Tensor) -> Tensor:
    """Log-prob of each whole answer, given what was thought before it, where `answers` (S,) bool holds; else -1. (S,)."""
    read = answers[batch.sequence_ids] & answer_tokens(batch)
    logprob = torch.where(read, stats.logprob, 0.0)
    return torch.where(answers, sequence_sums(logprob, batch.sequence_ids, batch.roles.shape[0]), -1.0)


def answer_tokens(batch: Batch) -> Tensor:
    """Completion tokens, of answers without the reasoning before them. (N,) bool."""
    return batch.is_completion if batch.is_answer is None else batch.is_completion & batch.is_answer


def readable(stats: TokenStats, read: Tensor) -> TokenStats:
    """`stats` with harmless numbers where `read` (N,) bool does not hold, so that no gradient can come from there."""
    return TokenStats(
        torch.where(read, stats.logprob, -1.0),
        torch.where(read, stats.entropy, 0.0),
        torch.where(read, stats.sum_p2, 0.5),
        torch.where(read, stats.confidence, 0.5),
        stats.correct & read,
    )


def sum_term(values: Tensor, read: Tensor, weight: float = 1.0) -> LossTerm:
    """Sum of `values` over the places where `read` (same shape, bool) holds, and their number."""
    return LossTerm(torch.where(read, values, 0.0).sum(), read.sum(), weight)
