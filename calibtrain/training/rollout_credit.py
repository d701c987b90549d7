"""The credit of each token of sampled answers: from rewards to a batch's fields.

What a reward is compared with is a need of the objective (`Needs.credit`); what an answer that was cut earns is the config's
rule (`RunConfig.truncated`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.losses.advantages import (
    decoupled_advantages,
    generalized_advantages,
    grpo_advantages,
    rloo_advantages,
    token_rewards,
    whiten,
)
from calibtrain.losses.importance import importance_weights, sampling_mismatch
from calibtrain.losses.terms import sequence_sums
from calibtrain.training.reward_memory import NOTHING, Memory
from calibtrain.training.rollout_rewards import earning, rewards_of
from calibtrain.training.samples import Sample


@dataclass(frozen=True, slots=True)
class Credit:
    """Per-token fields of one sample, as `calibtrain.losses.terms.Batch` has them; empty where it has none."""

    advantages: tuple[float, ...]
    returns: tuple[float, ...] = ()
    importance: tuple[float, ...] = ()
    learned: bool = True  # False: the sample is no part of any batch


@dataclass(frozen=True, slots=True)
class _Flat:
    """A round's samples as tensors."""

    ids: Tensor  # (S,) int64 group of each sample
    lengths: Tensor  # (S,) int64
    owners: Tensor  # (N,) int64 sample of each token
    learned: Tensor  # (S,) bool
    kl: Tensor | None  # (N,) float64, k1 from the starting model


def credit(
    samples: Sequence[Sample], groups: Sequence[int], config: RunConfig, memory: Memory = NOTHING
) -> tuple[list[Credit], dict[str, float]]:
    """Credit of every token of every sample of a round, over all ranks, and the round's means.

    `groups` holds for each sample the number of the question that it answers, `memory` what rewards know of earlier rounds.
    The same samples give the same credit on every rank.
    """
    needs = config.objective.needs
    rewards = paid(samples, groups, config, memory)
    flat = _flat(samples, groups, rewards, config)
    means = _means(samples, rewards)
    # A value is a baseline of its own; the others praise only what differs within a group.
    compared = torch.zeros_like(flat.ids) if needs.credit == "values" else flat.ids
    alike = groups_alike(rewards, compared, flat.learned).double().mean()
    means["alike"] = 0.0 if config.score_teaches else float(alike)  # a score in the loss teaches all the same
    if flat.kl is not None:
        means["kl"] = float(sequence_sums(flat.kl, flat.owners, len(samples)).mean())
    returns = None
    if needs.credit == "values":
        tokens, returns = _by_values(samples, rewards, flat, config)
        means |= _explained(samples, returns, flat)
    else:
        tokens = _by_groups(samples, rewards, flat, config)
    weights, mismatch = _importance(samples, flat, config)
    means |= mismatch

    def cut(values: Tensor | None) -> list[tuple[float, ...]]:
        if values is None:
            return [()] * len(samples)
        return [tuple(part.tolist()) for part in values.split(flat.lengths.tolist())]

    parts = zip(cut(tokens), cut(returns), cut(weights), flat.learned.tolist(), strict=True)
    return [Credit(*part) for part in parts], means


def paid(samples: Sequence[Sample], groups: Sequence[int], config: RunConfig, memory: Memory = NOTHING) -> Tensor:
    """What each sample earns, (2, S) float64 as in `rewards_of`; NaN where it earns nothing, not even a 0.

    That is the end of an answer that did not come to one, unless the cut is the end, or counts for the others.
    """
    earns = earning(samples, config)
    # Nor is it a part of what the others' confidence is scored against.
    known = [one if some else replace(one, correct=math.nan) for one, some in zip(samples, earns.tolist(), strict=True)]
    rewards = rewards_of(known, torch.tensor(groups, dtype=torch.int64), config, memory)
    return torch.where(earns, rewards, torch.nan)


def learned_from(samples: Sequence[Sample], config: RunConfig) -> Tensor:
    """Which samples' tokens are learnt, by the rule for answers that were cut. (S,) bool."""
    out = config.truncated in ("left_out", "masked")
    return torch.tensor([one.finished or not out for one in samples], dtype=torch.bool)


def groups_alike(rewards: Tensor, ids: Tensor, learned: Tensor) -> Tensor:
    """Whether all that earn something in a group earn the same, or none is `learned`: it teaches nothing. (G,) bool.

    `rewards` (2, S), NaN where there is none; `ids` (S,) int64 in [0, G); `learned` (S,) bool.
    """
    groups = int(ids.max()) + 1 if ids.numel() else 0
    low, high = (
        torch.stack(
            [one.new_full((groups,), -limit).scatter_reduce(0, ids, one.nan_to_num(nan=-limit), how) for one in rewards]
        )
        for how, limit in (("amin", -math.inf), ("amax", math.inf))
    )
    some = torch.zeros(groups, dtype=torch.bool).index_put((ids[learned],), torch.tensor(True))
    return (high <= low).all(0) | ~some


def _flat(samples: Sequence[Sample], groups: Sequence[int], rewards: Tensor, config: RunConfig) -> _Flat:
    lengths = torch.tensor([len(one.tokens) for one in samples], dtype=torch.int64)
    cut = torch.tensor([not one.finished for one in samples], dtype=torch.bool)
    learned = learned_from(samples, config)
    if config.objective.needs.credit == "values":  # a group leaves out whom nobody could judge by itself
        learned = learned & (~rewards.isnan().any(0) | (cut & (config.truncated == "bootstrapped")))
    kl = None
    if samples and samples[0].reference:
        pairs = [(a, b) for one in samples for a, b in zip(one.logprobs, one.reference, strict=True)]
        logprob, reference = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        kl = logprob - reference
    return _Flat(
        ids=torch.tensor(groups, dtype=torch.int64),
        lengths=lengths,
        owners=torch.repeat_interleave(torch.arange(len(samples)), lengths),
        learned=learned,
        kl=kl,
    )


