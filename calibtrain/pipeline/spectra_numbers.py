"""What the page says of spectra.json: cells of its maps, the matrices it lists, shares, tests; None where no number is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

Row = Mapping[str, Any]
SHOWN = 300  # matrices listed and drawn one by one
TESTS = ("shared_rotation", "uniform_scaling", "scale")
NULLS = ("gaussian", "row_column", "directions")
PARTS = ("scale", "shared_rotation", "rest")
OF_REST = ("spectrum", "unshared_rotation", "outside")


def value(row: Any, *keys: str) -> float | None:
    """The number at the end of the keys; None where a key, the number or its finiteness is missing."""
    for key in keys:
        if not isinstance(row, Mapping):
            return None
        row = row.get(key)
    return float(row) if _finite(row) else None


def _finite(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)


def level(row: Row) -> float | None:
    """How much one factor scales all singular values: alpha - 1."""
    alpha = value(row, "scale", "alpha")
    return None if alpha is None else alpha - 1.0


def against_null(row: Row) -> float | None:
    """NF over what noise of the same norm gives; below 1, left and right turn together more than by chance."""
    nf, null = value(row, "consistency", "nf"), value(row, "consistency", "null")
    return nf / null if nf is not None and null else None


def beyond(row: Row, test: str) -> bool:
    """Whether this matrix's test is beyond chance."""
    found = (row.get("tests") or {}).get(test)
    return bool(found and found.get("beyond"))


@dataclass(frozen=True, slots=True)
class Grid:
    """Matrices by layer and module: a cell holds one, or all experts of a layer."""

    layers: Sequence[int | None]  # None, the last: outside the layers
    modules: Sequence[str]  # in the model's order
    cells: Mapping[tuple[int | None, str], Sequence[Row]]  # no key where a layer has no such module

    @property
    def most(self) -> int:
        """Matrices in the fullest cell."""
        return max((len(rows) for rows in self.cells.values()), default=0)

    @property
    def sparse(self) -> bool:
        """Whether some layer lacks some module."""
        return len(self.cells) < len(self.layers) * len(self.modules)


def grid_of(rows: Sequence[Row]) -> Grid:
    """The rows by layer and module."""
    cells: dict[tuple[int | None, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["layer"], row["module"]), []).append(row)
    layers: list[int | None] = [*sorted({layer for layer, _ in cells if layer is not None})]
    if any(layer is None for layer, _ in cells):
        layers.append(None)
    return Grid(layers, list(dict.fromkeys(row["module"] for row in rows)), cells)


def shown(rows: Sequence[Row]) -> list[Row]:
    """At most SHOWN rows, those that moved furthest, in the model's order."""
    if len(rows) <= SHOWN:
        return list(rows)
    ranked = sorted(range(len(rows)), key=lambda i: -(value(rows[i], "relative_drift") or 0.0))
    return [rows[i] for i in sorted(ranked[:SHOWN])]


def furthest(rows: Sequence[Row]) -> int:
    """Place of the row that moved furthest."""
    return max(range(len(rows)), key=lambda i: value(rows[i], "relative_drift") or 0.0)


def middle(values: Sequence[float | None]) -> float | None:
    """Median of the numbers among them."""
    known = [one for one in values if one is not None]
    return median(known) if known else None


def module_shares(grid: Grid) -> list[dict[str, Any]]:
    """Of each module: how many matrices changed, and the mean share of each part in their squared change."""
    found = []
    for module in grid.modules:
        rows = [row for layer in grid.layers for row in grid.cells.get((layer, module), ())]
        known = [row for row in rows if value(row, "relative_drift") and value(row, "shares", "rest") is not None]
        means = {part: _mean(known, "shares", part) for part in PARTS}
        means |= {part: _mean(known, "shares", "of_rest", part) for part in OF_REST}
        found.append({"module": module, "n": len(known), "all": len(rows), "shares": means})
    return found


def _mean(rows: Sequence[Row], *keys: str) -> float | None:
    known = [one for row in rows if (one := value(row, *keys)) is not None]
    return fmean(known) if known else None


def test_table(rows: Sequence[Row], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each test: matrices tested and beyond chance, the median value, and the median of each null's mean and ends."""
    table = []
    for test in TESTS:
        counts = (summary.get("tests") or {}).get(test) or {}
        found = [(row.get("tests") or {}).get(test) for row in rows]
        nulls = {
            null: [middle([value(one, "nulls", null, key) for one in found]) for key in ("mean", "low", "high")]
            for null in NULLS
        }
        table.append(
            {"test": test, "tested": counts.get("tested", 0), "beyond": counts.get("beyond", 0), "nulls": nulls}
            | {"value": middle([value(one, "value") for one in found])}
        )
    return table


def left_out_reasons(left_out: Sequence[Mapping[str, str]]) -> list[tuple[str, int, list[str]]]:
    """(why, how many, the first few names), the most frequent reason first."""
    reasons = Counter(one["why"] for one in left_out)
    return [(why, n, [one["name"] for one in left_out if one["why"] == why][:5]) for why, n in reasons.most_common()]


def spectrum_of(row: Row) -> dict[str, list[float]]:
    """`at` (index / (rank - 1)), `before` and `change` (after / before - 1) where all are known and before is not 0."""
    spectrum = row.get("spectrum") or {}
    last = max(int(row.get("rank") or 1) - 1, 1)
    points = zip(*(spectrum.get(key) or () for key in ("index", "before", "after")), strict=False)
    known = [(i, b, a) for i, b, a in points if all(map(_finite, (i, b, a))) and b > 0]
    return {
        "at": [i / last for i, _, _ in known],
        "before": [b for _, b, _ in known],
        "change": [a / b - 1.0 for _, b, a in known],
    }
