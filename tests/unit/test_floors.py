"""Imports only go down the floors of the house; what may be imported from a room beside is listed here, and no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {name: ROOT / name for name in ("launchers", "losses", "configs")} | {"": ROOT / "calibtrain"}
FLOORS = (
    {
        "attention_names",
        "build_locks",
        "config",
        "config_abstention",
        "config_base",
        "config_checks",
        "config_data",
        "config_head",
        "config_losses",
        "config_preferences",
        "config_rewards",
        "config_rollout_engine",
        "config_rollouts",
        "config_tracking",
        "config_training",
        "config_file",
        "distributed",
        "errors",
        "config_tasks",
        "lines",
        "records",
        "shared_buffers",
        "shared_files",
        "version",
    },
    {"ops", "calibration"},
    {"losses", "models", "data", "tasks", "confidence", "abstention", "spectral", "quantization", "engines"},
    {"training", "hooks"},
    {"pipeline"},
    {
        "launchers",
        "configs",
        "cli",
        "cli_checks",
        "cli_options",
        "cli_plan",
        "cli_push",
        "cli_serving",
        "cli_weights",
        "app",
        "demo",
        "doctor",
        "dry_run",
        "loss_list",
    },
)
SIDEWAYS = {
    # A batch is made for losses, a model is run on it, and an answer is what the model makes of a question.
    ("data", "losses"),
    ("models", "losses"),
    # A penalty charges what the analysis measures: the same functions.
    ("losses", "spectral"),
    ("models", "spectral"),
    # Whether a model is quantised already is known where models are loaded.
    ("quantization", "models"),
    # Weights are read from files one at a time, as the analysis of weights reads them.
    ("quantization", "spectral"),
    # What is asked, read and graded, a task says.
    ("data", "tasks"),
    ("confidence", "tasks"),
    ("confidence", "data"),
    ("confidence", "models"),
    # A judge is asked as any other server is, and what it said lies in the cache of the models.
    ("tasks", "engines"),
    ("tasks", "models"),
    # A word the model states about itself is read by the same scales that words are spoken by.
    ("confidence", "abstention"),
    # The loop knows who listens; nobody who listens knows the loop.
    ("training", "hooks"),
}
"""(from, to) on one floor. Floors 0 and 5 have no rooms: their modules import each other as they like."""
ROOMLESS = (0, 5)


def imports() -> Iterator[tuple[str, str, str]]:
    """(file and line, its room, the room that it imports), for every import within calibtrain."""
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            own = room_of([package] * bool(package) + list(path.relative_to(folder).with_suffix("").parts))
            own = "app" if path == PACKAGES[""] / "__init__.py" else own  # `calibtrain.load` is a way in
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for name in imported(node):
                    first, *rest = name.split(".")
                    if first == "calibtrain":
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", own, room_of(rest)  # type: ignore[attr-defined]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert not node.level, f"line {node.lineno}: a relative import"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def room_of(parts: list[str]) -> str:
    """`version` stands for calibtrain/__init__.py itself."""
    return "version" if not parts or parts[0].startswith("__") else parts[0]


def floor_of(room: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert len(found) == 1, f"{room} stands on no floor: name it in FLOORS and in the design"
    return found[0]


def test_imports_only_go_down():
    wrong, sideways = [], set()
    for place, own, other in imports():
        below = floor_of(own) - floor_of(other)
        if own == other or below > 0 or (below == 0 and floor_of(own) in ROOMLESS):
            continue
        if below == 0:
            sideways.add((own, other))
        if below < 0 or (own, other) not in SIDEWAYS:
            wrong.append(f"{place}: {own} imports {other}")
    assert not wrong, "\n".join(wrong)
    assert sideways == SIDEWAYS  # none is permitted that nobody needs
    tuple(TopologicalSorter({room: {b for a, b in SIDEWAYS if a == room} for room, _ in SIDEWAYS}).static_order())


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("import calibtrain.pipeline.train as t", ["calibtrain.pipeline.train"]),
        ("from calibtrain import __version__, demo", ["calibtrain.__version__", "calibtrain.demo"]),
        ("from calibtrain.config import RunConfig", ["calibtrain.config.RunConfig"]),
    ],
)
def test_no_form_of_an_import_is_overlooked(line, names):
    assert imported(ast.parse(line).body[0]) == names
