"""Confidence that an answer states itself, in words that a parser finds: "Paris (confidence: 80%)"."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_STATEMENT = re.compile(
    r"[\s,;.:(\[-]*\bconfidence\s*[:=]?\s*(?P<number>\d{1,3}(?:\.\d+)?|\.\d+)\s*(?P<percent>%?)[\s.)\]]*$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Statement:
    """An answer without its statement, the stated probability (None without one), and where the statement begins."""

    answer: str
    confidence: float | None
    start: int  # characters


def read_statement(text: str) -> Statement:
    """Split "answer (confidence: 80%)", as a percentage or a number up to 1. A number outside its range is no statement.

    A whole number from 2 to 100 without a sign is a percentage; 1 is certainty.
    """
    found = _STATEMENT.search(text)
    if found is None:
        return Statement(text.strip(), None, len(text))
    number = float(found["number"])
    value = number / 100.0 if found["percent"] or number > 1.0 else number
    if value > 1.0 or (not found["percent"] and number > 1.0 and number != int(number)):
        return Statement(text.strip(), None, len(text))
    return Statement(text[: found.start()].strip(), value, found.start())


def statement_tokens(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[bool, ...]:
    """Which of an answer's tokens belong to its statement: from the first that reaches it to the end.

    The last token always does: where there is no statement, it is what ended the answer without one.
    """
    if not tokens:
        return ()
    start, first = read_statement(decode(tokens)).start, len(tokens) - 1
    while first and len(decode(tokens[:first])) > start:  # from the end: a statement is short, a reply need not be
        first -= 1
    return tuple(index >= first for index in range(len(tokens)))
