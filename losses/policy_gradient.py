"""Policy gradients on sampled completions: PPO, RLOO and GRPO. Credit comes from `calibtrain.losses.advantages`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.kl import KL_ESTIMATORS, KLEstimator, kl_k3, tangent_exp
from calibtrain.losses.silence import watch_of
from calibtrain.losses.terms import ANSWER, Batch, LossTerm, sequence_sums, sequence_token_counts
from calibtrain.ops import TokenStats, at_least_float32

TokenNorm = Literal["sequence", "token", "constant"]
"""What divides the sum over tokens: each sequence's own length, then the sequences (GRPO); all tokens of the step (DAPO);
a constant, then the sequences (Dr. GRPO). TRL's "bnpo", all tokens of a micro-batch, is "token" where a step has one. How
long the samples are is data here: with "sequence" a long answer's credit counts for less than a short one's."""


def clipped_policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(logprob - old_logprob) (PPO, eq. 7).

    Schulman et al. 2017, arXiv 1707.06347; unequal bounds are DAPO's (Yu et al. 2025, arXiv 2503.14476). With `dual_clip` c
    a negative A counts c A at most (Ye et al. 2020, arXiv 1912.09729, eq. 8). All (N,) floating, of tokens or of whole
    sequences; gradient flows to `logprob` alone. Returns (N,). Beyond a log ratio of 20 rho is continued by its tangent, so
    that a stray token gives no infinity.
    """
    advantages = advantages.detach()
    ratio = probability_ratio(logprob, old_logprob)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain


def probability_ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """exp(logprob - old_logprob), in float32 or better; gradient flows to `logprob` alone. See clipped_policy_loss."""
    return tangent_exp(at_least_float32(logprob) - at_least_float32(old_logprob.detach()))


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


POLICY_MEASURES = ("clip_high", "clip_low", "clip_share", "entropy", "policy_kl", "ratio", "ratio_variance")
"""What `policy_measures` gives."""


