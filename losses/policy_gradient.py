"""Policy gradients on sampled completions: PPO, RLOO and GRPO. Credit comes from `calibtrain.losses.advantages`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.kl import KL_ESTIMATORS, KLEstimator, tangent_exp
from calibtrain.losses.silence import watch_of
from calibtrain.losses.terms import ANSWER, Batch, LossTerm, sequence_sums, sequence_token_counts
from calibtrain.ops import TokenStats, at_least_float32

TokenNorm = Literal["sequence", "token", "constant"]
"""What divides the sum over tokens: each sequence's own length, then the sequences (GRPO); all tokens of the step (DAPO);
a constant, then the sequences (Dr. GRPO). TRL's "bnpo", all tokens of a micro-batch, is "token" where a step has one. How
long the samples are is data here: with "sequence" a long answer's credit counts for less than a short one's."""


def clipped_policy_loss(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(logprob - old_logprob) (PPO, eq. 7).

    Schulman et al. 2017, arXiv 1707.06347; unequal bounds are DAPO's (Yu et al. 2025, arXiv 2503.14476). All (N,)
    floating, of tokens or of whole sequences; gradient flows to `logprob` alone. Returns (N,). Beyond a log ratio of 20
    rho is continued by its tangent, so that a stray token gives no infinity.
    """
    advantages = advantages.detach()
    ratio = tangent_exp(at_least_float32(logprob) - at_least_float32(old_logprob.detach()))
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """0.5 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) of each token (PPO's public implementations).

    All (N,) floating; gradient flows to `values` alone. Returns (N,).
    """
    values, old_values, returns = (at_least_float32(one) for one in (values, old_values.detach(), returns.detach()))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def token_norm_sum(
    values: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int, norm: TokenNorm, length: int = 1
) -> tuple[Tensor, Tensor]:
    """Sum of `values` (N,) where `mask` holds, and the count that makes a mean of it. Both (); see TokenNorm.

    "sequence": sum of the sequences' means over their number (arXiv 2402.03300, eq. 3); "token": sum over the number of
    tokens (DAPO, arXiv 2503.14476, eq. 8); "constant": sum / `length` over the number of sequences (Dr. GRPO, arXiv
    2503.20783). Sequences without tokens do not count.
    """
    values = torch.where(mask, values, 0.0)
    if norm == "token":
        return values.sum(), mask.sum()
    tokens = sequence_token_counts(mask, sequence_ids, num_sequences)
    sequences = (tokens > 0).sum()
    if norm == "constant":
        return values.sum() / length, sequences
    return (sequence_sums(values, sequence_ids, num_sequences) / tokens.clamp(min=1)).sum(), sequences


