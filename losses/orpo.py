"""ORPO: odds-ratio preference optimisation without a reference model (Hong, Lee, Thorne 2024, arXiv 2403.07691)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.log_ratios import mean_logprobs
from calibtrain.losses.pairs import check_label_smoothing, find_pairs, preference_loss
from calibtrain.losses.sft import NLLNorm, SFTLoss
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.losses.token_terms import NLLScope
from calibtrain.ops import TokenStats, log1mexp


def log_odds(logprob_mean: Tensor) -> Tensor:
    """log(P / (1 - P)) with P = exp(logprob_mean) (eq. 4). Any shape; finite at logprob_mean = 0 (see `log1mexp`)."""
    return logprob_mean - log1mexp(logprob_mean)


def orpo_odds_ratio_loss(
    chosen_logprob_mean: Tensor,
    rejected_logprob_mean: Tensor,
    *,
    label_smoothing: float = 0.0,
    cap: float | None = None,
) -> Tensor:
    """L_OR = -log sigmoid(r), r = log odds(y_w|x) - log odds(y_l|x), of each pair (eqs. 5 and 7 of arXiv 2403.07691).

    Nothing in ORPO holds r back, so that it makes a model ever surer. Two bounds: `label_smoothing` e gives
    -(1 - e) log sigmoid(r) - e log sigmoid(-r), which is least at r = log((1 - e) / e), the log odds of a preference
    that holds with probability 1 - e (the smoothing of Mitchell 2023, "A note on DPO with noisy preferences"); `cap`
    leaves a pair alone, with gradient 0, once its r is above it.

    Both (P,) floating: log-probs of the completions divided by their lengths, (1/m) log P(y|x). Returns (P,) float32 or
    float64. Finite, in value and gradient, for log-probs from 0 to -1e4 and below.
    """
    ratio = log_odds(chosen_logprob_mean) - log_odds(rejected_logprob_mean)
    if cap is not None:
        ratio = ratio.clamp(max=cap)
    return preference_loss(ratio, label_smoothing)


class ORPOLoss(nn.Module):
    """Negative log-likelihood of the chosen sequences plus beta times the odds-ratio loss of the pairs (eq. 6).

    The odds ratio uses the completion tokens whatever `nll_scope` is. A pair counts when it has exactly one chosen and
    one rejected completion, neither empty. ANSWER sequences are ignored.

    Four implementations have three likelihood terms: ("full", "token") is the authors' code and TRL, ("completion", "token")
    Liger-Kernel, ("completion", "sequence") LLaMA-Factory; ("full", "sequence") makes the table whole.

    Args:
        beta: weight of the odds-ratio term, the paper's lambda.
        nll_scope: "completion", or "full" for prompt and completion, as TRL and the authors' code do.
        nll_norm: "token" weighs every token alike, "sequence" every sequence.
        label_smoothing: share of preferences taken to be wrong, in [0, 0.5).
        odds_ratio_cap: log odds ratio above which a pair is left alone; None for no bound.
    """

    name = "orpo"

    def __init__(
        self,
        *,
        beta: float = 0.5,
        nll_scope: NLLScope = "completion",
        nll_norm: NLLNorm = "token",
        label_smoothing: float = 0.0,
        odds_ratio_cap: float | None = None,
    ) -> None:
        super().__init__()
        check_label_smoothing(label_smoothing)
        if beta < 0 or (odds_ratio_cap is not None and odds_ratio_cap <= 0):
            raise UserError(
                f"beta must be 0 or more and odds_ratio_cap positive or None, got {beta} and {odds_ratio_cap}"
            )
        self.beta = beta
        self.nll_scope = nll_scope
        self.nll_norm = nll_norm
        self.label_smoothing = label_smoothing
        self.odds_ratio_cap = odds_ratio_cap
        self.sft = SFTLoss(nll_scope=nll_scope, nll_norm=nll_norm)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`nll` as in SFTLoss; `odds_ratio`: the complete pairs. () int64 each."""
        return {**self.sft.counts(batch), "odds_ratio": find_pairs(batch).complete.sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """Two terms: `nll` with weight 1, `odds_ratio` with weight beta."""
        pairs = find_pairs(batch)
        chosen, rejected = pairs.split(mean_logprobs(stats, batch, pairs.members), fill=-1.0)
        losses = orpo_odds_ratio_loss(chosen, rejected, label_smoothing=self.label_smoothing, cap=self.odds_ratio_cap)
        return {**self.sft(stats, batch), "odds_ratio": replace(pairs.term(losses), weight=self.beta)}


CATALOG = (
    LossEntry(
        name="orpo",
        kind="objective",
        title="Odds-ratio preference optimisation, with label smoothing and a cap on the log odds ratio",
        paper="Hong, Lee, Thorne 2024, arXiv 2403.07691",
        equation="NLL - beta log sigmoid(r), r = log odds(y_w) - log odds(y_l) (eqs. 4 to 7)",
        cost="none: reads TokenStats; a pair is two sequences",
        compared_with="TRL 1.16.0 ORPOTrainer; Liger-Kernel 0.8.5 LigerFusedLinearORPOLoss; mpmath formula",
        largest_deviation="1e-5 (value), 1e-4 (gradient)",
        differs=(
            "The log of 1 - P and its gradient are finite at P = 1, where TRL's and Liger's gradients are NaN (Liger's in "
            "every row of the batch); one global mean over ranks and accumulation, where both average micro-batch means; "
            "empty completions are left out, where both divide 0 by 0; "
            "the scope and norm of the likelihood term are options, because public implementations use three "
            "different ones"
        ),
    ),
)