class GRPOLoss(nn.Module):
    """Clipped policy gradient on the ANSWER sequences with credit `batch.advantages`, plus beta times the KL.

    Args:
        clip_low, clip_high: bounds of the probability ratio, 1 - clip_low and 1 + clip_high.
        dual_clip: bound of the ratio of what is blamed, above 1; None: none.
        norm: see TokenNorm.
        length: what "constant" divides by: the most tokens a completion may have.
        beta: weight of the KL against `batch.reference_logprob`; 0 needs no reference.
        kl: its estimator (`calibtrain.losses.kl`); GRPO as published is "k3".
    """

    name = "grpo"
    measured = POLICY_MEASURES

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
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
        self.bounds = _bounds(clip_low, clip_high, dual_clip)
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
        losses = clipped_policy_loss(stats.logprob, _old_logprob(stats, batch), _credit(self, batch), **self.bounds)
        terms = {"policy": LossTerm(*self._sum(_weighted(losses, batch.importance), batch))}
        if self.beta:
            terms["kl"] = LossTerm(*self._sum(_kl(stats, batch, self.kl), batch), self.beta)
        return terms

    def measures(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """See `policy_measures`."""
        return policy_measures(stats, batch, self.bounds)

    def _sum(self, values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return token_norm_sum(values, sampled(batch), batch.sequence_ids, batch.roles.shape[0], self.norm, self.length)


class RLOOLoss(nn.Module):
    """REINFORCE with leave-one-out credit: one ratio and one advantage for each whole ANSWER sequence.

    The credit of a sequence is that of its tokens in `batch.advantages`, which must be equal, and so is its weight in
    `batch.importance`; the KL, if any, is in the reward. Without `batch.old_logprob` this is plain REINFORCE.

    Args:
        clip_low, clip_high: bounds of the sequence's probability ratio.
        dual_clip: bound of the ratio of what is blamed, above 1; None: none.
    """

    name = "rloo"
    measured = POLICY_MEASURES

    def __init__(self, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None) -> None:
        super().__init__()
        self.bounds = _bounds(clip_low, clip_high, dual_clip)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """`policy`: the sampled sequences that have tokens. () int64."""
        return {"policy": (self._tokens(batch) > 0).sum()}

    def forward(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """One term, `policy`.

        Raises UserError where the batch lacks a field that this reads. Logs once that the advantages of the first 20
        micro-batches were all 0.
        """
        tokens = self._tokens(batch)
        losses = clipped_policy_loss(
            _per_sequence(stats.logprob, batch),
            _per_sequence(_old_logprob(stats, batch), batch),
            _per_sequence(_credit(self, batch), batch) / tokens.clamp(min=1),
            **self.bounds,
        )
        weights = batch.importance
        losses = _weighted(losses, None if weights is None else _per_sequence(weights, batch) / tokens.clamp(min=1))
        return {"policy": LossTerm(torch.where(tokens > 0, losses, 0.0).sum(), (tokens > 0).sum())}

    def measures(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """See `policy_measures`; the ratio is that of whole sequences, the entropy that of tokens."""
        return policy_measures(stats, batch, self.bounds, whole=True)

    def _tokens(self, batch: Batch) -> Tensor:
        return sequence_token_counts(sampled(batch), batch.sequence_ids, batch.roles.shape[0])


class PPOLoss(nn.Module):
    """Clipped policy loss plus the clipped loss of a value head, over the sampled tokens of ANSWER sequences.

    `batch.scores` (N,) holds the head's values, `batch.old_values` and `batch.returns` those of the time of sampling.

    Args:
        clip_low, clip_high: bounds of the probability ratio.
        dual_clip: bound of the ratio of what is blamed, above 1; None: none.
        value_clip: how far a value may move from the one at sampling.
        value_weight: of the value loss.
    """

    name = "ppo"
    measured = (*POLICY_MEASURES, "value_clip_share")

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        value_clip: float = 0.2,
        value_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.bounds = _bounds(clip_low, clip_high, dual_clip)
        if value_clip <= 0:
            raise UserError(f"value_clip must be positive, got {value_clip}")
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
        policy = clipped_policy_loss(stats.logprob, _old_logprob(stats, batch), _credit(self, batch), **self.bounds)
        policy = _weighted(policy, batch.importance)
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

    def measures(self, stats: TokenStats, batch: Batch) -> dict[str, LossTerm]:
        """See `policy_measures`; and `value_clip_share`, the tokens whose value has moved by more than `value_clip`."""
        mask = sampled(batch)
        moved = (_needed(batch.scores, "scores") - _needed(batch.old_values, "old_values")).detach().abs()
        clipped = LossTerm((mask & (moved > self.value_clip)).sum().double(), mask.sum())
        return {**policy_measures(stats, batch, self.bounds), "value_clip_share": clipped}


@torch.no_grad()
def policy_measures(
    stats: TokenStats, batch: Batch, bounds: Mapping[str, Any], *, whole: bool = False
) -> dict[str, LossTerm]:
    """What is watched while a policy learns from a round, as sums and counts: means over sampled tokens, or sequences.

    `clip_low`, `clip_high`: share of those that clipping keeps from moving further, blamed below 1 - clip_low and praised
    above 1 + clip_high, and `clip_share` both (TRL's clip_ratio, OpenRLHF's ppo_clip_ratio); `ratio`, the mean probability
    ratio to the policy that sampled, which is 1 on average, and `ratio_variance` around 1; `policy_kl` from that policy, by
    k3 (OpenRLHF's ppo_kl is k1 of it); `entropy` of the next token, in nats. `whole`: of sequences in place of tokens.
    """
    mask, old, advantages = sampled(batch), _old_logprob(stats, batch), _needed(batch.advantages, "advantages")
    logprob, tokens = stats.logprob, mask.sum()
    entropy = LossTerm(torch.where(mask, stats.entropy, 0.0).sum(), tokens)
    if whole:
        logprob, old, advantages = (_per_sequence(one, batch) for one in (logprob, old, advantages))
        mask = sequence_token_counts(mask, batch.sequence_ids, batch.roles.shape[0]) > 0
    ratio = probability_ratio(logprob, old)
    low = (ratio < 1.0 - bounds["clip_low"]) & (advantages < 0)
    high = (ratio > 1.0 + bounds["clip_high"]) & (advantages > 0)
    found = {
        "clip_low": low.to(ratio),
        "clip_high": high.to(ratio),
        "clip_share": (low | high).to(ratio),
        "ratio": ratio,
        "ratio_variance": (ratio - 1.0).square(),
        "policy_kl": kl_k3(old, logprob),
    }
    return {
        **{name: LossTerm(torch.where(mask, one, 0.0).sum(), mask.sum()) for name, one in found.items()},
        "entropy": entropy,
    }


def sampled(batch: Batch) -> Tensor:
    """Which target tokens the policy sampled: the completions of ANSWER sequences. (N,) bool."""
    return batch.is_completion & (batch.roles == ANSWER)[batch.sequence_ids]


def _bounds(low: float, high: float, dual: float | None) -> dict[str, Any]:
    if not (0.0 <= low < 1.0 and high >= 0.0):
        raise UserError(f"clip_low must be in [0, 1) and clip_high at least 0, got {low} and {high}")
    if dual is not None and dual <= 1.0 + high:
        raise UserError(
            f"dual_clip bounds what is blamed, beyond 1 + clip_high: it must be above {1 + high:g}, got {dual}"
        )
    return {"clip_low": low, "clip_high": high, "dual_clip": dual}


def _per_sequence(values: Tensor, batch: Batch) -> Tensor:
    """Sums over the sampled tokens of each sequence, (S,)."""
    return sequence_sums(torch.where(sampled(batch), values, 0.0), batch.sequence_ids, batch.roles.shape[0])


def _weighted(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Each loss by the importance weight of its sample: data, whatever it was made of."""
    return losses if weights is None else losses * weights.detach()


def _old_logprob(stats: TokenStats, batch: Batch) -> Tensor:
    """Log-probs of the sampling policy, which is this one when the batch says nothing else."""
    return stats.logprob.detach() if batch.old_logprob is None else batch.old_logprob


def _kl(stats: TokenStats, batch: Batch, estimator: KLEstimator) -> Tensor:
    """Of each token. `k3+` weighs the samples of an earlier policy by their ratio: unbiased there as well."""
    reference = _needed(batch.reference_logprob, "reference_logprob")
    # NaN stands where no reference was asked: those tokens are not sampled ones, and must not spoil the gradient.
    known = ~reference.isnan()
    found = KL_ESTIMATORS[estimator](stats.logprob, torch.where(known, reference, stats.logprob.detach()))
    if estimator != "k3+" or batch.old_logprob is None:
        return found
    # As a number: with d the log ratio to the reference, d rho is the gradient of rho k3, and d that of k3+.
    return found * torch.where(known, probability_ratio(stats.logprob.detach(), batch.old_logprob), 1.0)


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
        "dapo alone; the KL is k3+ by default, because k3's gradient is that of another divergence, and an earlier policy's "
        "samples are weighted by their ratio, as TRL's use_bias_correction_kl; sequences that are masked do not count",
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
        "OpenRLHF's formulas in float64",
        "1e-12 (value), 1e-12 (gradient)",
        "Global token means; a ratio beyond exp(20) goes on as a straight line",
    ),
)
