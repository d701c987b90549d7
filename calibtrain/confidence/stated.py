"""Confidence that a reply states at its end, in words that a parser finds: "Paris (confidence: 80%)".

Whatever stands before it is no part of it: a block of thinking, a reasoning over several lines, the answer. A task whose
answers are one line ends a reply at its first line break, so that there the statement stands on the answer's own line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibtrain.data.replies import Span, read_reply
from calibtrain.records import Record
from calibtrain.tasks.task import Reading

if TYPE_CHECKING:
    from calibtrain.data.templates import Template

# Bounded where it could match the same text in several ways: replies are untrusted, and may be long.
_STATEMENT = re.compile(
    r"\bconfidence[\s*>:=]{0,8}(?P<number>\d{1,3}(?:\.\d+)?|\.\d+)\s?(?P<percent>%?)[\s.)\]*]*(?:</confidence>\s*)?$",
    re.IGNORECASE,
)
_BEFORE = " \t\r\n\f\v,;.:([-*<"
"""What may lead from an answer to its statement."""


@dataclass(frozen=True, slots=True)
class Statement:
    """An answer without its statement, the stated probability (None without one), and where the statement begins."""

    answer: str
    confidence: float | None
    start: int  # characters


@dataclass(frozen=True, slots=True)
class StatedReply:
    """A generated reply with what it states: the answer as its task reads it, and which tokens say what."""

    text: str  # without thinking and statement
    reading: Reading
    span: Span  # tokens of the answer
    confidence: float | None
    stated: tuple[bool, ...]  # of each token, whether it belongs to the statement


def read_statement(text: str) -> Statement:
    """Split "answer (confidence: 80%)", as a percentage or a number up to 1. A number outside its range is no statement.

    A whole number from 2 to 100 without a sign is a percentage; 1 is certainty. Also read are a line of its own,
    "**Confidence:** 80%" and "<confidence>0.8</confidence>".
    """
    found = _STATEMENT.search(text)
    if found is None:
        return Statement(text.strip(), None, len(text))
    number = float(found["number"])
    value = number / 100.0 if found["percent"] or number > 1.0 else number
    if value > 1.0 or (not found["percent"] and number > 1.0 and number != int(number)):
        return Statement(text.strip(), None, len(text))
    before = text[: found.start()].rstrip(_BEFORE)
    return Statement(before.strip(), value, len(before))


def read_stated_reply(
    template: Template, tokens: Sequence[int], record: Record, *, finished: bool = True
) -> StatedReply:
    """Read generated ids as an answer to `record` with its statement: the answer is looked for before that alone.

    A reply that is not `finished`, cut at the most tokens, states nothing: of 80% the 8 may be all that was said.
    """
    statement = read_statement(template.decode_answer(tokens))
    confidence = statement.confidence if finished else None
    stated = statement_tokens(tokens, template.decode_answer)
    said = stated.index(True) if confidence is not None else len(tokens)
    reply = read_reply(template, tokens[:said] or tokens, record)
    if confidence is None:
        return StatedReply(reply.text, reply.reading, reply.span, None, stated)
    return StatedReply(statement.answer, template.task.read(statement.answer, record), reply.span, confidence, stated)


def statement_tokens(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[bool, ...]:
    """Which of a reply's tokens belong to its statement: from the first that has none of the answer to the end.

    The last token always does: where there is no statement, it is what ended the answer without one.
    """
    if not tokens:
        return ()
    last = len(tokens) - 1
    start, first = read_statement(decode(tokens)).start, last
    while first and len(decode(tokens[:first])) > start:  # from the end: a statement is short, a reply need not be
        first -= 1
    if first < last and len(decode(tokens[:first])) < start <= len(decode(tokens[: first + 1])):
        first += 1  # a token that ends the answer and begins the statement is the answer's
    return tuple(index >= first for index in range(len(tokens)))
