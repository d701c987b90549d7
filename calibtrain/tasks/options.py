"""What kinds whose reply is one of given options have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from calibtrain.records import Message, Record
from calibtrain.tasks.matching import normalize
from calibtrain.tasks.task import Reading, Task

_LETTER = re.compile(r"[*_]*[(\[]?([A-Za-z])(?:[)\].:,*_]|\s*$|\n)")
_SAID_LETTER = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*:?[\s*_]*[(\[]?([A-Za-z])(?:[)\].:,*_]|\s*$|\n)")


class OptionsTask(Task):
    """Base of the kinds whose reply is one of `choices`."""

    def __init__(self, answer_by: Literal["likelihood", "generation"], score: Literal["sum", "mean"]) -> None:
        self.by_likelihood = answer_by == "likelihood"
        self.option_score = score

    def options(self, record: Record) -> tuple[str, ...]:
        """The options, where they are scored."""
        return self.choices(record) if self.by_likelihood else ()

    def read(self, reply: str, record: Record) -> Reading:
        """The option that a reply is, whatever its case and punctuation."""
        found = said_option(reply, self.choices(record))
        return Reading(reply if found is None else found, 0, len(reply), found=found is not None)

    def right(self, text: str, record: Record) -> bool:
        """Whether it is an accepted option, as it stands: the record was asked."""
        return text in record.accepted

    def key(self, text: str, record: Record) -> str:
        """The option itself."""
        return text


def said_option(text: str, options: Sequence[str]) -> str | None:
    """The one option that a text is: as it stands, else but for case, accents and punctuation; None for none or several."""
    text = text.strip()
    if text in options:
        return text
    clean = normalize(text)
    found = [option for option in options if normalize(option) == clean] if clean else []
    return found[0] if len(found) == 1 else None


def said_letter(text: str, letters: Sequence[str]) -> tuple[str, int] | None:
    """The letter that a reply names last ("The answer is B"), else opens with ("B", "(b)", "**B**"), and where it stands."""
    named = [*_SAID_LETTER.finditer(text)]
    found = named[-1] if named else _LETTER.match(text)
    return None if found is None or found[1].upper() not in letters else (found[1].upper(), found.start(1))


def with_line(record: Record, line: str) -> Record:
    """The record with a line behind its question."""
    last = record.prompt[-1]
    return replace(record, prompt=(*record.prompt[:-1], Message(last.role, f"{last.content.rstrip()}\n{line}")))


def with_replies(record: Record, reply_of: Callable[[str], str]) -> Record:
    """The record with every answer that it names as the reply to learn or to avoid."""
    return replace(
        record,
        chosen=None if record.chosen is None else reply_of(record.chosen),
        rejected=None if record.rejected is None else reply_of(record.rejected),
        accepted=tuple(dict.fromkeys(map(reply_of, record.accepted))),
    )
