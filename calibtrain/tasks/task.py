"""The contract of a task: what is asked, which part of a reply is the answer, and what right means.

Whoever asks, reads or grades has the task of the run from its template (`template.task`) and asks it; none knows its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from calibtrain.records import Record
from calibtrain.tasks.matching import normalize


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer that is right or wrong by itself, as a field of JSON or a claim: reply[start:stop]."""

    name: str
    text: str
    start: int
    stop: int
    read_to: int = 0  # its likelihood reads to here, where the piece alone does not tell that it ends (the 12 of 125)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a task finds in a reply: the answer, and the characters reply[start:stop] that say it.

    The answer's likelihood is that of the tokens of these characters, with the end token where they reach the reply's end.
    """

    text: str  # as it is graded and shown; it may be written otherwise than the reply has it ("12" of "12.0")
    start: int
    stop: int
    found: bool = True  # False: nothing that could be an answer; graded wrong, and counted
    parts: tuple[Part, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()  # what the likelihood reads, where not all of [start, stop); may overlap
    read_to: int = 0  # its likelihood reads to here, where the answer alone does not tell that it ends (the 12 of 125)
    known: bool = True  # False: it could not be read, by a fault of the reader; then its grade is not known


@dataclass(frozen=True, slots=True)
class Grade:
    """Whether an answer is right, None where that is not known, and each of its parts."""

    correct: bool | None
    parts: tuple[bool | None, ...] = ()


class Task:
    """Base of all kinds, and its defaults: the whole reply is the answer, right where it is one of the accepted ones."""

    several_lines: bool = False
    """Whether an answer may hold line breaks."""
    schema: Any = None
    """JSON schema that every answer is asked to keep to, where the task has one: the one that a client may name."""
    objects: bool = False
    """Whether an accepted answer may be an object; its JSON is the answer then."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply and are no part of it, beside the template's own end."""
    mark: tuple[str, ...] = ()
    """What of the config makes other prompts or scores of the same questions: a calibration holds for one mark alone."""
    options_are: Literal["positions", "classes"] | None = None
    """What the n-th option of one question has in common with that of another: its place, or all that it says."""
    option_score: Literal["sum", "mean"] = "sum"
    """What of its tokens' log-probs is an option's score."""
    option_ends: bool = True
    """Whether an option's end token is scored: needless where no option begins as another does."""
    drops_parts: bool = False
    """Whether an answer is still one without some of its parts, so that those in doubt can be withheld alone."""
    judged: bool = False
    """Whether grades are opinions that may be wrong: what they certify needs some that a person has audited."""

    def identity(self) -> Any:
        """What of the config its reading and grading depend on, as plain values; None for the default task. Answers,
        calibrators and certificates hold for one identity alone.
        """
        section = getattr(self, "config", None)
        return None if section is None else section.grades_by()

    def code(self) -> list[str]:
        """Hashes of the user's own functions, with others of which a calibration is void, though the answers stand."""
        return []

    def ready(self, records: Sequence[Record]) -> None:
        """Raise UserError where answers to these records could not be graded now; asked before long work."""

    def settle(self) -> None:
        """Raise UserError where grades are missing since the last call; asked once the answers are safe on disk."""

    def handed(self) -> Any:
        """What `settle` would tell of, for the process that tells it: plain values for its `take`. Counts anew."""

    def take(self, handed: Any) -> None:
        """Add what another process `handed`, so that one `settle` tells of all."""

    def asked(self, record: Record) -> Record:
        """The record as it is put to the model: question, the reply to learn, accepted answers. Asking twice is once.

        Raises UserError that names the record (`record.origin`) where it cannot be asked.
        """
        return record

    def gradable(self, record: Record) -> bool:
        """Whether answers to it can be graded."""
        return bool(record.accepted)

    def options(self, record: Record) -> tuple[str, ...]:
        """The replies that one is chosen of by their likelihood; () where the reply is generated."""
        return ()

    def choices(self, record: Record) -> tuple[str, ...]:
        """The replies that can be right, however one is found; () where they cannot be listed."""
        return ()

    def read(self, reply: str, record: Record) -> Reading:
        """The answer in a reply (without thinking, stripped), which is untrusted text. Never raises for what it holds."""
        return Reading(reply, 0, len(reply), found=bool(reply))

    def right(self, text: str, record: Record) -> bool:
        """Whether the answer `text` (a Reading's) is right."""
        raise NotImplementedError

    def grades(self, readings: Sequence[Reading], records: Sequence[Record]) -> list[Grade]:
        """A grade for each answer, in order; many at once, for kinds whose grader is asked elsewhere."""
        return [
            Grade((one.found and self.right(one.text, record)) if one.known and self.gradable(record) else None)
            for one, record in zip(readings, records, strict=True)
        ]

    def says(self, text: str, record: Record) -> str:
        """The answer `text` for people who do not see the question as it was put to the model."""
        return text

    def key(self, text: str, record: Record) -> str:
        """Answers to one question mean the same where their keys are equal."""
        return normalize(text)


def is_right(task: Task, reply: str, record: Record) -> bool:
    """Whether a whole reply is right; of a question that cannot be graded, whether it says what the record's own does."""
    if not task.gradable(record):
        record = replace(record, accepted=(record.chosen or "",))
    return bool(task.grades([task.read(reply, record)], [record])[0].correct)
