"""A mathematical expression at the end of a reasoning; right is what math-verify finds equal to an accepted one."""

from __future__ import annotations

import re
from importlib.util import find_spec

from calibtrain.config_tasks import MathTask, Place
from calibtrain.errors import UserError
from calibtrain.records import Record
from calibtrain.tasks.final_answer import FinalAnswer, Span
from calibtrain.tasks.math_process import LONGEST, equal
from calibtrain.tasks.numerals import numbers_in, value_of

WORDS_OF_A_SENTENCE = 4
"""So many words make a text a sentence about an answer, not an answer."""

_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{3,}")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[,;:! ]|\\q?quad\b|\\left\b|\\right\b|[\s$~]+")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


class Math(FinalAnswer):
    """Right is what is equal by math-verify; what takes it above `seconds` is not."""

    def __init__(self, config: MathTask | None = None) -> None:
        section = config or MathTask()
        super().__init__(section)
        self.seconds = section.seconds
        if find_spec("math_verify") is None:
            raise UserError("task.kind: math needs math-verify; install it with `pip install calibtrain[tasks]`")

    def narrow(self, text: str, place: Place) -> Span | None:
        """All of a box or a group; behind a mark the rest of the sentence, or its formula between dollars."""
        if place == "last_number":
            return max(numbers_in(text), default=None)
        start, stop = 0, len(text)
        if place in ("hashes", "answer_is"):
            if formula := re.match(r"\s*(\$\$?|\\\(|\\\[)(.+?)(?:\$|\\\)|\\\])", text):
                start, stop = formula.span(2)
            elif end := _SENTENCE_END.search(text):
                stop = end.start()
        inner = text[start:stop]
        start += len(inner) - len(inner.lstrip(" \t\n*"))
        stop = start + len(inner.strip(" \t\n*"))
        return (start, stop) if start < stop else None

    def plain(self, text: str) -> str | None:
        """The text without the dollars around it, unless it is a sentence."""
        bare = text.strip().strip("$").strip()
        words = len(_WORD.findall(_TEXT.sub("", bare)))
        return bare if bare and "\n" not in bare and len(bare) <= LONGEST and words < WORDS_OF_A_SENTENCE else None

    def right(self, text: str, record: Record) -> bool:
        """Whether `text` is equal to one of the accepted expressions."""
        key = self.key(text, record)
        same = any(key == self.key(one, record) for one in record.accepted)
        return same or any(equal(one, text, self.seconds) for one in record.accepted)

    def key(self, text: str, record: Record) -> str:
        """A number as a fraction; an expression without spaces, sizes of brackets and text{}. Cheap: it does no algebra."""
        bare = text.strip().strip("$").rstrip(".").strip()
        if [*numbers_in(bare)] == [(0, len(bare))] and not bare.endswith("%"):
            value = value_of(bare)
            if value is not None:
                return str(value)
        return re.sub(r"\\[dt]frac", r"\\frac", _SPACE.sub("", _TEXT.sub(r"\1", bare)))
