"""Answers that are one of given options, by place or class: what `evaluate` prints and the report shows of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calibtrain.calibration.calibrators import METHODS, Calibrator
from calibtrain.calibration.classes import ClassRow, PlaceBias, class_rows, place_bias
from calibtrain.confidence.answer import Answer
from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.records import Record
from calibtrain.tasks.task import Task


@dataclass(frozen=True, slots=True)
class OptionsPart:
    """Of graded answers: how often each place was chosen, or how each class fared."""

    names: tuple[str, ...]
    bias: PlaceBias | None = None  # where options are places
    rows: tuple[ClassRow, ...] = ()  # where they are classes, whose probabilities are known
    classwise_ece: float = math.nan  # mean over the classes
    unfound: int = 0  # answers that are none of the options


def option_matrices(answers: Sequence[Answer]) -> tuple[NDArray[np.float64] | None, NDArray[np.bool_] | None]:
    """Log-probs of the options and which are right, (N, C) each; None where answers have none, or not equally many."""
    counts = {len(answer.option_logprobs) for answer in answers}
    if len(counts) != 1 or 0 in counts:
        return None, None
    logprobs = np.array([answer.option_logprobs for answer in answers], dtype=np.float64)
    return logprobs, np.array([answer.right_options for answer in answers], dtype=bool)


def options_part(
    options_are: Literal["positions", "classes"] | None,
    answers: Sequence[Answer],
    calibrator: Calibrator | None = None,
) -> OptionsPart | None:
    """What there is to say of the graded answers; None where a task has no options in common.

    Questions with several right options do not count for the bias. calibrator: one of all options' probabilities, which
    then stand in for the model's; None comes of another.
    """
    graded = [one for one in answers if one.correct is not None and any(one.right_options)]
    if options_are is None or not graded:
        return None
    unfound = sum(one.choice is None for one in graded)
    if options_are == "positions":
        single = [one for one in graded if one.choice is not None and sum(one.right_options) == 1]
        names = tuple(map(_place, range(max(len(one.options) for one in graded))))
        given = np.array([one.choice for one in single], dtype=np.int64)
        right = np.array([one.right_options.index(True) for one in single], dtype=np.int64)
        return OptionsPart(names, place_bias(given, right, len(names)), unfound=unfound)
    names = graded[0].options
    logprobs, right_ones = option_matrices(graded)
    if logprobs is None or right_ones is None:
        return None
    probabilities = np.exp(logprobs) if calibrator is None else calibrator.option_probabilities(logprobs)
    if probabilities is None:
        return None
    given = np.array([one.choice for one in graded], dtype=np.int64)
    rows = tuple(class_rows(probabilities, right_ones, given))
    return OptionsPart(names, rows=rows, classwise_ece=float(np.mean([row.ece for row in rows])), unfound=unfound)


def check_options(config: RunConfig, task: Task, splits: Mapping[str, Sequence[Record]]) -> None:
    """UserError where the calibrator reads all options of a question, and questions have none or not equally many."""
    method = config.calibration.method
    if METHODS[method].options is None:
        return
    records = [record for split in ("temperature", "certification", "test") for record in splits[split]]
    counts = [len(task.options(record)) for record in records]
    other = next((place for place, count in enumerate(counts) if count != counts[0] or not count), None)
    if other is not None:
        place = records[other].origin or records[other].question
        found = f"{counts[other]} options where others have {counts[0]}" if counts[0] else "no options that are scored"
        raise UserError(
            f"calibration.method: {method} reads the log-probs of as many options for every question, with "
            f"task.answer_by: likelihood; {place}: {found}; take temperature"
        )


def _place(number: int) -> str:
    """A, B, ..., Z; beyond these the number of the place, from 1."""
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def print_options(part: OptionsPart | None) -> None:
    """The part as a table."""
    if part is None:
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if part.bias is not None:
        bias = part.bias
        table = Table(title="answers by place", title_justify="left", caption=f"no preference: p = {bias.p_value:.3g}")
        for column in ("", "answered", "right"):
            table.add_column(column, justify="right" if column else "left")
        for name, answered, right in zip(part.names, bias.answered, bias.right, strict=True):
            table.add_row(name, f"{answered / max(bias.n, 1):.1%}", f"{right / max(bias.n, 1):.1%}")
    else:
        table = Table(title="by class", title_justify="left", caption=f"classwise ECE: {part.classwise_ece:.3f}")
        for column in ("", "n", "answered", "accuracy", "mean probability", "share", "ECE"):
            table.add_column(column, justify="right" if column else "left")
        for name, row in zip(part.names, part.rows, strict=True):
            cells = (f"{value:.3f}" for value in (row.accuracy, row.confidence, row.share, row.ece))
            table.add_row(_escaped(name), str(row.n), str(row.answered), *cells)
    console.print(table)
    if part.unfound:
        console.print(f"{part.unfound} answers are none of the options")


def _escaped(text: str) -> str:
    """A user's text without what the console would read as markup."""
    from rich.markup import escape

    return escape(text)
