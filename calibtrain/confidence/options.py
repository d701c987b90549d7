"""Answers by likelihood over given options: every option's reply is scored, and the likeliest is the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibtrain.confidence.answer import Answer
from calibtrain.confidence.answered import (
    Answered,
    OptionFeatures,
    among,
    features_of_generations,
    token_logprob_table,
)
from calibtrain.confidence.generation import AllDone, Generation, _Batch, _read_prefix
from calibtrain.config import EvaluationConfig
from calibtrain.data.templates import Template
from calibtrain.models.loss_model import AnswerFeatures, StatesStep
from calibtrain.records import Record


@dataclass(frozen=True, slots=True)
class _Question:
    """A prompt and the token ids that each option's score is made of."""

    prompt: list[int]
    options: list[list[int]]


def answer_options(
    model: Callable[..., Any],
    template: Template,
    records: Sequence[Record],
    settings: EvaluationConfig,
    *,
    shots: Sequence[Record] = (),
    device: torch.device | str = "cpu",
    all_done: AllDone = bool,
    share_prefix: bool = True,
    on_batch: Callable[[int], None] = lambda questions_done: None,
) -> Answered:
    """The likeliest of the task's options for each record, graded; a tie goes to the first.

    An option's score is the sum (or the mean) of its tokens' log-probs with the end token's, which a letter does without;
    `option_logprobs` are the log-softmax of the scores. The tokens are those that training teaches. Parameters as in
    `answer_questions`.
    """
    task = template.task
    names = [task.options(record) for record in records]
    questions = [
        _Question(
            template.prompt_ids(record, shots),
            [ids if task.option_ends else ids[:-1] for ids in map(template.completion_ids, options)],
        )
        for record, options in zip(records, names, strict=True)
    ]
    scored = option_generations(
        model,
        questions,
        pad_id=template.pad_id,
        batch_size=settings.batch_size,
        device=device,
        all_done=all_done,
        share_prefix=share_prefix,
        on_batch=on_batch,
    )
    flat = [one for options in scored for one in options]
    owner = torch.repeat_interleave(torch.arange(len(scored)), torch.tensor([len(one) for one in scored]))
    lengths = [len(one.tokens) if task.option_score == "mean" else 1 for one in flat]
    sums = [math.fsum(one.logprobs) / length for one, length in zip(flat, lengths, strict=True)]
    shares = among(torch.tensor(sums, dtype=torch.float64)[:, None], owner)[:, 0].split([len(one) for one in scored])
    best = [one.tolist().index(float(one.max())) for one in shares]
    readings = [task.read(options[place], record) for options, place, record in zip(names, best, records, strict=True)]
    grades = task.grades(readings, records)
    chosen = [options[place] for options, place in zip(scored, best, strict=True)]
    answers = [
        Answer(
            question_id=record.id,
            question=record.question,
            text=reading.text,
            token_logprobs=one.logprobs,
            correct=grade.correct,
            accepted=record.accepted,
            strata=record.strata,
            tokens=template.token_texts(one.tokens),
            asked=record.key,
            key=task.key(reading.text, record),
            reply="" if reading.text == options[place] else options[place],
            options=options,
            option_logprobs=tuple(share.tolist()),
        )
        for record, reading, grade, one, options, place, share in zip(
            records, readings, grades, chosen, names, best, shares, strict=True
        )
    ]
    every = OptionFeatures(features_of_generations(flat, [None] * len(flat)), owner, mean=task.option_score == "mean")
    # A prompt's last state predicts the first token of each of its options.
    asked = torch.stack([options[0].hidden[0].float() for options in scored]) if scored else None
    return Answered(answers, features_of_generations(chosen, [one.correct for one in answers]), every, asked)


@torch.no_grad()
def option_generations(
    model: Callable[..., Any],
    questions: Sequence[_Question],
    *,
    pad_id: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    all_done: AllDone = bool,
    share_prefix: bool = True,
    on_batch: Callable[[int], None] = lambda questions_done: None,
) -> list[list[Generation]]:
    """Every option of every question as if it had been generated: its tokens, their log-probs and hidden states.

    What the prompts begin with in common passes through the model once unless `share_prefix` is off, a prompt once for all
    its options, and options of one token need no pass of their own. `batch_size` options are in one forward pass, where
    a question has not more. `all_done`: ranks that must take as many steps each go on together.
    """
    prefix, cache = _read_prefix(model, [one.prompt for one in questions], share_prefix, device)
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].prompt))
    size = max(1, batch_size // max((len(one.options) for one in questions), default=1))
    found: list[list[Generation]] = [[] for _ in questions]
    start = 0
    while questions:
        rows = order[start : start + size] or order[-1:]  # once more, where others are not done
        batch = [questions[index] for index in rows]
        states = _states(model, batch, len(prefix), cache, pad_id, device, all_done)
        targets = torch.tensor([token for one in batch for ids in one.options for token in ids])
        unknown = AnswerFeatures(states, targets, targets, torch.zeros(0))
        logprobs = token_logprob_table(model, unknown, (1.0,), device)[:, 0].tolist()
        place = 0
        for index, one in zip(rows, batch, strict=True):
            found[index] = []
            for ids in one.options:
                part = slice(place, place + len(ids))
                found[index].append(Generation(tuple(ids), tuple(logprobs[part]), states[part], True))
                place = part.stop
        start += size
        on_batch(min(start, len(order)))
        if all_done(start >= len(order)):
            break
    return found


def _states(
    model: Callable[..., Any],
    batch: Sequence[_Question],
    prefix_length: int,
    cache: Any,
    pad_id: int,
    device: torch.device | str,
    all_done: AllDone,
) -> Tensor:
    """Hidden states that predict the options' tokens, those of one option together. (tokens, H), on CPU."""
    stems = _Batch(len(batch), prefix_length, cache, device)
    stems.extend([one.prompt[prefix_length:] for one in batch], pad_id)
    first, stems.cache = model(StatesStep(stems.inputs()))
    first = first[:, 0].cpu()
    longest = max(len(ids) for one in batch for ids in one.options)
    if all_done(longest == 1):
        rest = first.new_zeros(0, 0, first.shape[1])
        copies = 0
    else:
        copies = max(len(one.options) for one in batch)
        # A row for each option; those that a question has not read its first one again, and nobody reads them.
        texts = [(one.options + one.options[:1] * copies)[place] for one in batch for place in range(copies)]
        stems.repeat(copies)
        stems.extend([ids[:-1] or ids for ids in texts], pad_id)
        rest = model(StatesStep(stems.inputs(), max(1, longest - 1)))[0].cpu()
    found = []
    for row, one in enumerate(batch):
        for place, ids in enumerate(one.options):
            found.append(first[row : row + 1])
            if len(ids) > 1:
                found.append(rest[row * copies + place, 1 - len(ids) :])
    return torch.cat(found)
