"""Multiple choice: the reply is the letter or the text of one of the options that a question brings."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace

from calibtrain.config_tasks import ChoiceTask
from calibtrain.errors import UserError
from calibtrain.records import Record, unit_hash
from calibtrain.tasks.options import OptionsTask, said_letter, said_option, with_line, with_replies
from calibtrain.tasks.task import Reading

LETTERS = string.ascii_uppercase
ASKED = "calibtrain: options asked"
"""Key in `fields` of a record that was asked already."""


class Choice(OptionsTask):
    """The options stand in the record's order, or in one drawn for the question; the right one is known by any name.

    A question lists its options where the reply is a letter, and where the reply is written freely, which could not know
    them else; scored texts stand behind the bare question, as lm-evaluation-harness has them.
    """

    options_are = "positions"

    def __init__(self, config: ChoiceTask | None = None) -> None:
        self.config = config or ChoiceTask()
        super().__init__(self.config.answer_by, self.config.score)
        self.letters = self.config.show == "letters"
        self.option_ends = not self.letters
        order = "by question" if self.config.shuffle else "as given"
        self.mark = (self.config.kind, self.config.show, self.config.answer_by, order)
        self.mark += () if self.letters else (self.option_score,)

    def asked(self, record: Record) -> Record:
        """With the options in order, listed where they are, and the right one as the reply that names it."""
        if ASKED in record.fields:
            return record
        given = _checked(record, self.config)
        options = self._ordered(record, given)
        if not self.letters and not self.by_likelihood:
            listing = [f"- {one}" for one in options]
        else:
            listing = (
                [f"{letter}. {one}" for letter, one in zip(LETTERS, options, strict=False)] if self.letters else []
            )

        def reply_of(said: str) -> str:
            text = given[self._place(said, given, record)]
            return LETTERS[options.index(text)] if self.letters else text

        found = replace(with_replies(record, reply_of), options=options, fields={**record.fields, ASKED: True})
        return with_line(found, "\n".join(listing)) if listing else found

    def choices(self, record: Record) -> tuple[str, ...]:
        """Letters, or texts."""
        return tuple(LETTERS[: len(record.options)]) if self.letters else record.options

    def read(self, reply: str, record: Record) -> Reading:
        """The letter that a reply names, or that of the option that it says."""
        if not self.letters:
            return super().read(reply, record)
        named = said_letter(reply, self.choices(record))
        said = said_option(reply, record.options)
        if said is not None and (named is None or len(reply.strip()) > 1):
            return Reading(LETTERS[record.options.index(said)], 0, len(reply))
        if named is None:
            return Reading(reply, 0, len(reply), found=False)
        letter, start = named
        whole = reply == letter
        return Reading(letter, start, len(reply) if whole else start + 1)

    def says(self, text: str, record: Record) -> str:
        """The option that a letter stands for: in the order that they were given it may have another."""
        letters = self.choices(record)
        return record.options[letters.index(text)] if text in letters else text

    def _ordered(self, record: Record, options: tuple[str, ...]) -> tuple[str, ...]:
        if not self.config.shuffle:
            return options
        # By the text, so that neither the order nor the place of the right one in the data shows.
        return tuple(sorted(options, key=lambda one: (unit_hash("order of options", record.id, one), one)))

    def _place(self, said: str, options: Sequence[str], record: Record) -> int:
        """Place of the option that the data names. UserError for none, and for two."""
        how, said = self.config.answers_are, said.strip()
        by_letter = LETTERS.find(said.rstrip(".)").lstrip("(").upper()) if len(said.strip("().")) == 1 else -1
        by_letter = by_letter if by_letter < len(options) else -1
        if how.startswith("index"):
            place = int(said) - int(how[-1]) if said.isdecimal() and said.isascii() else by_letter
            if 0 <= place < len(options):
                return place
            raise UserError(
                f"{_where(record)}: the answer {said!r} is the place of none of {len(options)} options, counted from "
                f"{how[-1]} (task.answers_are: {how})"
            )
        text = said_option(said, options) if how != "letter" else None
        by_text = -1 if text is None else options.index(text)
        by_letter = by_letter if how != "text" else -1
        if min(by_text, by_letter) >= 0 and by_text != by_letter:
            raise UserError(
                f"{_where(record)}: the answer {said!r} is the text of one option and the letter of another; set "
                "task.answers_are to text or to letter"
            )
        if max(by_text, by_letter) < 0:
            hint = " (a place? set task.answers_are to index_from_0 or index_from_1)" if said.isdecimal() else ""
            raise UserError(f"{_where(record)}: the answer {said!r} is none of the options {list(options)}{hint}")
        return max(by_text, by_letter)


def _checked(record: Record, config: ChoiceTask) -> tuple[str, ...]:
    """The options, which are at least two, apart, and no more than there are letters."""
    options = tuple(one.strip() for one in record.options)
    if not options:
        raise UserError(
            f"{_where(record)}: a choice without options; give them with the question (--option), or name their columns: "
            "data.source.columns: {options: ...}"
        )
    if len(options) < 2:
        raise UserError(f"{_where(record)}: {options[0]!r} is the only option; give at least two to choose from")
    twice = [one for place, one in enumerate(options) if one in options[:place] or not one]
    if twice:
        raise UserError(
            f"{_where(record)}: the option {twice[0]!r} is given twice, or empty; each must be another text"
        )
    if config.show == "texts" and config.answer_by == "generation" and any("\n" in one for one in options):
        raise UserError(
            f"{_where(record)}: an option has several lines, which no reply on one line is: task.show: letters"
        )
    if config.show == "letters" and len(options) > len(LETTERS):
        raise UserError(f"{_where(record)}: {len(options)} options and {len(LETTERS)} letters; set task.show: texts")
    return options


def _where(record: Record) -> str:
    return record.origin or record.question
