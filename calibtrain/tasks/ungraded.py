"""Answers whose grade could not be had: they lose nothing, for they are told only once everything is written."""

from __future__ import annotations

import logging

from calibtrain.errors import UserError
from calibtrain.records import Record

logger = logging.getLogger(__name__)
SHOWN = 60


class Ungraded:
    """Counts answers without a grade since the last `settle`, and keeps the first reason. Its text is one line."""

    def __init__(self, what: str) -> None:
        self.what = what  # "task.grader graders:is_right"
        self.asked = self.missing = 0
        self.reason = ""

    def add(self, reason: str, record: Record | None = None) -> None:
        """One answer has no grade; `record`: its question."""
        if not self.missing:
            self.reason = reason if record is None else f"{reason}, at {place(record)}"
            logger.warning("%s: %s; this answer has no grade", self.what, self.reason)
        self.missing += 1

    def handed(self) -> tuple[int, int, str]:
        """What `settle` would tell of, which is another process's to tell now; counts anew."""
        found = self.asked, self.missing, self.reason
        self.asked = self.missing = 0
        return found

    def take(self, handed: tuple[int, int, str]) -> None:
        """Add what another process `handed`."""
        asked, missing, reason = handed
        self.reason = self.reason if self.missing else reason
        self.asked += asked
        self.missing += missing

    def settle(self) -> None:
        """Raise UserError where answers lack a grade, and count anew."""
        asked, missing, reason = self.handed()
        if missing:
            raise UserError(f"{self.what}: {missing} of {max(asked, missing)} answers have no grade: {reason}")


def place(record: Record) -> str:
    """A question for a message: where it stands, and how it begins."""
    question = one_line(record.question, SHOWN)
    return f"{record.origin} ({question!r})" if record.origin else repr(question)


def one_line(text: str, length: int) -> str:
    """Other people's text in one short line, with nothing that a terminal would obey."""
    words = " ".join("".join(one if one.isprintable() else " " for one in text[: 4 * length]).split())
    return words if len(words) <= length else words[: length - 1] + "…"
