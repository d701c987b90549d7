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
    """Config keys of a loss beside its name; none for a function."""
    section = sections().get((kind, name))
    return [] if section is None else [key for key in section.model_fields if key != "name"]


def show() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    from calibtrain.losses import CATALOG

    table = Table(show_lines=True)
    for column in ("name", "kind", "what it is", "paper", "config keys", "cost"):
        table.add_column(column, overflow="fold")
    for entry in CATALOG:
        table.add_row(
            entry.name, entry.kind, entry.title, entry.paper, ", ".join(keys(entry.kind, entry.name)), entry.cost
        )
    console = Console()
    console.print(table)
    console.print(
        "objective:, penalties: and weight_penalties: of a config take these names; docs/losses.md says more."
    )
