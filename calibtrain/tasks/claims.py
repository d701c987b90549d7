"""A paragraph of claims, each right or wrong by itself; the whole is right where all of them are.

Right by default is a claim that is one of the accepted sentences as a whole. That it contains one would not do: "It is not
so that Paris is the capital of France" contains one. So it fits answers of a known form; for others a grader decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from calibtrain.config_tasks import ClaimsTask
from calibtrain.errors import UserError
from calibtrain.records import Record
from calibtrain.tasks.imported import described, load_function, source_of
from calibtrain.tasks.matching import normalize
from calibtrain.tasks.sentences import sentences
from calibtrain.tasks.task import Grade, Part, Reading, Task


class Claims(Task):
    """Claims are sentences, or what the user's function makes of the text."""

    several_lines = True
    drops_parts = True

    def __init__(self, config: ClaimsTask) -> None:
        self.config = config
        self.clean: Callable[[str], str] = normalize if config.match == "normalized_match" else str.strip
        self.splitter = None if config.split == "sentences" else load_function(config.split, "task.split")
        self.grader = None if config.grader is None else load_function(config.grader, "task.grader")

    def code(self) -> list[str]:
        """Of the files of the functions."""
        return [*map(source_of, (self.splitter, self.grader))]

    def gradable(self, record: Record) -> bool:
        """Whether there are facts to compare with, or a grader that needs none."""
        return self.grader is not None or bool(record.accepted)

    def read(self, reply: str, record: Record) -> Reading:
        """The whole reply, its claims as parts."""
        spans = self._spans(reply)
        parts = tuple(Part("claim", reply[start:stop], start, stop) for start, stop in spans)
        return Reading(reply, 0, len(reply), found=bool(parts), parts=parts)

    def right(self, text: str, record: Record) -> bool:
        """Whether all claims of the text are right, and it makes any."""
        claims = [text[start:stop] for start, stop in self._spans(text)]
        return bool(claims) and all(self._grades(claims, record))

    def grades(self, readings: Sequence[Reading], records: Sequence[Record]) -> list[Grade]:
        """Of every claim, and of all of them: wrong with one that is wrong, unknown with one that is unknown."""
        found = []
        for reading, record in zip(readings, records, strict=True):
            if not self.gradable(record):
                found.append(Grade(None, (None,) * len(reading.parts)))
                continue
            parts = self._grades([part.text for part in reading.parts], record)
            unknown = False not in parts and None in parts
            found.append(Grade(None if unknown else reading.found and all(parts), parts))
        return found

    def key(self, text: str, record: Record) -> str:
        """The claims, whatever their order."""
        return "\n".join(sorted({normalize(text[start:stop]) for start, stop in self._spans(text)}))

    def _grades(self, claims: Sequence[str], record: Record) -> tuple[bool | None, ...]:
        if self.grader is not None:
            told = described(record)
            return tuple(self._graded(one, told, record) for one in claims)
        facts = {self.clean(one[start:stop]) for one in record.accepted for start, stop in self._spans(one)}
        facts |= {self.clean(one) for one in record.accepted}
        return tuple(bool(clean := self.clean(one)) and clean in facts for one in claims)

    def _graded(self, claim: str, told: Any, record: Record) -> bool | None:
        place = f"task.grader: {self.config.grader} ({record.origin or record.question})"
        try:
            grade = self.grader(claim, told)  # type: ignore[misc]
        except Exception as error:  # whatever the user's function does
            raise UserError(f"{place} raises {type(error).__name__}: {error}") from error
        if grade is not None and not isinstance(grade, bool):
            raise UserError(f"{place} returns {grade!r:.60}; it says True, False, or None where it does not know")
        return grade

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Characters of the claims of a text."""
        if self.splitter is None:
            return sentences(text)
        place = f"task.split: {self.config.split}"
        try:
            pieces = list(self.splitter(text))
        except Exception as error:  # whatever the user's function does
            raise UserError(f"{place} raises {type(error).__name__}: {error}, of {text[:60]!r}") from error
        found, begin = [], 0
        for piece in pieces:
            start = text.find(piece, begin) if isinstance(piece, str) and piece.strip() else -1
            if start < 0:
                raise UserError(
                    f"{place} returns {piece!r:.80}, which is no piece of the text behind the one before it; its claims are "
                    "cut out of the text, in order, and not rewritten"
                )
            begin = start + len(piece)
            found.append((start, begin))
        return found
