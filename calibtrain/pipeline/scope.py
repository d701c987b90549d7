"""Which questions a certificate is about, in plain words that every reply begins with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from calibtrain.confidence.answer import Answer
from calibtrain.config import RunConfig
from calibtrain.config_data import GeographySource
from calibtrain.errors import UserError

EXAMPLES, EXAMPLE_LENGTH = 2, 70


@dataclass(frozen=True, slots=True)
class Scope:
    """The graded questions of a certificate."""

    source: str  # "geography (city -> country)", "questions.jsonl"
    n: int
    examples: tuple[str, ...] = ()  # shortened questions

    def __str__(self) -> str:
        """After "questions like"."""
        such = " and ".join(f"“{one}”" for one in self.examples)
        return f"the {self.n:,} graded ones from {self.source}" + (f", such as {such}" if such else "")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scope:
        """Of `as_dict()` values; UserError for other keys."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError(f"scope: expected the keys {sorted(names)}; run `calibtrain calibrate` again")
        return cls(str(values["source"]), int(values["n"]), tuple(map(str, values["examples"])))


def scope_of(config: RunConfig, answers: Sequence[Answer], file: str | None = None) -> Scope:
    """Scope of graded answers to the config's questions, or to those of a `file` of answers."""
    source = config.data.source if config.data.questions is None else config.data.questions
    if file is None and isinstance(source, GeographySource):
        return Scope(source.called, len(answers))
    file = source.called if file is None else file
    questions = dict.fromkeys(one.question for one in answers)
    return Scope(plain(file), len(answers), tuple(plain(one) for one in list(questions)[:EXAMPLES]))


def plain(text: str, length: int = EXAMPLE_LENGTH) -> str:
    """Other people's text in one short line: no line breaks and nothing that a terminal would obey."""
    words = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return words if len(words) <= length else words[: length - 1].rstrip() + "…"


def at_most(risk: float) -> str:
    """A bound in percent, rounded up so that it never says less: "20%", "12.5%"."""
    return f"{math.ceil(1000 * risk - 1e-6) / 10:g}%"


def at_least(confidence: float) -> str:
    """A confidence in percent, rounded down so that it never says more: "95%", "98.7%"."""
    return f"{math.floor(1000 * confidence + 1e-6) / 10:g}%"