def _by_groups(samples: Sequence[Sample], rewards: Tensor, flat: _Flat, config: RunConfig) -> Tensor:
    """Advantage of each token by comparison with the others of its group. (N,) float64."""
    objective: Any = config.objective
    needs, scale = objective.needs, getattr(objective, "scale_advantages", "none")
    priced = flat.kl is not None and needs.kl_in_reward
    if config.rollouts.rewards_nothing and not priced:
        return torch.zeros(len(flat.owners), dtype=torch.float64)
    if needs.word_credit and config.rollouts.splits_credit:
        # The score's own spread is no scale for it: dividing would change what an honest confidence earns.
        first, second = (
            grpo_advantages(one, flat.ids, scale=how) for one, how in zip(rewards, (scale, "none"), strict=True)
        )
        stated = torch.tensor([part for one in samples for part in one.stated], dtype=torch.bool)
        return decoupled_advantages(first, second, stated, flat.owners)
    total = rewards.sum(0)
    if priced:
        assert flat.kl is not None
        total = total - objective.beta * sequence_sums(flat.kl, flat.owners, len(samples))
    if needs.credit == "others":
        return rloo_advantages(total, flat.ids)[flat.owners]
    return grpo_advantages(total, flat.ids, scale=scale)[flat.owners]


def _by_values(samples: Sequence[Sample], rewards: Tensor, flat: _Flat, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Advantage and return of each token, (N,) float64, by the values of the states that it leads from and to."""
    objective: Any = config.objective
    values = torch.tensor([value for one in samples for value in one.values], dtype=torch.float64)
    if config.rollouts.rewards_nothing and flat.kl is None:
        return torch.zeros_like(values), torch.zeros_like(values)
    goes_on = [0.0 if one.finished or config.truncated != "bootstrapped" else one.last_value for one in samples]
    mask = flat.learned[flat.owners]
    kl = torch.zeros_like(values) if flat.kl is None else flat.kl
    per_token = token_rewards(rewards.sum(0).nan_to_num(nan=0.0), kl, mask, flat.owners, beta=objective.beta)
    advantages, returns = generalized_advantages(
        per_token,
        values,
        mask,
        flat.owners,
        gamma=objective.gamma,
        lam=objective.lam,
        last_values=torch.tensor(goes_on, dtype=torch.float64),
    )
    # A KL alone is no advantage of variance 1.
    return (advantages if config.rollouts.rewards_nothing else whiten(advantages, mask)), returns


def _explained(samples: Sequence[Sample], returns: Tensor, flat: _Flat) -> dict[str, float]:
    """Share of the returns' variance that the values at sampling explain: 1 at best, at most 0 where they are no help."""
    mask = flat.learned[flat.owners]
    values = torch.tensor([value for one in samples for value in one.values], dtype=torch.float64)[mask]
    spread = returns[mask].var() if int(mask.sum()) > 1 else returns.new_zeros(())
    return {"explained_variance": float(1.0 - (returns[mask] - values).var() / spread)} if spread > 0 else {}


def _importance(samples: Sequence[Sample], flat: _Flat, config: RunConfig) -> tuple[Tensor | None, dict[str, float]]:
    """The weight of each token, (N,), None without a correction; how far sampler and trainer are apart, where known.

    Raises UserError where there should be a correction and whoever sampled gave no log-probs.
    """
    rollouts = config.rollouts
    if not all(len(one.logprobs) == len(one.sampled_logprobs) == len(one.tokens) for one in samples):
        if rollouts.correction != "none":
            raise UserError(
                f"rollouts.correction: {rollouts.correction} needs log-probs of whoever samples: it gives none"
            )
        return None, {}
    ours, theirs = (
        torch.tensor([value for one in samples for value in getattr(one, name)], dtype=torch.float64)
        for name in ("logprobs", "sampled_logprobs")
    )
    told = {f"sampling_{name}": value for name, value in sampling_mismatch(ours, theirs).items()}
    if rollouts.correction == "none":
        return None, told
    weights = importance_weights(
        ours, theirs, flat.owners, len(samples), how=rollouts.correction, cap=rollouts.correction_cap
    )
    told |= {f"importance_{name}": float(getattr(weights, name)()) for name in ("min", "mean", "max")}
    return weights, told


def mean_grade(samples: Sequence[Sample]) -> float:
    """Share of right answers among those to questions that have answers; NaN without any."""
    grades = [one.correct for one in samples if not math.isnan(one.correct)]
    return sum(grades) / len(grades) if grades else math.nan


def _means(samples: Sequence[Sample], rewards: Tensor) -> dict[str, float]:
    count = max(1, len(samples))
    stated = [one.confidence for one in samples if not math.isnan(one.confidence)]
    return {
        "reward": float(rewards.sum(0).nanmean().nan_to_num()),
        "correct": mean_grade(samples),
        "confidence": sum(stated) / len(stated) if stated else math.nan,
        "confidence_missing": 1.0 - len(stated) / count,
        "abstained": sum(one.abstained for one in samples) / count,
        "truncated": sum(not one.finished for one in samples) / count,
        "tokens": sum(len(one.tokens) for one in samples) / count,
    }
