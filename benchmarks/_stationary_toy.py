"""A question whose right answer is drawn anew each time, and all that a policy may sample of it (stationary_points.py)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.losses.terms import ANSWER, Batch
from calibtrain.ops import TokenStats
from calibtrain.training.rollout_credit import groups_alike, learned_from, paid
from calibtrain.training.samples import Sample

GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Confidences that can be stated."""

Scores = Callable[[int, bool, float], Sequence[float]]
"""(answer, whether it is right, what it states) -> what each source that is asked gives."""


@dataclass(frozen=True)
class Toy:
    """A question: the chance of each answer to be the right one, at most 1 together, and how many are sampled at once."""

    truth: tuple[float, ...]
    stated: bool = False  # whether a confidence of GRID follows the answer
    abstains: bool = False  # whether the last answer is an abstention
    group: int = 2
    start: tuple[float, ...] = ()  # logits of the answers, which then stay, so that only what follows them is learnt
    cut: tuple[float | None, ...] = ()  # of an answer that is always cut: the value of the state it comes to
    scores: Scores | None = None  # of the sources that are asked


@dataclass(frozen=True)
class End:
    """Where the gradient is zero: probability of each answer, the mean confidence stated behind each, and what a confidence
    head tells of each.
    """

    answers: tuple[float, ...]
    stated: tuple[float, ...] = ()
    told: tuple[float, ...] = ()


class Policy:
    """Logits of the answers, and of what may be stated behind each."""

    def __init__(self, toy: Toy) -> None:
        size = len(toy.truth)
        start = toy.start or (0.0,) * size
        self.answers = torch.tensor(start, dtype=torch.float64).requires_grad_(not toy.start)
        self.levels = torch.zeros((size, len(GRID)), dtype=torch.float64).requires_grad_(toy.stated)
        statements = range(len(GRID)) if toy.stated else [None]
        self.actions = list(itertools.product(range(size), statements))
        self.toy = toy

    def parameters(self) -> list[Tensor]:
        """What is learnt."""
        return [one for one in (self.answers, self.levels) if one.requires_grad]

    def logprobs(self) -> Tensor:
        """Log-prob of each token of each action, (A, 1) or (A, 2)."""
        answers, levels = self.answers.log_softmax(0), self.levels.log_softmax(1)
        place = torch.tensor([answer for answer, _ in self.actions])
        if not self.toy.stated:
            return answers[place, None]
        said = torch.tensor([statement for _, statement in self.actions])
        return torch.stack([answers[place], levels[place, said]], dim=1)

    def end(self) -> End:
        """Where it is now."""
        q = self.levels.detach().softmax(1) @ torch.tensor(GRID, dtype=torch.float64)
        answers = self.answers.detach().softmax(0)
        return End(tuple(answers.tolist()), tuple(q.tolist()) if self.toy.stated else ())


class Question:
    """All groups that may be sampled, each with every answer that may be right, as samples and as one batch."""

    def __init__(self, config: RunConfig, toy: Toy, policy: Policy, size: int) -> None:
        self.config, self.toy, self.size = config, toy, size
        wrong = 1.0 - sum(toy.truth)
        outcomes = [*enumerate(toy.truth), *([(-1, wrong)] if wrong > 1e-9 else [])]
        groups = list(itertools.product(range(len(policy.actions)), repeat=size))
        cases = [(group, right, chance) for right, chance in outcomes for group in groups]
        self.groups = torch.tensor([group for group, _, _ in cases])
        self.chance = torch.tensor([chance for _, _, chance in cases], dtype=torch.float64)
        self.owner = torch.arange(len(cases)).repeat_interleave(size)
        kinds = {
            (action, right): self._sample(policy.actions[action], right)
            for action in range(len(policy.actions))
            for right, _ in outcomes
        }
        self.samples = [kinds[action, right] for group, right, _ in cases for action in group]
        self.batch = self.batch_of(self.samples)
        self.signal = torch.ones(len(cases), dtype=torch.float64)
        if config.rollouts.dynamic_sampling:  # groups alike are thrown away
            rewards = paid(self.samples, self.owner.tolist(), config)
            alike = groups_alike(rewards, self.owner, learned_from(self.samples, config))
            self.signal = (~alike).double()

    def _sample(self, action: tuple[int, int | None], right: int) -> Sample:
        answer, statement = action
        abstained = self.toy.abstains and answer == len(self.toy.truth) - 1
        tokens = (answer,) if statement is None else (answer, 100 + statement)
        said = 0.5 if statement is None else GRID[statement]
        return Sample(
            question=0,
            tokens=tokens,
            correct=float(answer == right and not abstained),
            confidence=said,  # of a likelihood no credit may depend on it
            abstained=abstained,
            stated=(False, True)[: len(tokens)],
            finished=not self.toy.cut or self.toy.cut[answer] is None,
            last_value=(self.toy.cut[answer] if self.toy.cut else None) or 0.0,
            rewards=() if self.toy.scores is None else tuple(self.toy.scores(answer, answer == right, said)),
        )

    def batch_of(self, samples: Sequence[Sample]) -> Batch:
        """The samples as the trainer collates them."""
        ends = self.config.truncated == "graded"
        unscored = [one.abstained or not (one.finished or ends) for one in samples]
        grades = [math.nan if none else one.correct for one, none in zip(samples, unscored, strict=True)]
        pairs = zip(samples, grades, strict=True)
        return collate([Encoded((7, *one.tokens), 1, ANSWER, 0, correct=grade) for one, grade in pairs], 0)

    def weights(self, logprobs: Tensor) -> Tensor:
        """Probability of each case that is learnt from, under a policy with these log-probs of its actions. (cases,)."""
        chances = self.signal * self.chance * logprobs.sum(1)[self.groups].sum(1).exp()
        return chances / chances.sum().clamp(min=1e-9) if self.config.rollouts.dynamic_sampling else chances


def stats_of(logprob: Tensor) -> TokenStats:
    zeros = torch.zeros_like(logprob)
    return TokenStats(logprob, zeros, zeros, zeros, zeros > 0)