class GRPOLoss(nn.Module):
    """Clipped policy gradient on the ANSWER sequences with credit `batch.advantages`, plus beta times the KL.

    Args:
        clip_low, clip_high: bounds of the probability ratio, 1 - clip_low and 1 + clip_high.
        norm: see TokenNorm.
        length: what "constant" divides by: the most tokens a completion may have.
        beta: weight of the KL against `batch.reference_logprob`; 0 needs no reference.
        kl: its estimator (`calibtrain.losses.kl`); GRPO as published is "k3".
    """

    name = "grpo"

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        norm: TokenNorm = "sequence",
        length: int | None = None,
        beta: float = 0.0,
        kl: KLEstimator = "k3+",
    ) -> None:
        super().__init__()
        if norm not in ("sequence", "token", "constant"):
            raise UserError(f"norm must be sequence|token|constant, got {norm!r}")
        if norm == "constant" and (length is None or length < 1):
            raise UserError("norm: constant divides by a fixed length: give the most tokens a completion may have")
        if kl not in KL_ESTIMATORS:
            raise UserError(f"kl must be one of {'|'.join(KL_ESTIMATORS)}, got {kl!r}")
        if kl == "k1" and beta:
            raise UserError("kl: k1 has no gradient in a loss, on average; take k2 or k3+, or put k1 into the reward")
        _check_clip(clip_low, clip_high)
        self.clip_low, self.clip_high = clip_low, clip_high
        self.norm: TokenNorm = norm
        self.length = length or 1
        self.beta = beta
        self.kl = kl

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`policy` and, with beta, `kl`: tokens or sequences, as `norm` says. () int64."""
        count = self._sum(torch.zeros_like(batch.sequence_ids, dtype=torch.float32), batch)[1]
        return {"policy": count, "kl": count} if self.beta else {"policy": count}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """`policy` with weight 1 and, with beta, `kl` with weight beta.

        Raises UserError where the batch lacks a field that this reads. Logs once that the advantages of the first 20
        micro-batches were all 0.
        """
        losses = clipped_policy_loss(
            stats.logprob,
            _old_logprob(stats, batch),
            _credit(self, batch),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        terms = {"policy": LossTerm(*self._sum(losses, batch))}
        if self.beta:
            terms["kl"] = LossTerm(*self._sum(_kl(stats, batch, self.kl), batch), self.beta)
        return terms

    def _sum(self, values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return token_norm_sum(values, sampled(batch), batch.sequence_ids, batch.roles.shape[0], self.norm, self.length)


class RLOOLoss(nn.Module):
    """REINFORCE with leave-one-out credit: one ratio and one advantage for each whole ANSWER sequence.

    The credit of a sequence is that of its tokens in `batch.advantages`, which must be equal; the KL, if any, is in the
    reward. Without `batch.old_logprob` this is plain REINFORCE.

    Args:
        clip_low, clip_high: bounds of the sequence's probability ratio.
    """

    name = "rloo"

    def __init__(self, *, clip_low: float = 0.2, clip_high: float = 0.2) -> None:
        super().__init__()
        _check_clip(clip_low, clip_high)
        self.clip_low, self.clip_high = clip_low, clip_high

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`policy`: the sampled sequences that have tokens. () int64."""
        return {"policy": (self._tokens(batch) > 0).sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `policy`.

        Raises UserError where the batch lacks a field that this reads. Logs once that the advantages of the first 20
        micro-batches were all 0.
        """
        mask, size, tokens = sampled(batch), batch.roles.shape[0], self._tokens(batch)

        def per_sequence(values: Tensor) -> Tensor:
            return sequence_sums(torch.where(mask, values, 0.0), batch.sequence_ids, size)

        losses = clipped_policy_loss(
            per_sequence(stats.logprob),
            per_sequence(_old_logprob(stats, batch)),
            per_sequence(_credit(self, batch)) / tokens.clamp(min=1),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        return {"policy": LossTerm(torch.where(tokens > 0, losses, 0.0).sum(), (tokens > 0).sum())}

    def _tokens(self, batch: Batch) -> Tensor:
        return sequence_token_counts(sampled(batch), batch.sequence_ids, batch.roles.shape[0])


class PPOLoss(nn.Module):
    """Clipped policy loss plus the clipped loss of a value head, over the sampled tokens of ANSWER sequences.

    `batch.scores` (N,) holds the head's values, `batch.old_values` and `batch.returns` those of the time of sampling.

    Args:
        clip_low, clip_high: bounds of the probability ratio.
        value_clip: how far a value may move from the one at sampling.
        value_weight: of the value loss.
    """

    name = "ppo"

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        value_clip: float = 0.2,
        value_weight: float = 0.1,
    ) -> None:
        super().__init__()
        _check_clip(clip_low, clip_high)
        if value_clip <= 0:
            raise UserError(f"value_clip must be positive, got {value_clip}")
        self.clip_low, self.clip_high = clip_low, clip_high
        self.value_clip, self.value_weight = value_clip, value_weight

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`policy` and `value`: the sampled tokens. () int64."""
        count = sampled(batch).sum()
        return {"policy": count, "value": count}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """`policy` with weight 1, `value` with weight `value_weight`.

        Raises UserError where the batch lacks a field that this reads. Logs once that the advantages of the first 20
        micro-batches were all 0.
        """
        mask = sampled(batch)
        policy = clipped_policy_loss(
            stats.logprob,
            _old_logprob(stats, batch),
            _credit(self, batch),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        value = clipped_value_loss(
            _needed(batch.scores, "scores"),
            _needed(batch.old_values, "old_values"),
            _needed(batch.returns, "returns"),
            clip=self.value_clip,
        )
        count = mask.sum()
        return {
            "policy": LossTerm(torch.where(mask, policy, 0.0).sum(), count),
            "value": LossTerm(torch.where(mask, value, 0.0).sum(), count, self.value_weight),
        }


def sampled(batch: Batch) -> Tensor:
    """Which target tokens the policy sampled: the completions of ANSWER sequences. (N,) bool."""
    return batch.is_completion & (batch.roles == ANSWER)[batch.sequence_ids]


def _check_clip(low: float, high: float) -> None:
    if not (0.0 <= low < 1.0 and high >= 0.0):
        raise UserError(f"clip_low must be in [0, 1) and clip_high at least 0, got {low} and {high}")


def _old_logprob(stats: TokenStats, batch: Batch) -> Tensor:
    """Log-probs of the sampling policy, which is this one when the batch says nothing else."""
    return stats.logprob.detach() if batch.old_logprob is None else batch.old_logprob


def _kl(stats: TokenStats, batch: Batch, estimator: KLEstimator) -> Tensor:
    reference = _needed(batch.reference_logprob, "reference_logprob")
    # NaN stands where no reference was asked: those tokens are not sampled ones, and must not spoil the gradient.
    return KL_ESTIMATORS[estimator](stats.logprob, torch.where(reference.isnan(), stats.logprob.detach(), reference))


def _credit(loss: nn.Module, batch: Batch) -> Tensor:
    """The batch's advantages (N,). Logs once that all of the first 20 micro-batches were 0."""
    advantages = _needed(batch.advantages, "advantages")
    watch_of(loss).see({"advantages": (advantages != 0).sum()})
    return advantages


def _needed(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise UserError(f"this batch has no {name}: the objective trains on rollouts, which fill Batch.{name}")
    return values


CATALOG = (
    LossEntry(
        "grpo",
        "objective",
        "Group-relative policy optimisation, with the normalisers of GRPO, DAPO and Dr. GRPO",
        "Shao et al. 2024, arXiv 2402.03300; Yu et al. 2025, arXiv 2503.14476; Liu et al. 2025, arXiv 2503.20783",
        "-min(rho A, clip(rho) A) + beta KL (eq. 3 of 2402.03300; normalisers: also eq. 8 of 2503.14476)",
        "sampling; with beta one forward pass of a frozen reference",
        "TRL 1.16.0 GRPOTrainer; Liger-Kernel 0.8.5 LigerFusedLinearGRPOLoss",
        "1e-5 (value), 1e-4 (gradient)",
        "The count of sequences or tokens is that of all ranks and micro-batches for every normaliser, where TRL's is for "
        "dapo alone; the KL is k3+ by default, because k3's gradient is that of another divergence",
    ),
    LossEntry(
        "rloo",
        "objective",
        "REINFORCE with a leave-one-out baseline",
        "Ahmadian et al. 2024, arXiv 2402.14740",
        "-min(rho A, clip(rho) A), rho and A of whole sequences (eq. 6)",
        "sampling",
        "TRL 1.16.0 RLOOTrainer",
        "1e-6 (value), 1e-5 (gradient)",
        "One global mean over sequences; a ratio beyond exp(20) goes on as a straight line",
    ),
    LossEntry(
        "ppo",
        "objective",
        "Proximal policy optimisation with a value head",
        "Schulman et al. 2017, arXiv 1707.06347",
        "-min(rho A, clip(rho) A) + w/2 max((V - R)^2, (clip(V) - R)^2) (eqs. 7 and 9)",
        "sampling, and a linear value head",
        "float64 formula",
        "1e-12 (value), 1e-12 (gradient)",
        "Global token means; a ratio beyond exp(20) goes on as a straight line",
    ),
)
