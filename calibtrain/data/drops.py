"""What was left out on the way from a source to the model, and why: nothing is dropped in silence."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

EXAMPLES_KEPT = 3


@dataclass(slots=True)
class DropReport:
    """Counts of dropped or shortened records by reason, with the places of the first few."""

    dropped: Counter[str] = field(default_factory=Counter)
    unused: dict[str, int] = field(default_factory=dict)
    """Records of each split beyond the size that was asked for."""
    shortened: int = 0
    """Records kept with a prompt cut from its left."""
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def drop(self, reason: str, place: str) -> None:
        """Count one dropped record; `place` is its origin or question."""
        self.dropped[reason] += 1
        if len(self.examples[reason]) < EXAMPLES_KEPT:
            self.examples[reason].append(place)

    @property
    def total(self) -> int:
        """How many records were dropped."""
        return self.dropped.total()

    def lines(self) -> list[str]:
        """One line a reason, the most frequent first; empty when nothing was dropped or shortened."""
        lines = [
            f"{count} dropped: {reason} (e.g. {', '.join(self.examples[reason])})"
            for reason, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        ]
        if self.unused.get("train"):
            lines.append(f"{self.unused['train']} not trained on: data.splits.train asks for fewer (null takes all)")
        if self.shortened:
            lines.append(f"{self.shortened} prompts cut from the left to fit max_length")
        return lines
