"""Confidence from likelihood: the probability a model gave to exactly the answer it chose."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calibtrain.confidence.answer import Answer, AnswerPart
from calibtrain.confidence.answered import Answered, ReplyTokens, features_of_generations
from calibtrain.confidence.generation import AllDone, Generation, generate, keep_none
from calibtrain.confidence.options import answer_options
from calibtrain.config import EvaluationConfig
from calibtrain.data.replies import Reply, read_reply
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.models.confidence_head import readings_of
from calibtrain.records import Record
from calibtrain.tasks.task import Grade

logger = logging.getLogger(__name__)


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
    graded: bool = True,
    layers: tuple[int, ...] = (),
    on_batch: Callable[[int], None] = lambda questions_done: None,
) -> Answered:
    """Greedy answers of `model` (a LossModel or the engine around it) to `records`, graded where they can be.

    not_first: tokens that no answer may begin with. graded: see `graded_answers`. layers: those of a confidence head, whose
    inputs then come with the answers.

    The confidence of an answer is the product of its tokens' probabilities with the end token's, so that "Guinea" is
    not credited with the probability of "Guinea-Bissau". Where the task has options, the likeliest of them is the answer
    and nothing is generated (`calibtrain.confidence.options`): `not_first` then says nothing.
    """
    if any(scored := [bool(template.task.options(record)) for record in records]):
        if layers:
            raise UserError(
                "a confidence head reads answers that are generated, and these are chosen among options by their "
                "likelihood: set task.answer_by: generation, or leave confidence_head out"
            )
        if not all(scored):
            record = records[scored.index(False)]
            raise UserError(f"{record.origin or record.question}: has no options, where other questions have")
        return answer_options(
            model,
            template,
            records,
            settings,
            shots=shots,
            device=device,
            all_done=all_done,
            share_prefix=share_prefix,
            on_batch=on_batch,
        )
    prompts = [template.prompt_ids(record, shots) for record in records]
    generations = generate(
        model,
        prompts,
        **template.ending,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        device=device,
        all_done=all_done,
        share_prefix=share_prefix,
        not_first=not_first,
        keep=lambda index, tokens: read_reply(template, tokens, records[index]).span,
        layers=layers,
        on_batch=on_batch,
    )
    return graded_answers(records, [samples[0] for samples in generations], template, settings, graded=graded)


def graded_answers(
    records: Sequence[Record],
    generations: Sequence[Generation],
    template: Template,
    settings: EvaluationConfig,
    *,
    graded: bool = True,
) -> Answered:
    """The answers that the template's task finds in generated replies, graded where they can be.

    graded: False in service, where a question has no accepted answer and a grader that needs none is not to be asked.

    The log-probs and hidden states are those of the answer's tokens, given what was said and thought before them.
    """
    tell_thinking(generations, template, settings)
    replies = [read_reply(template, one.tokens, record) for one, record in zip(generations, records, strict=True)]
    readings = [one.reading for one in replies]
    grades = template.task.grades(readings, records) if graded else [Grade(None)] * len(readings)
    spans = [tokens_of(one, reply.read) for one, reply in zip(generations, replies, strict=True)]
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
            asked=record.key,
            key=template.task.key(reply.reading.text, record),
            reply="" if reply.text == reply.reading.text else reply.text,
            reply_logprob=None if len(span.tokens) == len(whole.tokens) else math.fsum(whole.logprobs),
            reply_length=None if len(span.tokens) == len(whole.tokens) else len(whole.tokens),
            found=reply.reading.found,
            parts=_parts(reply, grade, whole),
            options=template.task.choices(record),
        )
        for record, reply, grade, span, whole in zip(records, replies, grades, spans, generations, strict=True)
    ]
    spanned = features_of_generations(spans, [one.correct for one in answers])
    states = [one.states for one in generations if one.states is not None]
    said = tuple(ReplyTokens(tuple(one.tokens), reply.span) for one, reply in zip(generations, replies, strict=True))
    if not states:
        return Answered(answers, spanned, asked=_asked(generations), replies=said)
    return Answered(
        answers,
        spanned,
        asked=_asked(generations),
        replies=said,
        states=torch.stack(states),
        readings=_readings([[one.logprobs, one.entropies] for one in spans], spanned.sequence_ids),
    )


def _readings(tokens: Sequence[Sequence[Sequence[float]]], owner: Tensor) -> Tensor:
    """READINGS of a confidence head, of each answer's log-probs and entropies."""
    logprob, entropy = (torch.tensor([value for one in tokens for value in one[k]]) for k in (0, 1))
    return readings_of(logprob, entropy, torch.ones_like(owner, dtype=torch.bool), owner, len(tokens))


def _asked(generations: Sequence[Generation]) -> Tensor | None:
    """The states that predicted each reply's first token; None where a server keeps them."""
    states = [one.asked.float() for one in generations if one.asked is not None]
    return torch.stack(states) if states and len(states) == len(generations) else None


def tokens_of(generation: Generation, indices: Sequence[int]) -> Generation:
    """These tokens of a generation."""
    return replace(
        generation,
        tokens=tuple(generation.tokens[i] for i in indices),
        logprobs=tuple(generation.logprobs[i] for i in indices),
        entropies=tuple(generation.entropies[i] for i in indices) if generation.entropies else (),
        hidden=generation.hidden[[i - generation.hidden_start for i in indices]],
        hidden_start=0,
    )


def _parts(reply: Reply, grade: Grade, whole: Generation) -> tuple[AnswerPart, ...]:
    correct, begin = grade.parts or (None,) * len(reply.parts), reply.reading.start
    return tuple(
        AnswerPart(
            part.name,
            part.text,
            math.fsum(whole.logprobs[slice(*span)]),
            right,
            part.start - begin,
            part.stop - begin,
        )
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
    all_done: Callable[[bool], bool] = bool,
) -> list[list[str]]:
    """Texts of `samples` whole replies to each record, drawn at temperature 1; `all_done` as in `generate`."""
    generations = generate(
        model,
        [template.prompt_ids(record, shots) for record in records],
        **template.ending,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        samples=samples,
        seed=seed,
        device=device,
        keep=keep_none,
        all_done=all_done,
        share_prefix=all_done is bool,
        on_batch=on_batch,
    )
    return [[template.decode_answer(generation.tokens) for generation in row] for row in generations]
