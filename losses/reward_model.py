"""Reward models: Bradley-Terry training, what their margins are worth as probabilities, and PPO-M's calibrated training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.pairs import find_pairs
from calibtrain.losses.terms import Batch, LossTerm
from calibtrain.ops import TokenStats, at_least_float32

LARGEST_SCALE = 2.0**60


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) of each pair (Bradley, Terry 1952; margin: Touvron et al. 2023, arXiv 2307.09288).

    `chosen`, `rejected` (P,) floating rewards; returns (P,). Finite in value and gradient everywhere.
    """
    return -logsigmoid(at_least_float32(chosen) - at_least_float32(rejected) - margin)


def centering_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w + r_l)^2 of each pair (Eisenstein et al. 2023, arXiv 2312.09244): fixes the offset that preferences leave open.

    Both (P,) floating; returns (P,). A usual weight is 0.01.
    """
    return (at_least_float32(chosen) + at_least_float32(rejected)).square()


def ppo_m_loss(
    chosen_high: Tensor,
    chosen_low: Tensor,
    rejected_high: Tensor,
    rejected_low: Tensor,
    *,
    quality: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """PPO-M's reward-model loss of each pair (Leng, Huang, Zhu, Huang 2024, arXiv 2410.09724).

    BT(r_{w,high}, r_{w,low}) + BT(r_{l,low}, r_{l,high}): a good answer should state high confidence, a bad one low. The
    four rewards, (P,) floating, are those of the two answers of a pair, each with a high and a low stated confidence.
    `quality`, the rewards (chosen, rejected) without any statement, adds BT(r_w, r_l); without it a model not yet trained
    on preferences never learns, and a trained one forgets, which answer is better. Returns (P,). It is a sum of
    comparisons, so RewardModelLoss on pairs of statements (calibtrain.data.pairs.with_confidence_statements) is its mean.
    """
    loss = bradley_terry_loss(chosen_high, chosen_low) + bradley_terry_loss(rejected_low, rejected_high)
    return loss if quality is None else loss + bradley_terry_loss(*quality)


def plackett_luce_loss(rewards: Tensor) -> Tensor:
    """-log P(ranking) of each row, best first: sum_k logsumexp(r_k, ..., r_K) - r_k (Plackett 1975; Luce 1959).

    `rewards` (P, K) floating; returns (P,). PPO-M's listwise form takes (w high, w low, l low, l high).
    """
    rewards = at_least_float32(rewards)
    return (rewards.flip(1).logcumsumexp(1).flip(1) - rewards).sum(1)


def pair_probability(difference: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """P(first is preferred) = sigmoid(scale * (r_1 - r_2)). Any shape. `scale` comes from `fit_pair_scale`."""
    return torch.sigmoid(scale * at_least_float32(difference))


def folded_pairs(difference: Tensor, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """(confidence, correct) of each held-out pair, `difference` = r_w - r_l: max(p, 1 - p), and whether r_w > r_l.

    This is what calibration metrics take. Do not count a pair in both directions as well. A tie is half right: correct is
    float, 0.5 there. Both in the shape of `difference`.
    """
    probability = pair_probability(difference.abs(), scale)
    return probability, 0.5 * (difference.sign().to(probability) + 1.0)


def fit_pair_scale(difference: Tensor) -> float:
    """The scale that makes `pair_probability` likeliest: least -sum log sigmoid(scale * (r_w - r_l)), scale >= 0.

    `difference` (P,) floating, r_w - r_l of pairs that the model was not trained on. 0 for a model no better than chance.
    Raises UserError without pairs, for non-finite rewards, and when no pair is ranked wrong: then no scale is too large.
    """
    d = difference.detach().to(torch.float64).flatten()
    if d.numel() == 0 or not bool(d.isfinite().all()):
        raise UserError("the scale of pair probabilities needs held-out pairs with finite rewards")

    def slope(scale: float) -> float:  # of the negative log-likelihood, which is convex
        return float(-(d * torch.sigmoid(-scale * d)).mean())

    if slope(0.0) >= 0.0:
        return 0.0
    if not bool((d < 0).any()):
        raise UserError(
            f"all {d.numel()} held-out pairs are ranked right, so that their likelihood grows with the scale for ever; "
            "hold out more pairs"
        )
    low, high = 0.0, 1.0 / float(d.abs().mean())
    while slope(high) < 0.0 and high < LARGEST_SCALE:
        low, high = high, 2.0 * high
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) < 0.0 else (low, middle)
    return 0.5 * (low + high)


class RewardModelLoss(nn.Module):
    """Bradley-Terry loss of the pairs, and optionally centring; reads `batch.scores` (S,), each sequence's reward.

    A pair counts when it has exactly one chosen and one rejected completion, neither empty.

    Args:
        margin: by how much the chosen answer's reward should be larger.
        centering: weight of (r_w + r_l)^2; 0 leaves the offset of the rewards open.
    """

    name = "reward_model"

    def __init__(self, *, margin: float = 0.0, centering: float = 0.01) -> None:
        super().__init__()
        self.margin = margin
        self.centering = centering

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`preference` and, with a weight, `centering`: the complete pairs. () int64."""
        count = find_pairs(batch).complete.sum()
        return {"preference": count, "centering": count} if self.centering else {"preference": count}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """`preference` with weight 1, `centering` with its own."""
        if batch.scores is None:
            raise UserError("this batch has no scores: a reward model's loss needs a model with a scalar head")
        pairs = find_pairs(batch)
        chosen, rejected = pairs.split(batch.scores, fill=0.0)
        count = pairs.complete.sum()
        losses = torch.where(pairs.complete, bradley_terry_loss(chosen, rejected, self.margin), 0.0)
        terms = {"preference": LossTerm(losses.sum(), count)}
        if self.centering:
            terms["centering"] = LossTerm(centering_loss(chosen, rejected).sum(), count, self.centering)
        return terms


CATALOG = (
    LossEntry(
        "reward_model",
        "objective",
        "Bradley-Terry reward model with margin and centring",
        "Bradley, Terry 1952; Eisenstein et al. 2023, arXiv 2312.09244",
        "-log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2",
        "a linear head; a pair is two sequences",
        "TRL 1.16.0 RewardTrainer",
        "1e-6 (value), 1e-5 (gradient)",
        "One global mean over pairs, where TRL averages micro-batch means; empty completions are left out",
    ),
    LossEntry(
        "fit_pair_scale",
        "function",
        "Probability of a preference with a fitted scale",
        "Bradley, Terry 1952; Guo et al. 2017, arXiv 1706.04599",
        "sigmoid(scale * (r_i - r_j))",
        "none",
        "scikit-learn 1.9 LogisticRegression",
        "1e-4 (scale)",
        "Only differences of rewards are read, and a pair counts once",
    ),
    LossEntry(
        "ppo_m_loss",
        "function",
        "Reward model that rewards the right stated confidence",
        "Leng, Huang, Zhu, Huang 2024, arXiv 2410.09724",
        "BT(r_{w,high}, r_{w,low}) + BT(r_{l,low}, r_{l,high})",
        "four sequences a pair, six with quality; in the config: reward_model.confidence_statements",
        "float64 formula of the authors' code",
        "1e-12 (value), 1e-12 (gradient)",
        "The plain preference may stay in the loss (quality); the authors' default drops it, and a model that is not "
        "trained on preferences yet then never learns them",
    ),
)
