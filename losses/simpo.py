"""SimPO: mean log-probs and a target margin, without a reference (Meng et al. 2024, arXiv 2405.14734)."""

from __future__ import annotations

from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.log_ratios import mean_logprobs
from calibtrain.losses.pairs import check_label_smoothing, check_positive, find_pairs, preference_loss
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.ops import TokenStats, at_least_float32


def simpo_loss(
    chosen_logprob_mean: Tensor,
    rejected_logprob_mean: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma) of each pair (eq. 6 of arXiv 2405.14734), or its smoothed form.

    With gamma = 0 it is least, on average over preferences of Bradley and Terry's model, where the mean log-prob is
    r / beta + constant: nothing holds the policy to where it started. A gamma above 0 drives it beyond that, to a margin
    that is surer than the preferences are.

    Both (P,) floating: log-probs of the completions divided by their lengths. Returns (P,) float32 or float64.
    """
    margin = at_least_float32(chosen_logprob_mean) - at_least_float32(rejected_logprob_mean)
    return preference_loss(beta * margin - gamma, label_smoothing)


class SimPOLoss(nn.Module):
    """SimPO's loss of the pairs. A pair counts when it has exactly one chosen and one rejected completion, neither empty.

    Args:
        beta: scale of the reward, the mean log-prob of a completion's tokens.
        gamma: by how much the chosen completion's reward should be larger.
        label_smoothing: share of preferences taken to be wrong, in [0, 0.5).
    """

    name = "simpo"

    def __init__(self, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_positive(beta=beta)
        check_label_smoothing(label_smoothing)
        if gamma < 0:
            raise UserError(f"gamma must be 0 or more, got {gamma}")
        self.beta = beta
        self.gamma = gamma
        self.label_smoothing = label_smoothing

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`simpo`: the complete pairs. () int64."""
        return {"simpo": find_pairs(batch).complete.sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `simpo`."""
        pairs = find_pairs(batch)
        means = mean_logprobs(stats, batch, pairs.members)
        chosen, rejected = pairs.split(means, fill=-1.0)
        losses = simpo_loss(chosen, rejected, beta=self.beta, gamma=self.gamma, label_smoothing=self.label_smoothing)
        return {"simpo": pairs.term(losses)}


CATALOG = (
    LossEntry(
        name="simpo",
        kind="objective",
        title="Simple preference optimisation: length-normalised, with a target margin, without a reference",
        paper="Meng et al. 2024, arXiv 2405.14734",
        equation="-log sigmoid(beta (m_w - m_l) - gamma), m = log pi(y|x) / |y| (eq. 6)",
        cost="none: reads TokenStats; a pair is two sequences",
        compared_with="TRL 1.16.0 CPOTrainer, loss_type simpo with cpo_alpha 0",
        largest_deviation="1e-6 (value), 1e-5 (gradient)",
        differs=(
            "One global mean over pairs, where TRL averages micro-batch means; empty completions are left out, where TRL "
            "divides 0 by 0; beta and gamma default to what the paper recommends, not to TRL's 0.1 and 0.5"
        ),
    ),
)
