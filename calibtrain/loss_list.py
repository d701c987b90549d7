"""What `calibtrain losses` prints: every method of the catalogue, with its config keys and its cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from calibtrain.config_losses import Objective, Penalty, WeightPenaltyConfig

PLACES = {"objective": "objective", "penalty": "penalties", "weight penalty": "weight_penalties"}
"""Kind of a method -> the config key that it stands under; the others are functions to import."""


def sections() -> Mapping[tuple[str, str], type[Any]]:
    """(kind, name) -> config section of every loss that `calibtrain train` reaches."""
    found: dict[tuple[str, str], type[Any]] = {}
    for kind, union in (("objective", Objective), ("penalty", Penalty)):
        for section in get_args(get_args(union)[0]):
            found[kind, section.model_fields["name"].default] = section
    for name in get_args(WeightPenaltyConfig.model_fields["name"].annotation):
        found["weight penalty", name] = WeightPenaltyConfig
    return found


def keys(kind: str, name: str) -> list[str]:
    """Config keys of a loss beside its name; none for a function. Of a weight penalty, those that it heeds."""
    section = sections().get((kind, name))
    if section is None:
        return []
    idle = {"name"}
    if kind == "weight penalty":
        idle |= {"scale"} if not name.endswith("gram_drift") else set()
        idle |= {"probes"} if name == "angle_budget" else {"budget"}
    return [key for key in section.model_fields if key not in idle]


def show() -> None:
    """Print every method: one block each, which is read at any width, also in a file."""
    import shutil
    import textwrap

    from calibtrain.losses import CATALOG

    width = max(60, min(120, shutil.get_terminal_size().columns))
    for entry in CATALOG:
        place = PLACES.get(entry.kind)
        print(f"{entry.name}  ({f'{place}: in the config' if place else f'{entry.kind}, to import'})")
        lines = {"": entry.title, "paper": entry.paper, "cost": entry.cost}
        if found := keys(entry.kind, entry.name):
            lines["keys"] = ", ".join(found)
        for label, text in lines.items():
            print(textwrap.fill(text, width, initial_indent=f"    {label:<7}", subsequent_indent=" " * 11))
        print()
    print("docs/losses.md has the equations, what each was compared with, and where it differs from public code.")
