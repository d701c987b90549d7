"""Where a reply of several lines says its final answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from calibtrain.config_tasks import FinalAnswerSection, Place
from calibtrain.errors import UserError
from calibtrain.records import Record
from calibtrain.tasks.matching import without_thinking
from calibtrain.tasks.pattern_process import last_group
from calibtrain.tasks.task import Reading, Task

Span = tuple[int, int]
Narrow = Callable[[str, Place], Span | None]
"""The answer's own characters within what a place holds; None where that is none, UNREADABLE where it says several."""
UNREADABLE: Span = (0, 0)
"""An answer stands here, and which it is cannot be told: no other place is looked at."""

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####[ \t]*")
_ANSWER_IS = re.compile(r"\banswer\b(?:\s+is\b|[ \t*]*[:=])[ \t*:]*", re.IGNORECASE)


TRIED = 3
"""Marks that are looked at, from the end: in a text of marks alone, looking at all would take its length squared."""


def final_answer(text: str, places: tuple[Place, ...], pattern: str | None, narrow: Narrow) -> Span | None:
    """Characters [start, stop) of the final answer, in the first of `places` that has one; None where none has.

    Of several boxes, marks or matches the last one counts that holds an answer.
    """
    found = _found(text, places, pattern, narrow)
    return None if found == UNREADABLE else found


def _found(text: str, places: tuple[Place, ...], pattern: str | None, narrow: Narrow) -> Span | None:
    for place in places:
        for start, stop in _held(text, place, pattern):
            if (inner := narrow(text[start:stop], place)) is not None:
                return UNREADABLE if inner == UNREADABLE else (start + inner[0], start + inner[1])
    return None


def _held(text: str, place: Place, pattern: str | None) -> list[Span]:
    """What a place holds, the last first."""
    if place == "boxed":
        return [span for span in (_braced(text, found.end()) for found in _last(_BOXED, text)) if span is not None]
    if place == "pattern":
        found = last_group(pattern or "", text)
        return [] if found is None else [found]
    if place == "last_number":
        return [(0, len(text))]
    marks = _last(_HASHES if place == "hashes" else _ANSWER_IS, text)
    return [(mark.end(), _line_end(text, mark.end())) for mark in marks]


def _last(mark: re.Pattern[str], text: str) -> list[re.Match[str]]:
    return [*mark.finditer(text)][: -TRIED - 1 : -1]


def _braced(text: str, start: int) -> Span | None:
    """From `start` to the brace that closes what was opened before it; None where none does."""
    depth, place = 1, start
    while place < len(text):
        c = text[place]
        if c == "\\":
            place += 2
            continue
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return start, place
        place += 1
    return None


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


class FinalAnswer(Task):
    """Base of the kinds that end a reasoning with their answer."""

    several_lines = True

    def __init__(self, config: FinalAnswerSection) -> None:
        self.config = config

    def narrow(self, text: str, place: Place) -> Span | None:
        """The answer's own characters in what a place holds, or None."""
        raise NotImplementedError

    def plain(self, text: str) -> str | None:
        """The answer that `text` is as a whole, or None."""
        raise NotImplementedError

    def refused(self, text: str) -> str | None:
        """Why an accepted text that `plain` does not know says no one answer; None where its last one counts."""
        return None

    def read(self, reply: str, record: Record) -> Reading:
        """The final answer and where it stands."""
        span = final_answer(reply, self.config.answer_in, self.config.pattern, self.narrow)
        if span is None:
            return Reading("", 0, 0, found=False)
        return Reading(reply[slice(*span)], *span, read_to=min(span[1] + 1, len(reply)))

    def asked(self, record: Record) -> Record:
        """The record with the final answers of its accepted ones, or of the reply to learn where it has none.

        Raises UserError that names the record where one holds no answer.
        """
        golds = record.accepted or (() if record.chosen is None else (record.chosen,))
        accepted = tuple(dict.fromkeys(self._gold(text, record) for text in golds))
        return record if accepted == record.accepted else replace(record, accepted=accepted)

    def _gold(self, text: str, record: Record) -> str:
        """The final answer of an accepted text: as written there, or as read from a solution, whose marks need not be those
        that replies are asked for.
        """
        text = without_thinking(text).strip()
        marked = tuple(place for place in (*self.config.answer_in, "boxed", "hashes") if place != "last_number")
        span = _found(text, marked, self.config.pattern, self.narrow)
        if span is not None and span != UNREADABLE:
            return text[slice(*span)]
        if span is None and (whole := self.plain(text)) is not None:
            return whole
        shown = text if len(text) < 60 else f"{text[:30]}...{text[-20:]}"
        told = f"{record.origin or record.question}: the accepted answer {shown!r}"
        if (why := self.refused(text)) is not None:
            raise UserError(f"{told} {why}")
        span = (
            None if span == UNREADABLE else final_answer(text, self.config.answer_in, self.config.pattern, self.narrow)
        )
        if span is None:
            places = ", ".join(self.config.answer_in)
            raise UserError(
                f"{told} holds no answer that task.answer_in ({places}) finds; mend the row, or name where its answer "
                "stands (task.answer_in, task.pattern)"
            )
        return text[slice(*span)]
