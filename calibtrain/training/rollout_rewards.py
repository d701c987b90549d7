"""What sampled answers earn: from what their sources give, and from their confidences, to a reward each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from calibtrain.config import RolloutsConfig, RunConfig
from calibtrain.config_rewards import GradeSource, LengthSource, RewardSource
from calibtrain.errors import UserError
from calibtrain.losses.rewards import (
    calibrated_reward,
    check_accuracy_weight,
    check_any_weight,
    confidence_target,
    ppo_c_proper_reward,
    ppo_c_reward,
    proper_score,
    running_mean,
    ternary_reward,
    with_format_penalty,
    worst_score,
)
from calibtrain.records import Record
from calibtrain.tasks.task import Task
from calibtrain.tasks.ungraded import place
from calibtrain.training.reward_memory import NOTHING, WATCHED, Memory, Moments
from calibtrain.training.samples import Sample


def check_rewards(config: RunConfig) -> None:
    """Raise UserError, before any sampling, for rewards that would teach something else than they say."""
    rollouts, score = config.rollouts, config.rollouts.reward
    if score in ("brier", "log"):
        check_any_weight(rollouts.reward_of_right, rollouts.score_weight)
    if not rollouts.scores_statement:
        return  # no answer is given for its score's sake
    if not rollouts.decoupled:
        if getattr(config.objective, "scale_advantages", "none") == "group":
            raise UserError(
                "objective.scale_advantages: group makes a rank of a stated confidence's score, which ends at certainty: "
                "set it to none or batch, or rollouts.decoupled: true"
            )
        _check_budget(rollouts)
    if score != "ppo_c" or rollouts.ppo_c.form == "proper":
        nobody = torch.zeros(0)
        with_format_penalty(nobody, nobody.bool(), penalty=_penalty(rollouts), worst=_worst(rollouts))


def check_graded(config: RunConfig, task: Task, questions: Sequence[Record]) -> None:
    """Raise UserError where answers are paid by their grade and a question has none to grade by, and where a score in the
    loss would find no grade at all.
    """
    if config.rollouts.needs_grades and (bare := next((one for one in questions if not task.gradable(one)), None)):
        raise UserError(
            f"objective.name: {config.objective.name} grades what it samples: training questions need answers, which "
            f"{place(bare)} has not; rollouts.reward: model takes a reward model in their place"
        )
    read = [f"penalties.{one.name}" for one in config.penalties_in_loss]
    if config.confidence_head is not None and config.data.splits.calibration == 0:  # else it is solved for at the end
        read.append("confidence_head")
    if read and not any(map(task.gradable, questions)):
        raise UserError(
            f"{read[0]}: learns from graded answers, and no training question has any to grade by: leave it out, or bring "
            "questions with answers"
        )


def _check_budget(rollouts: RolloutsConfig) -> None:
    """Where one reward serves answer and confidence: being right must be worth more than being surely wrong.

    That an answer is right changes what the grade gives. What a format or a length gives does not depend on it; what a
    reward model, a judge or a function gives may, by nobody knows how much, so that none of them counts here. A grade that
    is clipped or normalised counts by the least that it can be worth. PPO-C's score is against the rewards themselves:
    its budget is known where they are grades alone, and else watched while training (`RewardRounds`).
    """
    right = sum(one.least_of_right for one in rollouts.paid_by if isinstance(one, GradeSource))
    graded = all(isinstance(one, GradeSource) for one in rollouts.paid_by)
    if rollouts.reward == "ppo_c":
        if graded and rollouts.ppo_c.form == "proper":
            check_accuracy_weight(right, rollouts.ppo_c.weight, score="brier")
        return
    score = "log" if rollouts.reward == "log" else "brier"
    try:
        check_accuracy_weight(rollouts.reward_of_right * right, rollouts.score_weight, score=score)  # type: ignore[arg-type]
    except UserError as error:
        if graded and right == 1.0:
            raise
        raise UserError(
            f"rollouts.sources: {error}; of the sources the grade alone is sure to pay for being right, by {right:g} here "
            "times accuracy_weight"
        ) from None


def earning(samples: Sequence[Sample], config: RunConfig) -> Tensor:
    """Which samples earn anything, (S,) bool: an answer that was cut does not, unless the cut is its end, or it counts for
    the others all the same.
    """
    nothing = config.truncated in ("bootstrapped", "left_out")
    return torch.tensor([one.finished or not nothing for one in samples], dtype=torch.bool)


def source_values(samples: Sequence[Sample], config: RunConfig) -> Tensor:
    """What each source gives for each sample, as it is, (K, S) float64; NaN where it gives nothing."""
    asked = iter(range(len(config.rollouts.paid_by)))
    rows = []
    for source in config.rollouts.paid_by:
        if source.ASKED:
            column = next(asked)
            row = [one.rewards[column] for one in samples]
        elif isinstance(source, LengthSource):
            row = [
                -min(1.0, max(0.0, (len(one.tokens) - source.free) / (source.full - source.free))) for one in samples
            ]
        else:
            row = [one.correct for one in samples]
        values = torch.tensor(row, dtype=torch.float64)
        if config.rollouts.reward == "ternary" and isinstance(source, GradeSource):
            abstained = torch.tensor([one.abstained for one in samples], dtype=torch.bool)
            values = ternary_reward(values, abstained, config.abstention.target_risk)
        rows.append(values)
    return torch.stack(rows)


def worth_of(samples: Sequence[Sample], ids: Tensor, config: RunConfig, memory: Memory = NOTHING) -> Tensor:
    """What each answer earns by itself: the weighted sum of its sources, normalised and clipped as each says. (S,) float64.

    Statistics are those of the rounds in `memory`; the first round is measured by its own, of what is `earning`. A source
    that gives nothing for an answer gives it the mean of its group, so that it is neither praised nor blamed, and without
    any there the round's.
    """
    total, earns = torch.zeros(len(samples), dtype=torch.float64), earning(samples, config)
    for index, (source, values) in enumerate(zip(config.rollouts.paid_by, source_values(samples, config), strict=True)):
        if source.normalize:
            known = memory.moments[index] if memory.moments else Moments().with_values(values[earns])
            values = (values - known.mean) / known.deviation
        if source.clip is not None:
            values = values.clamp(-source.clip, source.clip)
        total = total + source.weight * _filled(torch.where(earns, values, torch.nan), ids)
    return total


def rewards_of(samples: Sequence[Sample], ids: Tensor, config: RunConfig, memory: Memory = NOTHING) -> Tensor:
    """What each sample earns for its answer, and for its confidence where that has its own credit. (2, S) float64.

    `memory` is that of the rounds before.
    """
    rollouts = config.rollouts
    worth = worth_of(samples, ids, config, memory)
    nothing = torch.zeros_like(worth)
    if not rollouts.scores_statement:
        # The score of a likelihood or a head, functions of the weights, is a loss: a reward, a constant, teaches nothing.
        share = rollouts.reward_of_right if rollouts.reward in ("brier", "log") else 1.0
        return torch.stack([share * worth, nothing])
    confidence = torch.tensor([one.confidence for one in samples], dtype=torch.float64)
    missing, stated = confidence.isnan(), confidence.nan_to_num(0.5)
    if rollouts.reward == "ppo_c":
        shift = _shift(worth, stated, rollouts, threshold_of(worth, earning(samples, config), memory))
        if rollouts.ppo_c.form == "proper":  # else, as published, silence counts as one half
            shift = with_format_penalty(shift, ~missing, penalty=_penalty(rollouts), worst=_worst(rollouts))
        return torch.stack([worth, shift] if rollouts.decoupled else [worth + shift, nothing])
    correct = torch.tensor([one.correct for one in samples], dtype=torch.float64)
    penalty, worst = _penalty(rollouts), _worst(rollouts)
    if rollouts.paid_by == (GradeSource(),) and not rollouts.decoupled:
        rewards = calibrated_reward(
            correct,
            stated,
            score=rollouts.reward,  # type: ignore[arg-type]
            accuracy_weight=rollouts.reward_of_right,
            score_weight=rollouts.score_weight,
        )
        return torch.stack([with_format_penalty(rewards, ~missing, penalty=penalty, worst=worst), nothing])
    target = confidence_target(correct, ids, rollouts.target_mixing) if rollouts.decoupled else correct
    scores = rollouts.score_weight * proper_score(stated, target, score=rollouts.reward)  # type: ignore[arg-type]
    scores = with_format_penalty(scores, ~missing, penalty=penalty, worst=worst)
    answers = rollouts.reward_of_right * worth
    return torch.stack([answers, scores] if rollouts.decoupled else [answers + scores, nothing])


def remembered(samples: Sequence[Sample], ids: Tensor, config: RunConfig, memory: Memory) -> Memory:
    """The memory with this round of all ranks: scale and threshold of what was paid for, the watch's means of all."""
    rollouts, earns = config.rollouts, earning(samples, config)
    values, worth = source_values(samples, config), worth_of(samples, ids, config, memory)
    if any(one.normalize for one in rollouts.paid_by):
        known = memory.moments or (Moments(),) * len(values)
        kept = zip(rollouts.paid_by, known, values, strict=True)
        memory = replace(
            memory, moments=tuple(old.with_values(v[earns]) if one.normalize else old for one, old, v in kept)
        )
    if rollouts.reward == "ppo_c" and bool(earns.any()):
        before = threshold_of(worth, earns, memory)
        memory = replace(memory, threshold=running_mean(before, worth[earns], rate=rollouts.ppo_c.rate))
    grades = [one.correct for one in samples if not math.isnan(one.correct)]
    proxy = proxy_of(rollouts.paid_by, values)
    if proxy is not None and grades:
        memory = replace(
            memory,
            proxy=(*memory.proxy, proxy)[-WATCHED[-1] :],
            correct=(*memory.correct, sum(grades) / len(grades))[-WATCHED[-1] :],
        )
    return replace(memory, warned=memory.warned or memory.over_optimised > 0)


