"""Calibration-tuning: the model says whether its answer is right, and otherwise stays what it was.

Kapoor et al. 2024, "Large Language Models Must Be Taught to Know What They Don't Know", arXiv 2406.08391. The sequences
that ask come from calibtrain.data.queries, reference log-probs from calibtrain.training.reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.terms import Batch, LossTerm, sequence_token_counts
from calibtrain.losses.token_terms import query_tokens, sum_term
from calibtrain.ops import TokenStats, at_least_float32, log1mexp


def correctness_query_loss(set_logprob: Tensor, correct: Tensor) -> Tensor:
    """Cross-entropy between the two choices alone: -log softmax(z_no, z_yes)[c]; strictly proper in P(correct).

    `set_logprob` (M, 2) floating: log-probs or logits of "no" and of "yes"; `correct` (M,) in [0, 1], a soft grade
    weighs both. Returns (M,).
    """
    choices = at_least_float32(set_logprob).log_softmax(dim=-1)
    grade = correct.to(choices.dtype)
    return -(1.0 - grade) * choices[:, 0] - grade * choices[:, 1]


def jensen_shannon(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """(KL(p || m) + KL(r || m)) / 2 with m = (p + r) / 2 (Lin 1991): symmetric, in [0, log 2], 0 for p = r alone.

    Both (..., K) floating: log-probs of the same K outcomes, each summing to 1. Returns (...). Differentiable in
    `logprob`; outcomes of probability 0 (-inf) contribute their limit.
    """
    floor = -1e30  # keeps -inf - -inf out; its exp is 0 all the same
    p, r = (at_least_float32(one).clamp(min=floor) for one in (logprob, reference_logprob))
    mixture = torch.logaddexp(p, r) - math.log(2.0)
    return 0.5 * (p.exp() * (p - mixture) + r.exp() * (r - mixture)).sum(dim=-1)


def token_divergence(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """Jensen-Shannon divergence between policy and reference of the event "the next token is this one".

    Both (N,) floating: log-probs of the same tokens; the reference is data. Returns (N,). Never above the divergence over
    the whole vocabulary (data-processing inequality), 0 exactly where the token's probability is the reference's, and
    whatever drew the tokens: greedy answers need no correction, as sampled-token estimators of KL would.
    """
    both = (logprob, reference_logprob.detach())
    two = (torch.stack([at_least_float32(one), log1mexp(one)], dim=-1) for one in both)
    return jensen_shannon(*two)


class CorrectnessQueryLoss(nn.Module):
    """Penalty: cross-entropy of "is the proposed answer correct?" at the QUERY sequences, over its two choices alone.

    It reads the first completion token of each graded QUERY sequence whose target is one of the choices.

    Args:
        token_set: ids of the first tokens of "no" and "yes", in this order; calibtrain.data.queries finds them.
        weight: of the term in the loss.
    """

    name = "correctness_query"
    token_set: Tensor

    def __init__(self, *, token_set: Sequence[int], weight: float = 1.0) -> None:
        super().__init__()
        if len(set(token_set)) != 2 or len(token_set) != 2:
            raise UserError(f"token_set must be two distinct token ids, of no and of yes, got {list(token_set)}")
        self.register_buffer("token_set", torch.tensor(list(token_set), dtype=torch.int64), persistent=False)
        self.weight = weight

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`correctness_query`: the queries. () int64."""
        return {"correctness_query": query_tokens(batch, self.token_set).sum()}

    def forward(self, stats: TokenStats, batch: Batch, set_logprob: Tensor) -> dict[str, LossTerm]:
        """One term, `correctness_query`; `set_logprob` (N, 2) are the log-probs of `token_set` at every target."""
        read = query_tokens(batch, self.token_set)
        values = correctness_query_loss(
            torch.where(read[:, None], set_logprob, 0.0),
            torch.where(read, batch.correct[batch.sequence_ids], 0.0),
        )
        return {"correctness_query": sum_term(values, read, self.weight)}


class DivergenceAnchor(nn.Module):
    """Penalty: divergence from a frozen reference at every token whose reference log-prob the batch holds.

    Summed over the tokens of a sequence, mean over sequences, as the authors do.

    Args:
        weight: the paper's kappa.
    """

    name = "divergence_anchor"

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`divergence_anchor`: the sequences with any reference log-prob. () int64."""
        tokens = sequence_token_counts(_anchored(batch), batch.sequence_ids, batch.roles.shape[0])
        return {"divergence_anchor": (tokens > 0).sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `divergence_anchor`."""
        read = _anchored(batch)
        reference = torch.zeros_like(stats.logprob) if batch.reference_logprob is None else batch.reference_logprob
        values = token_divergence(
            torch.where(read, stats.logprob, -1.0), torch.where(read, reference, -1.0).to(stats.logprob.dtype)
        )
        total = sum_term(values, read).total
        return {"divergence_anchor": LossTerm(total, self.counts(batch)["divergence_anchor"], self.weight)}


def _anchored(batch: Batch) -> Tensor:
    if batch.reference_logprob is None:
        return torch.zeros_like(batch.is_completion)
    return ~batch.reference_logprob.isnan()


CATALOG = (
    LossEntry(
        name="correctness_query",
        kind="penalty",
        title="Is the proposed answer correct? Cross-entropy over no and yes",
        paper="Kapoor et al. 2024, arXiv 2406.08391",
        equation="-log softmax(z_no, z_yes)[c]",
        cost="the queries' own forward pass; 3 dot products a target token",
        compared_with="torch.nn.functional.cross_entropy over the two logits, as the authors' trainer",
        largest_deviation="1e-11 (value and gradient, float64)",
        differs=(
            "The choice is read where the data says it stands, not at position -1; divided by the queries of all "
            "ranks and micro-batches, not a mean of means."
        ),
    ),
    LossEntry(
        name="divergence_anchor",
        kind="penalty",
        title="Jensen-Shannon divergence from a frozen reference at the answers' tokens",
        paper="Kapoor et al. 2024, arXiv 2406.08391",
        equation="(KL(p || m) + KL(r || m)) / 2, summed over tokens",
        cost="none a step: reads TokenStats; one forward pass of the untrained model over the anchored answers, once",
        compared_with="the authors' formula with torch.distributions; over the whole vocabulary also Liger-Kernel 0.8.5",
        largest_deviation="1e-11; over a vocabulary 1e-9 (value), 1e-6 (gradient: torch.distributions clamps)",
        differs=(
            "Between {token, any other} instead of the whole vocabulary: a lower bound of theirs that needs no second "
            "forward pass and no (N, V) tensor. The reference is measured once: it is frozen."
        ),
    ),
)
