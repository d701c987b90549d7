"""Graded answers with the hidden states they came from, by which they can be scored again at any temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibtrain.calibration.temperature import TEMPERATURE_GRID
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.generation import Generation
from calibtrain.models.loss_model import AnswerFeatures, ScoreStep


@dataclass(frozen=True, slots=True)
class OptionFeatures:
    """Every option that N answers were chosen from: all it takes to score them at any temperature."""

    features: AnswerFeatures  # of the options' tokens; their grades are NaN
    owner: Tensor  # (options,) int64: the answer that each option is one of, ascending
    mean: bool = False  # an option's score is the mean of its tokens' log-probs, not the sum

    def select(self, rows: Tensor) -> OptionFeatures:
        """Those of the answers at `rows` (K,) int64, in that order."""
        places = [torch.nonzero(self.owner == row)[:, 0] for row in rows.tolist()]
        counts = torch.tensor([len(one) for one in places], dtype=torch.int64)
        chosen = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
        owner = torch.repeat_interleave(torch.arange(len(places)), counts)
        return OptionFeatures(self.features.select(chosen), owner, self.mean)


@dataclass(frozen=True, slots=True)
class ReplyTokens:
    """A reply as it was generated: its ids, with the end token where it came, and which of them are the answer."""

    tokens: tuple[int, ...]
    span: tuple[int, int]  # tokens[start:stop]


@dataclass(frozen=True, slots=True)
class Answered:
    """Graded answers with the hidden states they came from, in the order of the questions."""

    answers: list[Answer]
    features: AnswerFeatures
    options: OptionFeatures | None = None  # where each answer is the likeliest of its options
    asked: Tensor | None = (
        None  # (N, H) float32 final states of the prompts' last tokens; None of an engine, or over ranks
    )
    # What a confidence head reads, where its layers were asked for (calibtrain.models.confidence_head), float32:
    states: Tensor | None = None  # (N, layers, POSITIONS, H)
    readings: Tensor | None = None  # (N, READINGS)
    replies: tuple[ReplyTokens, ...] | None = None  # all that was generated; None where nothing was, or over ranks

    def select(self, rows: Tensor) -> Answered:
        """The answers at `rows` (K,) int64, in that order."""
        options = None if self.options is None else self.options.select(rows)
        asked, states, readings = (
            one if one is None else one[rows] for one in (self.asked, self.states, self.readings)
        )
        answers = [self.answers[row] for row in rows.tolist()]
        replies = None if self.replies is None else tuple(self.replies[row] for row in rows.tolist())
        return Answered(answers, self.features.select(rows), options, asked, states, readings, replies)


def features_of_generations(generations: Sequence[Generation], correct: Sequence[bool | None]) -> AnswerFeatures:
    """Hidden states and tokens of generations with their grades, None where there is none."""
    lengths = torch.tensor([len(generation.tokens) for generation in generations], dtype=torch.int64)
    empty_hidden = [generation.hidden for generation in generations] or [torch.zeros(0, 0)]
    grades = [math.nan if one is None else float(one) for one in correct]
    return AnswerFeatures(
        hidden=torch.cat(empty_hidden),
        targets=torch.tensor([token for generation in generations for token in generation.tokens], dtype=torch.int64),
        sequence_ids=torch.repeat_interleave(torch.arange(len(generations)), lengths),
        correct=torch.tensor(grades, dtype=torch.float32),
    )


def answer_table(
    model: Callable[..., Any],
    answered: Answered,
    temperatures: Sequence[float] = TEMPERATURE_GRID,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Log-prob of each whole answer with its logits divided by each temperature. (N, K) float64 on CPU.

    Of one that was chosen by likelihood it is that among its options: each one's tokens are scored at the temperature, and
    the answer stays the one that was given, also at temperatures at which another option would be the likeliest.
    """
    if answered.options is None:
        return logprob_table(model, answered.features, temperatures, device)
    table = option_table(model, answered.options, temperatures, device)
    first = torch.searchsorted(answered.options.owner, torch.arange(len(answered.answers)))
    chosen = torch.tensor([answer.choice or 0 for answer in answered.answers], dtype=torch.int64)
    return table[first + chosen]


def option_table(
    model: Callable[..., Any],
    options: OptionFeatures,
    temperatures: Sequence[float] = TEMPERATURE_GRID,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Log-prob of each option among those of its answer at each temperature. (options, K) float64 on CPU."""
    scores = logprob_table(model, options.features, temperatures, device)
    if options.mean:
        lengths = torch.bincount(options.features.sequence_ids, minlength=scores.shape[0])
        scores = scores / lengths[:, None]
    return among(scores, options.owner)


def among(scores: Tensor, owner: Tensor) -> Tensor:
    """Log-softmax of scores (S, K) over the rows of one `owner` (S,), ascending from 0 without a gap."""
    count = int(owner[-1]) + 1 if len(owner) else 0
    index = owner[:, None].expand_as(scores)
    highest = scores.new_full((count, scores.shape[1]), -math.inf).scatter_reduce(0, index, scores, "amax")
    shifted = scores - highest[owner]
    return shifted - scores.new_zeros(highest.shape).index_add(0, owner, shifted.exp()).log()[owner]


@torch.no_grad()
def logprob_table(
    model: Callable[..., Any],
    features: AnswerFeatures,
    temperatures: Sequence[float] = TEMPERATURE_GRID,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sum of the log-probs of each sequence with its logits divided by each temperature. (S, K) float64 on CPU."""
    per_token = token_logprob_table(model, features, temperatures, device)
    return per_token.new_zeros(features.correct.shape[0], len(temperatures)).index_add(
        0, features.sequence_ids, per_token
    )


@torch.no_grad()
def token_logprob_table(
    model: Callable[..., Any],
    features: AnswerFeatures,
    temperatures: Sequence[float] = TEMPERATURE_GRID,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Log-prob of each token of the answers with its logits divided by each temperature. (T, K) float64 on CPU."""
    step = ScoreStep(features.hidden.to(device), features.targets.to(device), torch.tensor(temperatures, device=device))
    return model(step).cpu().double()
