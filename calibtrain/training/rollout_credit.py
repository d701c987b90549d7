"""What sampled answers earn, and the credit of each of their tokens: from grades and confidences to a batch's fields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibtrain.config import GRPOConfig, PolicyGradientConfig, PPOConfig, RunConfig
from calibtrain.errors import UserError
from calibtrain.losses.advantages import (
    decoupled_advantages,
    generalized_advantages,
    grpo_advantages,
    rloo_advantages,
    token_rewards,
    whiten,
)
from calibtrain.losses.rewards import (
    calibrated_reward,
    check_accuracy_weight,
    check_any_weight,
    confidence_target,
    proper_score,
    ternary_reward,
    with_format_penalty,
    worst_score,
)
from calibtrain.losses.terms import sequence_sums


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled answer; its tokens end with the stop token, unless it was cut."""

    question: int  # index in the training questions
    tokens: tuple[int, ...]
    correct: float
    confidence: float  # NaN: it should have stated one and did not
    abstained: bool = False
    answer_start: int = 0  # tokens of reasoning before the answer
    answer_stop: int | None = None  # where tokens behind the answer begin; None: there are none
    stated: tuple[bool, ...] = ()  # which tokens state the confidence, where it is stated
    logprobs: tuple[float, ...] = ()  # under the policy that sampled, where a later step or the KL needs them
    reference: tuple[float, ...] = ()  # under the starting model, where the KL needs them
    values: tuple[float, ...] = ()  # of PPO's value head


@dataclass(frozen=True, slots=True)
class Credit:
    """Per-token fields of one sample, as `calibtrain.losses.terms.Batch` has them; empty where it has none."""

    advantages: tuple[float, ...]
    returns: tuple[float, ...] = ()


def check_rewards(config: RunConfig) -> None:
    """Raise UserError, before any sampling, for rewards that would teach something else than they say."""
    rollouts, score = config.rollouts, config.rollouts.reward
    if score not in ("brier", "log"):
        return
    check_any_weight(rollouts.reward_of_right, rollouts.score_weight)
    if rollouts.confidence == "likelihood":
        return  # no answer is given for its score's sake
    if not rollouts.decoupled:
        if getattr(config.objective, "scale_advantages", "none") == "group":
            raise UserError(
                "objective.scale_advantages: group makes a rank of a stated confidence's score, which ends at certainty: "
                "set it to none or batch, or rollouts.decoupled: true"
            )
        check_accuracy_weight(rollouts.reward_of_right, rollouts.score_weight, score=score)
    with_format_penalty(
        torch.zeros(0), torch.zeros(0, dtype=torch.bool), penalty=_penalty(config), worst=_worst(config)
    )


def credit(
    samples: Sequence[Sample], groups: Sequence[int], config: RunConfig
) -> tuple[list[Credit], dict[str, float]]:
    """Credit of every token of every sample of a round, over all ranks, and the round's means.

    `groups` holds for each sample the number of the question that it answers. The same samples give the same credit on
    every rank.
    """
    objective = config.objective
    assert isinstance(objective, PolicyGradientConfig)
    ids = torch.tensor(groups, dtype=torch.int64)
    lengths = torch.tensor([len(one.tokens) for one in samples], dtype=torch.int64)
    owners = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    rewards = _rewards(samples, ids, config)
    kl = _kl(samples, owners)
    means = _means(samples, rewards)
    scored = any(one.name == "answer_score" for one in config.penalties_in_loss)
    # PPO's baseline is its value head; the others praise only what differs within a group.
    compared = torch.zeros_like(ids) if isinstance(objective, PPOConfig) else ids
    means["alike"] = 0.0 if scored else _share_alike(rewards, compared)  # a score in the loss teaches all the same
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
        if config.rollouts.decoupled and config.rollouts.confidence == "stated":
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


def _rewards(samples: Sequence[Sample], ids: Tensor, config: RunConfig) -> Tensor:
    """What each sample earns for its answer, and for its confidence where that has its own credit. (2, S) float64."""
    rollouts = config.rollouts
    correct = torch.tensor([one.correct for one in samples], dtype=torch.float64)
    confidence = torch.tensor([one.confidence for one in samples], dtype=torch.float64)
    nothing = torch.zeros_like(correct)
    if rollouts.reward == "accuracy":
        return torch.stack([correct, nothing])
    if rollouts.score_in_loss:
        # The confidence is a function of the weights. As a reward, a constant, its score would teach nothing of it.
        return torch.stack([rollouts.reward_of_right * correct, nothing])
    if rollouts.reward == "ternary":
        abstained = torch.tensor([one.abstained for one in samples], dtype=torch.bool)
        return torch.stack([ternary_reward(correct, abstained, config.abstention.target_risk), nothing])
    missing = confidence.isnan()
    stated = confidence.nan_to_num(0.5)
    if rollouts.decoupled:
        target = confidence_target(correct, ids, rollouts.target_mixing)
        scores = rollouts.score_weight * proper_score(stated, target, score=rollouts.reward)
        scores = with_format_penalty(scores, ~missing, penalty=_penalty(config), worst=_worst(config))
        return torch.stack([rollouts.reward_of_right * correct, scores])
    rewards = calibrated_reward(
        correct,
        stated,
        score=rollouts.reward,
        accuracy_weight=rollouts.reward_of_right,
        score_weight=rollouts.score_weight,
    )
    rewards = with_format_penalty(rewards, ~missing, penalty=_penalty(config), worst=_worst(config))
    return torch.stack([rewards, nothing])


def _share_alike(rewards: Tensor, ids: Tensor) -> float:
    """Share of the groups in which every answer earns the same, (2, S) rewards: nothing is learnt from these."""
    if not ids.numel():
        return 0.0
    groups = int(ids.max()) + 1
    low, high = (
        torch.stack([one.new_zeros(groups).scatter_reduce(0, ids, one, how, include_self=False) for one in rewards])
        for how in ("amin", "amax")
    )
    return float((high == low).all(0).double().mean())


def _worst(config: RunConfig) -> float:
    """The least that an answer in format can earn: sure, and wrong."""
    score = "log" if config.rollouts.reward == "log" else "brier"
    return config.rollouts.score_weight * worst_score(score)  # type: ignore[arg-type]


def _penalty(config: RunConfig) -> float:
    given = config.rollouts.format_penalty
    return _worst(config) - 0.5 if given is None else given


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
    return {
        "reward": float(rewards.sum(0).mean()),
        "correct": sum(one.correct for one in samples) / count,
        "confidence": sum(stated) / max(1, len(stated)),
        "confidence_missing": 1.0 - len(stated) / count,
        "abstained": sum(one.abstained for one in samples) / count,
        "tokens": sum(len(one.tokens) for one in samples) / count,
    }
