"""`--keep`: how much of what the full-precision model was worth may be lost before the artefact is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calibtrain.errors import UserError
from calibtrain.pipeline import page

KEYS = {
    "accuracy": ("accuracy", -1),
    "auroc": ("auroc", -1),
    "coverage": ("certified_coverage", -1),
    "ece": ("ece_debiased", 1),
    "brier": ("brier", 1),
    "changed": ("changed", 1),
}
"""Name in `--keep` -> row of the table and the sign of a loss."""
SHARES = ("accuracy", "coverage", "ece", "changed")


@dataclass(frozen=True, slots=True)
class Check:
    """One limit and what was lost, by the point estimate."""

    key: str
    allowed: float
    lost: float | None  # None: cannot be told, which is refused too
    low: float | None  # ends of the 95% interval of the loss
    high: float | None

    @property
    def kept(self) -> bool:
        """Whether no more is lost than allowed."""
        return self.lost is not None and self.lost <= self.allowed + 1e-12

    def told(self) -> str:
        """In a sentence: what was lost, its interval and the limit."""
        name = "certified coverage" if self.key == "coverage" else "debiased ECE" if self.key == "ece" else self.key
        name = name.upper() if name == "auroc" else name
        if self.lost is None:
            return f"{name}: cannot be told of these answers, so that {self._number(self.allowed)} cannot be kept"
        verb = "answers changed" if self.key == "changed" else f"{name} lost"
        between = ""
        if self.low is not None and self.high is not None:
            between = f" ({self._number(self.low)} to {self._number(self.high)})"
        return f"{verb}: {self._number(self.lost)}{between}, allowed {self._number(self.allowed)}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "kept": self.kept}

    def _number(self, value: float) -> str:
        return page.share(value) if self.key in SHARES else page.number(value)


def parse_keep(text: str | None) -> dict[str, float]:
    """Limits of "auroc=0.01,coverage=0.05". UserError for other keys, and for values that are no share."""
    found: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        key, equals, value = (one.strip() for one in part.partition("="))
        if not equals:
            raise UserError(f"--keep: {part.strip()!r} is not KEY=LIMIT, e.g. auroc=0.01")
        if key not in KEYS:
            raise UserError(f"--keep: {key!r} is none of {', '.join(KEYS)}")
        if key in found:
            raise UserError(f"--keep: {key} is named twice")
        try:
            found[key] = float(value)
        except ValueError:
            raise UserError(f"--keep: {key}={value!r} is not a number") from None
        if not 0 <= found[key] <= 1:
            raise UserError(f"--keep: {key}={value} is not between 0 and 1: it is how much may be lost")
    if text is not None and not found:
        raise UserError("--keep: says nothing; e.g. --keep auroc=0.01,coverage=0.05")
    return found


def check(keep: Mapping[str, float], rows: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """Each limit against the table's rows by key: the point estimate decides, the interval is told."""
    return [_check(key, allowed, rows[KEYS[key][0]], KEYS[key][1]) for key, allowed in keep.items()]


def _check(key: str, allowed: float, row: Mapping[str, Any], sign: int) -> Check:
    lost, ends = row["difference"], [row["low"], row["high"]]
    if lost is None or not math.isfinite(lost):
        return Check(key, allowed, None, None, None)
    ends = sorted(sign * one + 0.0 for one in ends if one is not None and math.isfinite(one))
    low, high = ends if len(ends) == 2 else (None, None)
    return Check(key, allowed, sign * lost + 0.0, low, high)


def refusal(checks: Sequence[Check], scheme: str, group_size: int | None, method: str, methods: Sequence[str]) -> str:
    """What was lost beyond the limits, and what to try next."""
    broken = "; ".join(one.told() for one in checks if not one.kept)
    return f"refused: {broken}. Next to try: {next_to_try(scheme, group_size, method, methods)}"


def next_to_try(scheme: str, group_size: int | None, method: str, methods: Sequence[str]) -> str:
    """Options that lose less: a better method first, then smaller groups, then more bits."""
    better = [one for one in methods if methods.index(one) > methods.index(method)] if method in methods else []
    if better:
        return f"--method {better[-1]}"
    if group_size is not None and group_size > 32:
        return f"--group-size {group_size // 2}"
    if scheme == "w4a16":
        return "--scheme w8a16"
    if scheme in ("w8a8", "fp8"):
        return "--scheme w8a16, which leaves activations as they are"
    return "--ignore LAYER for those that lose most, or stay in full precision"
