"""What the page says in words: its terms, each explained once, and where each finding stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PARTS = {"scale": "one factor", "shared_rotation": "shared rotation", "rest": "the rest"}
OF_REST = {
    "spectrum": "uneven scaling",
    "unshared_rotation": "one side turned alone",
    "outside": "new directions",
}
KINDS = {
    "unchanged": "the file holds the same numbers as before",
    "scale": "one factor makes the whole matrix larger or smaller",
    "shared rotation": "left and right singular vectors turn together",
    "independent rotations": "both sides turn, each in its own way",
    "low rank": "a few directions hold the whole change",
    "noise": "nothing sets the change apart from random noise of the same size",
    "mixed": "more than one of these, or none of them clearly",
}
TESTS = {
    "shared_rotation": (
        "Do both sides turn together?",
        "share of the change that turns left and right singular vectors differently; 0 for a shared rotation",
    ),
    "uniform_scaling": (
        "Do all singular values scale alike?",
        "share of the change of singular values that one factor explains; 100% for a uniform scaling",
    ),
    "scale": (
        "Did the matrix grow or shrink as a whole?",
        "the change along the matrix itself, ⟨W − W0, W0⟩ / |W0|²; 0 where it neither grew nor shrank",
    ),
}
DOTS = {
    "shared_rotation": "both sides turn together beyond chance",
    "uniform_scaling": "uniform beyond chance",
    "scale": "grown or shrunk beyond chance",
}
NULLS = {
    "gaussian": ("even noise", "random numbers that are alike everywhere, as large in total as the real change"),
    "row_column": (
        "noise with its rows and columns",
        "random numbers whose rows and columns are as large as those of the real change",
    ),
    "directions": (
        "its own strengths, random directions",
        "a change with the singular values of the real one, turned in random directions",
    ),
}


def told(findings: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The findings by where the page says them: `measured`, `beyond` chance at least in part, `chance`, `forgetting`."""
    places: dict[str, list[Mapping[str, Any]]] = {name: [] for name in ("measured", "beyond", "chance", "forgetting")}
    for one in findings:
        if one["claim"] == "forgetting":
            places["forgetting"].append(one)
        elif one.get("verdict") in ("measured", "not tested"):
            places["measured"].append(one)
        else:
            beyond = one["beyond"] or one.get("verdict") == "in some matrices"
            places["beyond" if beyond else "chance"].append(one)
    return places
