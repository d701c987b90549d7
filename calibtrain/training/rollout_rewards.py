"""What sampled answers earn: from grades and confidences to a reward each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calibtrain.config import RunConfig
from calibtrain.errors import UserError
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
from calibtrain.training.samples import Sample


def check_rewards(config: RunConfig) -> None:
    """Raise UserError, before any sampling, for rewards that would teach something else than they say."""
    rollouts, score = config.rollouts, config.rollouts.reward
    if score not in ("brier", "log"):
        return
    check_any_weight(rollouts.reward_of_right, rollouts.score_weight)
    if rollouts.confidence != "stated":
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


def rewards_of(samples: Sequence[Sample], ids: Tensor, config: RunConfig) -> Tensor:
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


def share_alike(rewards: Tensor, ids: Tensor) -> float:
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
