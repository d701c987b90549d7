"""A number at the end of a reasoning; right is what is equal to an accepted one as a number, within a tolerance."""

from __future__ import annotations

from fractions import Fraction

from calibtrain.config_tasks import NumberTask, Place
from calibtrain.records import Record
from calibtrain.tasks.final_answer import UNREADABLE, FinalAnswer, Span, final_answer
from calibtrain.tasks.matching import normalize
from calibtrain.tasks.numerals import number_of, numbers_in, unclear, value_of

LONGEST_ANSWER = 120
"""Characters of a line that is an answer; a longer one is a solution, of which the last number counts."""


class Number(FinalAnswer):
    """Right is the same number, exactly or within `rel` and `abs`: 1,000 is 1e3, $1000.00 and 1000 apples."""

    def __init__(self, config: NumberTask | None = None) -> None:
        super().__init__(config or NumberTask())
        section = config or NumberTask()
        self._hundredth = section.percent == "hundredth"
        self._comma = section.decimal == "comma"
        self._rel, self._abs = Fraction(str(section.rel)), Fraction(str(section.abs))

    def narrow(self, text: str, place: Place) -> Span | None:
        """The first number behind the last "=", where a whole reply is read the last one; empty where it is unclear."""
        skipped = text.rfind("=") + 1 if place in ("boxed", "hashes", "answer_is") else 0
        spans = [*numbers_in(text[skipped:], self._comma)]
        for start, stop in reversed(spans) if place == "last_number" else spans:
            written = text[skipped + start : skipped + stop]
            if value_of(written, comma=self._comma) is not None:
                return skipped + start, skipped + stop
            if unclear(written, self._comma):
                return UNREADABLE
        return None

    def plain(self, text: str) -> str | None:
        """The number, where the text holds one alone."""
        if number_of(text, comma=self._comma) is None:
            return None
        ((start, stop),) = numbers_in(text, self._comma)
        return text[start:stop]

    def refused(self, text: str) -> str | None:
        """Why a text says no one number, though it holds some: "3,5" under another decimal mark, "12:30", "(1, 2)"."""
        written = [text[slice(*span)] for span in numbers_in(text, self._comma)]
        if written and unclear(written[-1], self._comma):
            own, other = ("comma", "point") if self._comma else ("point", "comma")
            return (
                f"writes {written[-1]!r}, which under task.decimal: {own} is no one number; write it with a {own}, set "
                f"task.decimal: {other}, or choose another task.kind"
            )
        short = "\n" not in text and "=" not in text and len(text) <= LONGEST_ANSWER
        if short and len(written) > 1:
            return (
                f"holds several numbers ({', '.join(written[:4])}); write the one that counts, mark it "
                f"(#### {written[-1]}), or choose another task.kind (short_answer, math)"
            )
        return None

    def right(self, text: str, record: Record) -> bool:
        """Whether `text` is one of the accepted numbers."""
        value = self._value(text)
        return value is not None and any(self._near(value, self._value(one)) for one in record.accepted)

    def key(self, text: str, record: Record) -> str:
        """The number as a fraction in lowest terms."""
        value = self._value(text)
        return normalize(text) if value is None else str(value)

    def _value(self, text: str) -> Fraction | None:
        value = number_of(text, self._hundredth, self._comma)
        if value is not None:
            return value
        span = final_answer(text, self.config.answer_in, self.config.pattern, self.narrow)
        return None if span is None else value_of(text[slice(*span)], self._hundredth, self._comma)

    def _near(self, value: Fraction, gold: Fraction | None) -> bool:
        return gold is not None and abs(value - gold) <= max(self._rel * abs(gold), self._abs)
