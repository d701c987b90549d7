"""A small set of questions with the make-up of its source, and how far any set's make-up is from it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from calibtrain.errors import UserError
from calibtrain.records import Record

NULL_DRAWS = 4000


def choose_calibration_set(records: Sequence[Record], size: int, like: Sequence[Record] | None = None) -> list[Record]:
    """`size` of the records with the shares of every combination of strata that `like` has (by default, the records).

    Each stratum's earliest records are chosen; where it has too few, the earliest of the others take its seats. Seats
    are allocated by largest remainders (Hamilton's method; ties to the stratum that was seen first). The result keeps
    the records' order. Raises UserError if there are too few records.
    """
    return [records[place] for place in chosen_places(records, size, like)]


def chosen_places(records: Sequence[Record], size: int, like: Sequence[Record] | None = None) -> list[int]:
    """Where the records of `choose_calibration_set` stand; of all records only the strata are read."""
    if size > len(records):
        raise UserError(f"a set of {size} questions cannot be chosen from {len(records)}; ask for fewer")
    cells: dict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        cells[_cell(record)].append(index)
    wanted = Counter(_cell(record) for record in (records if like is None else like))
    seats = dict(zip(wanted, largest_remainder(list(wanted.values()), size), strict=True))
    chosen = {index for cell, indices in cells.items() for index in indices[: seats.get(cell, 0)]}
    left = (index for index in range(len(records)) if index not in chosen)
    return sorted([*chosen, *islice(left, size - len(chosen))])


def _cell(record: Record) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(record.strata.items()))


def largest_remainder(counts: Sequence[int], seats: int) -> list[int]:
    """Whole numbers that add up to `seats`, in proportion to `counts` and never above them (for seats <= their sum)."""
    total = sum(counts)
    if total == 0:
        return [0] * len(counts)
    # Integers throughout: remainders that tie must tie exactly.
    shares = [divmod(count * seats, total) for count in counts]
    allocated = [whole for whole, _ in shares]
    by_remainder = sorted(range(len(counts)), key=lambda i: (-shares[i][1], i))
    for i in by_remainder[: seats - sum(allocated)]:
        allocated[i] += 1
    return allocated


@dataclass(frozen=True, slots=True)
class StratumDistance:
    """Make-up of a set beside its source's for one stratum key."""

    key: str
    set_shares: Mapping[str, float]
    source_shares: Mapping[str, float]
    total_variation: float
    """Share of the set that would have to change place to match the source, in [0, 1]."""
    null_95: float
    """95 % of random sets of this size are nearer than this."""
    p_value: float
    """Share of random sets that are at least as far."""

    @property
    def farther_than_chance(self) -> bool:
        """Whether a random draw would hardly ever be so far off."""
        return self.total_variation > self.null_95


@dataclass(frozen=True, slots=True)
class Composition:
    """How far a set's make-up is from its source's."""

    set_size: int
    source_size: int
    strata: tuple[StratumDistance, ...]

    @property
    def verdict(self) -> str:
        """What the distances mean, in plain words for the report."""
        if not self.strata:
            return "The source names no strata, so the make-up of the set cannot be compared; it is a random draw."
        far = [stratum for stratum in self.strata if stratum.farther_than_chance]
        if not far:
            worst = max(self.strata, key=lambda stratum: stratum.total_variation)
            return (
                f"The make-up of these {self.set_size} questions is as close to the source's as chance allows: by "
                f"{worst.key}, where it differs most, {worst.total_variation:.1%} of them would have to change place "
                f"(random draws stay below {worst.null_95:.1%} 19 times in 20)."
            )
        return " ".join(_complaint(stratum) for stratum in far) + (
            " What is measured on this set may not hold for the source; draw it again, or weigh by stratum."
        )


def composition_distance(chosen: Sequence[Record], source: Sequence[Record], seed: int = 0) -> Composition:
    """Total variation distance between the make-up of `chosen` and `source`, for each key of their strata.

    The null is that both are draws from one population: the pooled records are dealt anew NULL_DRAWS times into sets of
    the same sizes (multivariate hypergeometric), so that the sampling error of both counts. Raises UserError if either
    is empty.
    """
    if not chosen or not source:
        raise UserError("the make-up of an empty set cannot be compared")
    keys = sorted({key for record in (*chosen, *source) for key in record.strata})
    return Composition(len(chosen), len(source), tuple(_distance(key, chosen, source, seed) for key in keys))


def _distance(key: str, chosen: Sequence[Record], source: Sequence[Record], seed: int) -> StratumDistance:
    set_counts = Counter(record.strata.get(key, "unknown") for record in chosen)
    source_counts = Counter(record.strata.get(key, "unknown") for record in source)
    names = sorted(set_counts | source_counts)
    observed = np.array([[counts[name] for name in names] for counts in (set_counts, source_counts)], dtype=np.int64)
    pooled = observed.sum(axis=0)
    dealt = np.random.default_rng(seed).multivariate_hypergeometric(pooled, len(chosen), size=NULL_DRAWS)
    null = _total_variation(dealt / len(chosen), (pooled - dealt) / len(source))
    shares = observed / observed.sum(axis=1, keepdims=True)
    distance = float(_total_variation(shares[0], shares[1]))
    return StratumDistance(
        key=key,
        set_shares={name: float(share) for name, share in zip(names, shares[0], strict=True)},
        source_shares={name: float(share) for name, share in zip(names, shares[1], strict=True)},
        total_variation=distance,
        null_95=float(np.quantile(null, 0.95)),
        p_value=float((1 + np.count_nonzero(null >= distance - 1e-12)) / (1 + NULL_DRAWS)),
    )


def _total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return 0.5 * np.abs(p - q).sum(axis=-1)


def _complaint(stratum: StratumDistance) -> str:
    gaps = {name: stratum.set_shares[name] - share for name, share in stratum.source_shares.items()}
    name = max(gaps, key=lambda one: abs(gaps[one]))
    direction = "too many" if gaps[name] > 0 else "too few"
    return (
        f"By {stratum.key} the set is farther from the source than chance explains ({stratum.total_variation:.1%}; "
        f"random draws stay below {stratum.null_95:.1%} 19 times in 20): above all it has {direction} of {name!r} "
        f"({stratum.set_shares[name]:.1%} instead of {stratum.source_shares[name]:.1%})."
    )
