"""IPO: preferences learnt without a model of them, to a margin that stays finite (Azar et al. 2023, arXiv 2310.12036)."""

from __future__ import annotations

from torch import Tensor, nn

from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.log_ratios import log_ratios, reference_known
from calibtrain.losses.pairs import check_positive, find_pairs
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.ops import TokenStats, at_least_float32


def ipo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """(chosen - rejected - 1 / (2 beta))^2 of each pair (eq. 17 of arXiv 2310.12036; beta is the paper's tau).

    Least, on average, where pi is proportional to pi_ref exp(p / beta), p the probability that an answer wins against one
    that is drawn from what was compared; so also where one answer always wins, the margin ends at 1 / (2 beta).

    Both (P,) floating: log pi(y|x) - log pi_ref(y|x) of the completions; IPOLoss divides them by their lengths. Returns
    (P,) float32 or float64.
    """
    return (at_least_float32(chosen) - at_least_float32(rejected) - 0.5 / beta).square()


class IPOLoss(nn.Module):
    """IPO's loss of the pairs, with log ratios averaged over the tokens of each completion; reads `batch.reference_logprob`.

    The paper sums them. Its authors' experiments divide by the length, and so does TRL: a sum would ask of a long answer
    for the margin of a short one, a fraction of it a token. Pairs count as in DPOLoss.

    Args:
        beta: the paper's tau; the margin aimed at is 1 / (2 beta), a token.
    """

    name = "ipo"

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        check_positive(beta=beta)
        self.beta = beta

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`ipo`: the complete pairs. () int64."""
        return {"ipo": find_pairs(batch, reference_known(batch)).complete.sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `ipo`. Raises UserError for a batch without reference log-probs."""
        known = reference_known(batch)
        pairs = find_pairs(batch, known)
        means = log_ratios(stats, batch, known) / pairs.completion_tokens.clamp(min=1)
        return {"ipo": pairs.term(ipo_loss(*pairs.split(means, fill=0.0), beta=self.beta))}


CATALOG = (
    LossEntry(
        name="ipo",
        kind="objective",
        title="Identity preference optimisation, with log ratios averaged over tokens",
        paper="Azar et al. 2023, arXiv 2310.12036",
        equation="(h_w - h_l - 1 / (2 beta))^2, h = (log pi(y|x) - log pi_ref(y|x)) / |y| (eq. 17)",
        cost="none a step: reads TokenStats; one forward pass of the untrained model over the pairs, once",
        compared_with="TRL 1.16.0 DPOTrainer",
        largest_deviation="1e-6 (value), 1e-5 (gradient)",
        differs="As dpo; divided by the length as in TRL, where the paper's equation sums",
    ),
)
