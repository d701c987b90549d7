"""Answers of a model that was taught to refuse: where it does, it is made to answer all the same.

Only so is over-refusal seen: what it refused although it would have been right. A refusal is graded as no answer, never as
a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibtrain.abstention.policy import SelectiveStatistics, selective_statistics
from calibtrain.calibration.intervals import wilson
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.answered import Answered
from calibtrain.confidence.likelihood import answer_questions
from calibtrain.config import EvaluationConfig
from calibtrain.data.refusal import REFUSALS
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.records import Record
from calibtrain.tasks.matching import normalize

IDK = "[IDK]"
_REFUSALS = frozenset(map(normalize, REFUSALS))


@dataclass(frozen=True, slots=True)
class Forced:
    """Answers as given, which of them are refusals, and the answers (N,) that refusing was forbidden for."""

    given: Answered
    refused: NDArray[np.bool_]
    forced: list[Answer]  # where nothing was refused, the answer given

    @property
    def statistics(self) -> SelectiveStatistics:
        """Refusals, hallucinations, over-refusals."""
        correct = [bool(answer.correct) for answer in self.forced]
        return selective_statistics((~self.refused).astype(np.float64), correct, 0.5)

    @property
    def over_refusal(self) -> tuple[int, int, float, float]:
        """How many it refused of those it would have had right, how many those are, and the share's 95% interval."""
        right = np.array([bool(answer.correct) for answer in self.forced], dtype=bool)
        refused = int((self.refused & right).sum())
        return refused, int(right.sum()), *wilson(refused, int(right.sum()))


def is_refusal(text: str) -> bool:
    """Whether an answer's whole text is one of REFUSALS, whatever its case and punctuation."""
    return normalize(text) in _REFUSALS


def forced_answers(
    model: Callable[..., Any],
    template: Template,
    records: Sequence[Record],
    settings: EvaluationConfig,
    *,
    shots: Sequence[Record] = (),
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda questions_done: None,
) -> Forced:
    """Greedy answers; those that are REFUSALS, or say [IDK], are made again without the ways to begin a refusal.

    No answer is forbidden but one that begins with the same token as a refusal ("I", "My"). Its likelihood stays the
    model's own, under which the refusal was likelier. Raises UserError where answers are chosen among options.
    """
    if any(template.task.options(record) for record in records):
        raise UserError(
            "answers chosen among options by their likelihood are never refusals: set task.answer_by: generation"
        )
    given = answer_questions(model, template, records, settings, shots=shots, device=device, on_batch=on_batch)
    idk = template.tokenizer.get_vocab().get(IDK)
    refused = np.array([is_refusal(answer.said) or (idk is not None and not answer.said) for answer in given.answers])
    again = np.flatnonzero(refused)
    if not len(again):
        return Forced(given, refused, given.answers)
    banned = {template.completion_ids(text)[0] for text in REFUSALS} | ({idk} if idk is not None else set())
    made = answer_questions(
        model,
        template,
        [records[row] for row in again.tolist()],
        settings,
        shots=shots,
        device=device,
        not_first=tuple(sorted(banned)),
    )
    answers = list(given.answers)
    for row, answer in zip(again.tolist(), made.answers, strict=True):
        answers[row] = answer
    return Forced(given, refused, answers)
