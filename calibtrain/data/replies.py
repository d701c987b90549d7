"""Where in a reply's tokens the answer stands, as its task reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from calibtrain.records import Record
from calibtrain.tasks.task import Reading

if TYPE_CHECKING:
    from calibtrain.data.templates import Template

Span = tuple[int, int]
"""Tokens [start, stop) of a reply, never empty."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply that was read: its text without thinking, the answer in it, and the tokens of the answer and its parts.

    `read` are those of the answer's tokens that its likelihood reads: all of `span`, or the task's `Reading.spans` of it.
    """

    text: str
    reading: Reading
    span: Span
    parts: tuple[Span, ...] = ()
    some: tuple[int, ...] = ()  # where not all of `span` is read

    @property
    def read(self) -> tuple[int, ...]:
        """Indices of the tokens that the answer's likelihood reads, ascending."""
        return self.some or tuple(range(*self.span))


def read_reply(template: Template, ids: Sequence[int], record: Record) -> Reply:
    """Read generated ids (with their end token, where it came) as an answer to `record`.

    An answer that reaches the reply's end has the end token in its span, so that "Guinea" is not credited with the
    probability of "Guinea-Bissau". A reply that is all thinking stays whole, and its text is empty.
    """
    text = template.decode_answer(ids)
    reading = template.task.read(text, record)
    begin = template.answer_start(ids) or 0
    begin = begin if begin < len(ids) else 0
    if (reading.start, reading.stop) == (0, len(text)) and not (reading.parts or reading.spans):
        return Reply(text, reading, (begin, len(ids)))
    pieces = template.token_texts(ids[begin:])
    offset = max(0, "".join(pieces).find(text))
    ends = list(accumulate(map(len, pieces)))

    def tokens(start: int, stop: int, read_to: int = 0) -> Span:
        """Tokens that hold any of the text's characters [start, stop), and what of them ends it."""
        if start == stop:  # nothing was found: the reply as a whole says it
            return begin, len(ids)
        first = next(i for i, end in enumerate(ends) if end > start + offset)
        last = next(i for i, end in enumerate(ends) if end >= max(stop, read_to) + offset)
        return begin + first, len(ids) if stop == len(text) else begin + last + 1

    return Reply(
        text,
        reading,
        tokens(reading.start, reading.stop, reading.read_to),
        tuple(tokens(one.start, one.stop, one.read_to) for one in reading.parts),
        tuple(sorted({i for start, stop in reading.spans for i in range(*tokens(start, stop))})),
    )
