"""Answers found and graded by functions of the user's.

A function that raises, or returns what is no grade, costs no answer: the grade is None, the answers are written, and then
`settle` raises one line that names the function and the first question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from calibtrain.config_tasks import CustomTask
from calibtrain.records import Record
from calibtrain.tasks.imported import described, load_function, source_of
from calibtrain.tasks.task import Grade, Reading, Task
from calibtrain.tasks.ungraded import Ungraded, one_line

SHOWN = 60


class Custom(Task):
    """Right is what `grader` says of the answer that `extractor` finds."""

    objects = True

    def __init__(self, config: CustomTask) -> None:
        self.config = config
        self.several_lines = config.lines == "many"
        self.grader = load_function(config.grader, "task.grader")
        self.extractor = config.extractor and load_function(config.extractor, "task.extractor")
        self.ungraded = Ungraded(f"task.grader {config.grader}")
        self.unread = Ungraded(f"task.extractor {config.extractor}")

    def code(self) -> list[str]:
        """Of the files of the functions: another grader in the same place is another one."""
        return [*map(source_of, (self.grader, self.extractor or None))]

    def gradable(self, record: Record) -> bool:
        """Whether the grader has what the config says that it needs."""
        return bool(record.accepted) or not self.config.needs_answers

    def read(self, reply: str, record: Record) -> Reading:
        """What the extractor finds. Text is where it stands last; what the reply does not hold as it is, is all of it."""
        if not self.extractor:
            return super().read(reply, record)
        self.unread.asked += 1
        try:
            return _reading(self.extractor(reply), reply)
        except _NoAnswer as error:
            self.unread.add(str(error), record)
        except Exception as error:  # whatever a function of the user's does
            self.unread.add(_raised(error), record)
        return Reading("", 0, 0, found=False, known=False)

    def grades(self, readings: Sequence[Reading], records: Sequence[Record]) -> list[Grade]:
        """The grader's, one after the other; None where it fails."""
        return [Grade(self._grade(one, record)) for one, record in zip(readings, records, strict=True)]

    def settle(self) -> None:
        """Raise UserError where a function of the user's failed."""
        self.unread.settle()
        self.ungraded.settle()

    def handed(self) -> tuple[tuple[int, int, str], tuple[int, int, str]]:
        """Of the extractor and of the grader."""
        return self.unread.handed(), self.ungraded.handed()

    def take(self, handed: tuple[tuple[int, int, str], tuple[int, int, str]]) -> None:
        """Add another process's."""
        self.unread.take(handed[0])
        self.ungraded.take(handed[1])

    def _grade(self, reading: Reading, record: Record) -> bool | None:
        if not self.gradable(record):
            return None
        if not reading.known:
            return None
        if not reading.found:
            return False
        self.ungraded.asked += 1
        try:
            value = self.grader(reading.text, described(record))
        except Exception as error:  # whatever a function of the user's does
            self.ungraded.add(_raised(error), record)
            return None
        if value is None or isinstance(value, bool | np.bool_):
            return None if value is None else bool(value)
        self.ungraded.add(f"it returns {_said(value)}, which is none of True, False and None", record)
        return None


class _NoAnswer(ValueError):
    """What an extractor returned is no answer."""


def _reading(found: Any, reply: str) -> Reading:
    if found is None:
        return Reading("", 0, 0, found=False)
    if isinstance(found, str):
        text = found.strip()
        start = reply.rfind(text)  # what was said last counts; an extractor that knows better returns the span
        whole = start < 0  # written otherwise than the reply has it
        stop = len(reply) if whole else start + len(text)
        return Reading(text, 0 if whole else start, stop, found=bool(text), read_to=min(stop + 1, len(reply)))
    if not (isinstance(found, tuple | list) and len(found) == 2 and all(_is_index(one) for one in found)):
        raise _NoAnswer(f"it returns {_said(found)}, which is no text, (start, stop) or None")
    start, stop = (int(one) for one in found)
    if not 0 <= start <= stop <= len(reply):
        raise _NoAnswer(f"it returns ({start}, {stop}), which is no span of the reply's {len(reply)} characters")
    return Reading(reply[start:stop], start, stop, found=stop > start, read_to=min(stop + 1, len(reply)))


def _is_index(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _said(value: Any) -> str:
    return f"{type(value).__name__} {one_line(repr(value), SHOWN)}"


def _raised(error: Exception) -> str:
    return f"it raises {type(error).__name__} ({one_line(str(error), SHOWN)})"
