"""The credit of each token of sampled answers: from rewards to a batch's fields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibtrain.config import GRPOConfig, PolicyGradientConfig, PPOConfig, RunConfig
from calibtrain.losses.advantages import (
    decoupled_advantages,
    generalized_advantages,
    grpo_advantages,
    rloo_advantages,
    token_rewards,
    whiten,
)
from calibtrain.losses.terms import sequence_sums
from calibtrain.training.reward_memory import NOTHING, Memory
from calibtrain.training.rollout_rewards import rewards_of, share_alike
from calibtrain.training.samples import Sample


@dataclass(frozen=True, slots=True)
class Credit:
    """Per-token fields of one sample, as `calibtrain.losses.terms.Batch` has them; empty where it has none."""

    advantages: tuple[float, ...]
    returns: tuple[float, ...] = ()


def credit(
    samples: Sequence[Sample], groups: Sequence[int], config: RunConfig, memory: Memory = NOTHING
) -> tuple[list[Credit], dict[str, float]]:
    """Credit of every token of every sample of a round, over all ranks, and the round's means.

    `groups` holds for each sample the number of the question that it answers, `memory` what rewards know of earlier rounds.
    The same samples give the same credit on every rank.
    """
    objective = config.objective
    assert isinstance(objective, PolicyGradientConfig)
    ids = torch.tensor(groups, dtype=torch.int64)
    lengths = torch.tensor([len(one.tokens) for one in samples], dtype=torch.int64)
    owners = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    rewards = rewards_of(samples, ids, config, memory)
    kl = _kl(samples, owners)
    means = _means(samples, rewards)
    scored = any(one.name == "answer_score" for one in config.penalties_in_loss)
    # PPO's baseline is its value head; the others praise only what differs within a group.
    compared = torch.zeros_like(ids) if isinstance(objective, PPOConfig) else ids
    means["alike"] = 0.0 if scored else share_alike(rewards, compared)  # a score in the loss teaches all the same
    if kl is not None:
        means["kl"] = float(sequence_sums(kl, owners, len(samples)).mean())
    returns = None
    if config.rollouts.rewards_nothing and (kl is None or isinstance(objective, GRPOConfig)):
        tokens = torch.zeros(len(owners), dtype=torch.float64)
        returns = tokens if isinstance(objective, PPOConfig) else None
    elif isinstance(objective, PPOConfig):
        tokens, returns = _ppo(samples, rewards.sum(0), kl, owners, objective)
        if not config.rollouts.rewards_nothing:  # a KL alone is no advantage of variance 1
            tokens = whiten(tokens, torch.ones_like(tokens, dtype=torch.bool))
    elif isinstance(objective, GRPOConfig):
        first, second = (grpo_advantages(one, ids, scale=objective.scale_advantages) for one in rewards)
        if config.rollouts.splits_credit:
            # The score's own spread is no scale for it: dividing would change what an honest confidence earns.
            second = grpo_advantages(rewards[1], ids, scale="none")
            stated = torch.tensor([part for one in samples for part in one.stated], dtype=torch.bool)
            tokens = decoupled_advantages(first, second, stated, owners)
        else:
            tokens = grpo_advantages(rewards.sum(0), ids, scale=objective.scale_advantages)[owners]
    else:
        total = rewards.sum(0)
        if kl is not None:
            total = total - objective.beta * sequence_sums(kl, owners, len(samples))
        tokens = rloo_advantages(total, ids)[owners]
    cut = [part.tolist() for part in tokens.split(lengths.tolist())]
    cut_returns = [()] * len(samples) if returns is None else [one.tolist() for one in returns.split(lengths.tolist())]
    return [Credit(tuple(a), tuple(r)) for a, r in zip(cut, cut_returns, strict=True)], means


def _kl(samples: Sequence[Sample], owners: Tensor) -> Tensor | None:
    """k1 of every token, (N,) float64; None without a reference."""
    if not samples or not samples[0].reference:
        return None
    pairs = [(a, b) for one in samples for a, b in zip(one.logprobs, one.reference, strict=True)]
    logprob, reference = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return logprob - reference


def _ppo(
    samples: Sequence[Sample], rewards: Tensor, kl: Tensor | None, owners: Tensor, objective: PPOConfig
) -> tuple[Tensor, Tensor]:
    values = torch.tensor([value for one in samples for value in one.values], dtype=torch.float64)
    mask = torch.ones_like(values, dtype=torch.bool)
    kl = torch.zeros_like(values) if kl is None else kl
    per_token = token_rewards(rewards, kl, mask, owners, beta=objective.beta)
    advantages, returns = generalized_advantages(
        per_token, values, mask, owners, gamma=objective.gamma, lam=objective.lam
    )
    return advantages, returns


def _means(samples: Sequence[Sample], rewards: Tensor) -> dict[str, float]:
    count = max(1, len(samples))
    stated = [one.confidence for one in samples if not math.isnan(one.confidence)]
    grades = [one.correct for one in samples if not math.isnan(one.correct)]
    return {
        "reward": float(rewards.sum(0).mean()),
        "correct": sum(grades) / len(grades) if grades else math.nan,  # of the questions that have answers
        "confidence": sum(stated) / max(1, len(stated)),
        "confidence_missing": 1.0 - len(stated) / count,
        "abstained": sum(one.abstained for one in samples) / count,
        "tokens": sum(len(one.tokens) for one in samples) / count,
    }
