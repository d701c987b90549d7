"""Estimators of KL(policy || reference) from the log-probs of sampled tokens (Schulman 2020, "Approximating KL divergence").

With d = log pi(y) - log pi_ref(y) and y drawn from pi:

    name  formula         mean    gradient's mean          use
    k1    d               KL      0                        in the reward, where nothing is differentiated
    k2    d^2 / 2         biased  grad KL                  in the loss
    k3    exp(-d) - 1 + d KL      grad KL(ref || policy)   in GRPO's loss, as published
    k3+   k3              KL      grad KL                  in the loss, where its value is also logged

Theta or data: KL is that of each next-token distribution, given the tokens before it, and those are data to a term in the
loss, as in GRPO as published: what a token does to the divergence of the tokens after it has no part in its gradient. In the
reward (RLOO, PPO) it has. The tokens of an earlier policy are another policy's samples: GRPOLoss weighs its k3+ of them by
the ratio of the two, and then the mean and its gradient are right again; k2 and k3 it takes as published, as they are.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from calibtrain.losses.catalog import LossEntry
from calibtrain.ops import at_least_float32

KLEstimator = Literal["k1", "k2", "k3", "k3+"]

EXPONENT = 20.0
"""Beyond this an exponential goes on as a straight line: it stays finite, and its gradient keeps its sign."""


def tangent_exp(x: Tensor) -> Tensor:
    """exp(x), continued above x = EXPONENT by its tangent there. Any shape and floating dtype; keeps both."""
    beyond = x > EXPONENT
    # Two branches, not exp(min(x, E)) + (x - min(x, E)) exp(E): float32 gradients would drown in the terms that cancel.
    inside = torch.where(beyond, EXPONENT, x).exp()
    return torch.where(beyond, inside * (1.0 + x - EXPONENT), inside)


def kl_k1(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """The log ratio d of each token: unbiased, of high variance, may be negative. Both (N,) floating; returns (N,).

    In a loss its gradient is 0 on average: put it in the reward.
    """
    return _log_ratio(logprob, reference_logprob)


def kl_k2(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """Half the squared log ratio, d^2 / 2: biased in value, right in gradient on average. Both (N,); returns (N,)."""
    return 0.5 * _log_ratio(logprob, reference_logprob).square()


def kl_k3(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """exp(-d) - 1 + d of each token: unbiased and never negative. Both (N,) floating; returns (N,).

    Its gradient is that of KL(reference || policy) on average. Below d = -EXPONENT it is `tangent_exp`.
    """
    d = _log_ratio(logprob, reference_logprob)
    small = d > -1.0
    # expm1 keeps the digits where the policy is near its reference, which is where training starts.
    near = torch.expm1(-torch.where(small, d, 0.0))
    return torch.where(small, near, tangent_exp(-torch.where(small, 0.0, d)) - 1.0) + d


def kl_straight_through(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """k3 forward, k2 backward ("k3+"): unbiased in value and in gradient. Both (N,) floating; returns (N,)."""
    k2 = kl_k2(logprob, reference_logprob)
    # In this order the second term is exactly 0 in value.
    return kl_k3(logprob, reference_logprob).detach() + (k2 - k2.detach())


def _log_ratio(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """d, in float32 or float64: two bf16 log-probs of -10 that differ by 0.03 are the same number. The reference is data."""
    return at_least_float32(logprob) - at_least_float32(reference_logprob.detach())


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3, "k3+": kl_straight_through}

_FORMULA = ("float64 formula", "1e-12 (value), 1e-12 (gradient)")
CATALOG = tuple(
    LossEntry(
        name=function.__name__,
        kind="function",
        title=title,
        paper='Schulman 2020, "Approximating KL divergence"',
        equation=equation,
        cost="one forward pass of a frozen reference",
        compared_with=peer,
        largest_deviation=deviation,
        differs=differs,
    )
    for equation, function, title, peer, deviation, differs in (
        ("d", kl_k1, "KL estimate for the reward", *_FORMULA, "No clamp: OpenRLHF's, at 10, biases it"),
        ("d^2 / 2", kl_k2, "KL estimate with the right gradient", *_FORMULA, ""),
        (
            "exp(-d) - 1 + d",
            kl_k3,
            "KL estimate of GRPO",
            "TRL 1.16.0 GRPOTrainer; Liger-Kernel 0.8.5",
            "1e-6 (value), 1e-5 (gradient)",
            "Beyond d = -20 it goes on as a straight line; a clamped exponent, as in verl, leaves +d there, whose gradient "
            "has the wrong sign",
        ),
        (
            "exp(-d) - 1 + d forward, d^2 / 2 backward",
            kl_straight_through,
            "KL estimate right in value and gradient",
            *_FORMULA,
            "Exponent as in k3",
        ),
    )
)
