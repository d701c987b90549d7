"""Proper score of the likelihood that the model gave to its own graded answers (docs/calibration-term.md).

Theta or data: the likelihood q carries its gradient; which answers were given, and their grades, are data, also where the
policy itself drew them a moment ago. The whole gradient of E_{y ~ pi} S(pi(y), c) has another part, S times that of
log pi(y): credit for giving answers that are easy to score. With it a policy over three answers does not end at the truth,
and where some answers are never right it ends at these, because being wrong and sure of it scores best (docs/rewards.md).
Without it each answer's term is least where pi(y) is that answer's own chance to be right, whatever else is sampled and how
often. So samples of an earlier policy need no importance ratio and no clipping: what they change is how much each answer
weighs, not where its term is least.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.losses.token_terms import answer_logprob, own_answers, sum_term
from calibtrain.ops import TokenStats, at_least_float32, log1mexp


def answer_log_score(logprob: Tensor, correct: Tensor) -> Tensor:
    """-(c log q + (1 - c) log(1 - q)), q = exp(logprob) (Good 1952); strictly proper, least at q = P(c = 1).

    `logprob` (S,) floating <= 0, log-prob of the whole answer; `correct` (S,) in [0, 1]. Returns (S,) float32 or
    float64. Finite in value and gradient for log-probs from 0 to -1e4 and below.
    """
    return -(correct * at_least_float32(logprob) + (1.0 - correct) * log1mexp(logprob))


def answer_brier_score(logprob: Tensor, correct: Tensor) -> Tensor:
    """(q - c)^2, q = exp(logprob) (Brier 1950); strictly proper and bounded by 1. Shapes as in `answer_log_score`."""
    return (at_least_float32(logprob).exp() - correct).square()


_SCORES = {"log": answer_log_score, "brier": answer_brier_score}


class AnswerScoreLoss(nn.Module):
    """Penalty on the ANSWER sequences: the score of exp(sum of the answer's token log-probs) against its grade.

    Answers without tokens or without a grade (NaN) are left out; other roles are ignored.

    Args:
        weight: of the term in the loss.
        score: "log" or "brier".
    """

    name = "answer_score"

    def __init__(self, *, weight: float = 1.0, score: Literal["log", "brier"] = "log") -> None:
        super().__init__()
        if score not in _SCORES:
            raise UserError(f"score must be one of {sorted(_SCORES)}, got {score!r}")
        self.weight = weight
        self.score = score

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`answer_score`: the graded answers. () int64."""
        return {"answer_score": own_answers(batch, graded=True).sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `answer_score`."""
        graded = own_answers(batch, graded=True)
        scores = _SCORES[self.score](answer_logprob(stats, batch, graded), torch.where(graded, batch.correct, 0.0))
        return {"answer_score": sum_term(scores, graded, self.weight)}


CATALOG = (
    LossEntry(
        name="answer_score",
        kind="penalty",
        title="Proper score of the likelihood of the model's own graded answers",
        paper="Good 1952, J. R. Stat. Soc. B 14(1); Brier 1950, Monthly Weather Review 78(1)",
        equation="-(c log q + (1 - c) log(1 - q)); (q - c)^2",
        cost="the model answers questions now and then; with moves=all, the answers' forward pass; beside grpo, rloo or "
        "ppo, whose answers it reads, none",
        compared_with="scikit-learn 1.9 log_loss and brier_score_loss",
        largest_deviation="1e-12 (value, float64)",
        differs="The probability is that of the whole answer; log(1 - q) is finite as q rounds to 1.",
    ),
)