def proxy_of(sources: Sequence[RewardSource], values: Tensor) -> float | None:
    """The round's mean of what stands in for being right, as it is given and weighted; None without any."""
    means = [one.weight * float(row.nanmean()) for one, row in zip(sources, values, strict=True) if one.PROXY]
    return sum(means) if means and not any(map(math.isnan, means)) else None


def threshold_of(worth: Tensor, earns: Tensor, memory: Memory) -> float:
    """What PPO-C compares a round's rewards (S,) with: the first round is its own, of what `earns` (S,)."""
    if memory.threshold is not None:
        return memory.threshold
    return float(worth[earns].mean()) if bool(earns.any()) else 0.0


def _shift(worth: Tensor, stated: Tensor, rollouts: RolloutsConfig, threshold: float) -> Tensor:
    """What PPO-C adds to each reward."""
    settings = rollouts.ppo_c
    if settings.form == "proper":
        return ppo_c_proper_reward(worth, stated, threshold, weight=settings.weight, scale=settings.scale) - worth
    return ppo_c_reward(worth, stated, threshold, weight=settings.weight, mode=settings.form) - worth


def _filled(values: Tensor, ids: Tensor) -> Tensor:
    """The values with their group's mean where they are NaN, else their round's, else 0."""
    missing = values.isnan()
    if not bool(missing.any()):
        return values
    groups = int(ids.max()) + 1
    sums = values.new_zeros(groups).index_add(0, ids, values.nan_to_num(0.0))
    counts = values.new_zeros(groups).index_add(0, ids, (~missing).to(values))
    means = torch.where(counts > 0, sums / counts.clamp(min=1), values.nanmean().nan_to_num(0.0))
    return torch.where(missing, means[ids], values)


def _worst(rollouts: RolloutsConfig) -> float:
    """The least that a stated confidence can earn by its score: sure, and wrong."""
    if rollouts.reward == "ppo_c":
        return -rollouts.ppo_c.weight
    return rollouts.score_weight * worst_score("log" if rollouts.reward == "log" else "brier")


def _penalty(rollouts: RolloutsConfig) -> float:
    given = rollouts.format_penalty
    return _worst(rollouts) - 0.5 if given is None else given
