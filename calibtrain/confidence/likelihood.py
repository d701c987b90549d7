"""Confidence from likelihood: the probability a model gave to exactly the answer it chose."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calibtrain.calibration.temperature import TEMPERATURE_GRID
from calibtrain.confidence.answer import Answer, AnswerPart
from calibtrain.confidence.generation import AllDone, Generation, generate
from calibtrain.config import EvaluationConfig
from calibtrain.data.replies import Reply, read_reply
from calibtrain.data.templates import Template
from calibtrain.models.loss_model import AnswerFeatures, ScoreStep
from calibtrain.records import Record
from calibtrain.tasks.task import Grade

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answered:
    """Graded answers with the hidden states they came from, in the order of the questions."""

    answers: list[Answer]
    features: AnswerFeatures
    asked: Tensor | None = None  # (N, H) float32 final states of the prompts' last tokens; None of an engine


def answer_questions(
    model: Callable[..., Any],
    template: Template,
    records: Sequence[Record],
    settings: EvaluationConfig,
    *,
    shots: Sequence[Record] = (),
    device: torch.device | str = "cpu",
    all_done: AllDone = bool,
    share_prefix: bool = True,
    not_first: Sequence[int] = (),
    on_batch: Callable[[int], None] = lambda questions_done: None,
) -> Answered:
    """Greedy answers of `model` (a LossModel or the engine around it) to `records`, graded where they can be.

    not_first: tokens that no answer may begin with.

    The confidence of an answer is the product of its tokens' probabilities with the end token's, so that "Guinea" is
    not credited with the probability of "Guinea-Bissau".
    """
    prompts = [template.prompt_ids(record, shots) for record in records]
    generations = generate(
        model,
        prompts,
        stop_ids=template.stop_ids,
        goes_on=template.goes_on,
        pad_id=template.pad_id,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        device=device,
        all_done=all_done,
        share_prefix=share_prefix,
        not_first=not_first,
        on_batch=on_batch,
    )
    return graded_answers(records, [samples[0] for samples in generations], template, settings)


def graded_answers(
    records: Sequence[Record], generations: Sequence[Generation], template: Template, settings: EvaluationConfig
) -> Answered:
    """The answers that the template's task finds in generated replies, graded where they can be.

    The log-probs and hidden states are those of the answer's tokens, given what was said and thought before them.
    """
    tell_thinking(generations, template, settings)
    replies = [read_reply(template, one.tokens, record) for one, record in zip(generations, records, strict=True)]
    grades = template.task.grades([one.reading for one in replies], records)
    spans = [span_of(one, reply.span) for one, reply in zip(generations, replies, strict=True)]
    answers = [
        Answer(
            question_id=record.id,
            question=record.question,
            text=reply.reading.text,
            token_logprobs=span.logprobs,
            correct=grade.correct,
            accepted=record.accepted,
            strata=record.strata,
            finished=whole.finished,
            tokens=template.token_texts(span.tokens),
            key=template.task.key(reply.reading.text, record),
            reply="" if reply.text == reply.reading.text else reply.text,
            reply_logprob=None if len(span.tokens) == len(whole.tokens) else math.fsum(whole.logprobs),
            found=reply.reading.found,
            parts=_parts(reply, grade, whole),
        )
        for record, reply, grade, span, whole in zip(records, replies, grades, spans, generations, strict=True)
    ]
    return Answered(answers, _features(spans, answers), _asked(generations))


def _asked(generations: Sequence[Generation]) -> Tensor | None:
    """The states that predicted each reply's first token."""
    states = [one.hidden[0].float() for one in generations]
    return torch.stack(states) if states and states[0].numel() else None


def span_of(generation: Generation, span: tuple[int, int]) -> Generation:
    """The tokens [start, stop) of a generation."""
    start, stop = span
    return replace(
        generation,
        tokens=generation.tokens[start:stop],
        logprobs=generation.logprobs[start:stop],
        hidden=generation.hidden[start:stop],
    )


def _parts(reply: Reply, grade: Grade, whole: Generation) -> tuple[AnswerPart, ...]:
    correct = grade.parts or (None,) * len(reply.parts)
    return tuple(
        AnswerPart(part.name, part.text, math.fsum(whole.logprobs[slice(*span)]), right)
        for part, span, right in zip(reply.reading.parts, reply.parts, correct, strict=True)
    )


def tell_thinking(generations: Sequence[Generation], template: Template, settings: EvaluationConfig) -> None:
    """Warn of generations that are thinking alone."""
    lost = sum(template.answer_start(one.tokens) is None for one in generations)
    if lost:
        logger.warning(
            "%d of %d answers are thinking that did not end in evaluation.max_new_tokens: %d, and count as empty; raise it, "
            "or see data.chat_template_kwargs (enable_thinking: false)",
            lost, len(generations), settings.max_new_tokens,
        )  # fmt: skip


def sample_answers(
    model: Callable[..., Any],
    template: Template,
    records: Sequence[Record],
    settings: EvaluationConfig,
    *,
    samples: int,
    seed: int,
    shots: Sequence[Record] = (),
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda questions_done: None,
) -> list[list[str]]:
    """Texts of `samples` whole replies to each record, drawn at temperature 1."""
    generations = generate(
        model,
        [template.prompt_ids(record, shots) for record in records],
        stop_ids=template.stop_ids,
        goes_on=template.goes_on,
        pad_id=template.pad_id,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        samples=samples,
        seed=seed,
        device=device,
        on_batch=on_batch,
    )
    return [[template.decode_answer(generation.tokens) for generation in row] for row in generations]


@torch.no_grad()
def logprob_table(
    model: Callable[..., Any],
    features: AnswerFeatures,
    temperatures: Sequence[float] = TEMPERATURE_GRID,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Log-prob of each answer with its logits divided by each temperature. (S, K) float64 on CPU."""
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


def _features(generations: Sequence[Generation], answers: Sequence[Answer]) -> AnswerFeatures:
    lengths = torch.tensor([len(generation.tokens) for generation in generations], dtype=torch.int64)
    empty_hidden = [generation.hidden for generation in generations] or [torch.zeros(0, 0)]
    grades = [math.nan if answer.correct is None else float(answer.correct) for answer in answers]
    return AnswerFeatures(
        hidden=torch.cat(empty_hidden),
        targets=torch.tensor([token for generation in generations for token in generation.tokens], dtype=torch.int64),
        sequence_ids=torch.repeat_interleave(torch.arange(len(generations)), lengths),
        correct=torch.tensor(grades, dtype=torch.float32),
    )
