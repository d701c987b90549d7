"""What each loss is, where it comes from and what it was compared with: the rows of docs/losses.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossEntry:
    """One method. Plain text; where `largest_deviation` says d, a test asserts |ours - theirs| <= d (1 + |theirs|)."""

    name: str  # name in YAML, or the function's name where the method is a pure function only
    kind: str  # "objective", "penalty", "reward", "weight penalty" or "function"
    title: str  # what it is, in a few words
    paper: str  # authors, year, arXiv id
    equation: str  # e.g. "eq. 6"
    cost: str  # what it adds to a step, e.g. "none: reads TokenStats", "one forward pass of a frozen reference"
    compared_with: str  # reference implementation and version, or "float64 formula"
    largest_deviation: str  # e.g. "2e-7 (value), 5e-7 (gradient)"
    differs: str = ""  # where we differ from the public code, and why
