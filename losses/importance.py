"""Weights for samples that were drawn by another policy than the one that learns from them.

Whoever samples (a server in lower precision, one step behind) gives each token a log-prob of its own. Under its samples a
policy gradient is that of the trainer's policy once each is weighted by the ratio of the two. The ratio to the policy that
the trainer had when the round began is fixed then; how far the policy has moved since is the clipped ratio's part.

Theta or data: both log-probs were measured, so that the weight is a number: no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.losses.catalog import LossEntry
from calibtrain.losses.kl import kl_k3
from calibtrain.losses.terms import sequence_sums
from calibtrain.ops import at_least_float32

Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def importance_weights(
    logprob: Tensor,
    sampled_logprob: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    how: Correction = "token_truncate",
    cap: float = 3.0,
) -> Tensor:
    """min(w, cap), or w where it is at most `cap` and else 0, with w = exp(logprob - sampled_logprob).

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"). `how` says whether w is that of each token or the product over a whole sequence, at each of its tokens, and
    whether it is truncated or masked. `logprob` (N,) under the trainer's policy, `sampled_logprob` (N,) under the sampler's,
    NaN where it gave none, which weighs 1; `sequence_ids` (N,) int64 in [0, num_sequences). Returns (N,) float32 or float64
    without gradient. Truncation biases towards the sampler's policy by what it cuts; it never does by more than that.
    Raises UserError for a `how` that there is not.
    """
    level, _, bound = how.partition("_")
    if level not in ("token", "sequence") or bound not in ("truncate", "mask"):
        raise UserError(f"correction must be token_|sequence_ and truncate|mask, got {how!r}")
    difference = (at_least_float32(logprob.detach()) - at_least_float32(sampled_logprob.detach())).nan_to_num(nan=0.0)
    if level == "sequence":
        difference = sequence_sums(difference, sequence_ids, num_sequences)[sequence_ids]
    weights = difference.exp()
    return weights.clamp(max=cap) if bound == "truncate" else torch.where(weights <= cap, weights, 0.0)


def sampling_mismatch(logprob: Tensor, sampled_logprob: Tensor) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's, over all tokens (N,) that have both.

    `difference_mean` and `difference_max` of their absolute difference, in nats; `kl` of the sampler's policy from the
    trainer's, by k3 on the sampler's tokens: unbiased, never negative. Empty where no token has both.
    """
    known = ~(logprob.isnan() | sampled_logprob.isnan())
    if not bool(known.any()):
        return {}
    ours, theirs = at_least_float32(logprob[known]), at_least_float32(sampled_logprob[known])
    difference = (ours - theirs).abs()
    return {
        "difference_mean": float(difference.mean()),
        "difference_max": float(difference.max()),
        "kl": float(kl_k3(theirs, ours).mean()),
    }


CATALOG = (
    LossEntry(
        "importance_weights",
        "function",
        "Weights of samples that another engine drew",
        'Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"',
        "min(exp(lp - lp_sampler), cap); 0 beyond the cap",
        "one forward pass over the samples",
        "TRL 1.16.0 GRPOTrainer, all four modes",
        "1e-6 (value), 1e-5 (gradient)",
    ),
)
