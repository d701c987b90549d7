"""What was left out on the way from a source to the model, and why: nothing is dropped in silence."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calibtrain.errors import UserError, printable

EXAMPLES_KEPT = 3
REASONS_SHOWN = 8
QUESTION_LENGTH = 200


@dataclass(frozen=True, slots=True)
class UnfitRow:
    """A row that cannot serve, whatever the run asks for."""

    place: str
    reason: str
    question: str  # cut


@dataclass(slots=True)
class DropReport:
    """Counts of dropped or shortened records by reason, with the places of the first few."""

    strict: bool = False
    """Raise the error of the first row that cannot serve."""
    dropped: Counter[str] = field(default_factory=Counter)
    unused: dict[str, int] = field(default_factory=dict)
    """Records of each split beyond the size that was asked for."""
    spare: list[Any] = field(default_factory=list)
    """Such records of train, then of calibration, whose questions may be graded for what is fitted: a confidence head."""
    notes: list[str] = field(default_factory=list)
    """What else a draw came to."""
    shortened: int = 0
    """Records kept with a prompt cut from its left."""
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unfit: list[UnfitRow] = field(default_factory=list)
    """Rows that cannot serve, in the order in which they were found; each is counted in `dropped` as well."""

    def drop(self, reason: str, place: str) -> None:
        """Count one dropped record; `place` is its origin or question."""
        self.dropped[reason] += 1
        if len(self.examples[reason]) < EXAMPLES_KEPT:
            self.examples[reason].append(place)

    def refuse(self, why: UserError | str, place: str, question: str = "") -> None:
        """Drop a row that cannot serve and keep it for dropped.jsonl. With `strict`, raise an error that it has."""
        if self.strict and isinstance(why, UserError):
            raise why
        reason = str(why).removeprefix(f"{place}: ")
        self.unfit.append(UnfitRow(printable(place), printable(reason), printable(question[:QUESTION_LENGTH])))
        self.drop(reason, place)

    def as_json(self) -> dict[str, Any]:
        """What encoding may add to a report, as plain values."""
        unfit = [asdict(row) for row in self.unfit]
        return {"dropped": self.dropped, "shortened": self.shortened, "examples": self.examples, "unfit": unfit}

    def add(self, found: Mapping[str, Any]) -> None:
        """Add another report's `as_json`."""
        self.dropped.update(found["dropped"])
        self.shortened += found["shortened"]
        for reason, places in found["examples"].items():
            self.examples[reason] = [*self.examples[reason], *places][:EXAMPLES_KEPT]
        self.unfit += [UnfitRow(**row) for row in found["unfit"]]

    @property
    def total(self) -> int:
        """How many records were dropped."""
        return self.dropped.total()

    def lines(self) -> list[str]:
        """One line a reason, the most frequent first; empty when nothing was dropped or shortened."""
        reasons = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        lines = [
            f"{count} dropped: {reason} (e.g. {', '.join(self.examples[reason])})"
            for reason, count in reasons[:REASONS_SHOWN]
        ]
        if others := reasons[REASONS_SHOWN:]:
            lines.append(
                f"{sum(count for _, count in others)} dropped for {len(others)} other reasons: see dropped.jsonl"
            )
        if self.unused.get("train"):
            lines.append(f"{self.unused['train']} not trained on: data.splits.train asks for fewer (null takes all)")
        if self.shortened:
            lines.append(f"{self.shortened} prompts cut from the left to fit max_length")
        return lines


def check_share(unfit: Sequence[UnfitRow], read: int, most: float, name: str) -> None:
    """Raise UserError, with the first three reasons, where more than the share `most` of `read` rows cannot serve."""
    if len(unfit) <= most * read:
        return
    first: dict[str, UnfitRow] = {}
    for row in unfit:
        first.setdefault(row.reason, row)
    told = "; ".join(f"{row.place}: {row.reason}" for row in list(first.values())[:EXAMPLES_KEPT])
    raise UserError(
        f"{name}: {len(unfit)} of {read} rows cannot serve, more than data.max_dropped ({most:.0%}) allows: {told}"
    )


def write_dropped(unfit: Sequence[UnfitRow], path: Path) -> None:
    """A line of JSON (place, reason, question) for each row that cannot serve; no file where there is none."""
    path.unlink(missing_ok=True)
    if unfit:
        lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in unfit)
        path.write_text("".join(lines), encoding="utf-8")
