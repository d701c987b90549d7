"""setup.py promises the oldest torch that has what the ops call."""

from __future__ import annotations

import ast
import re
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
CAME_WITH = {"out_dtype": (2, 8), "knobs": (2, 8), "_assert_async": (2, 1), "solve_ex": (1, 13), "custom_op": (2, 4)}
"""Names that our sources use, and the torch they came with: `torch.mm(out_dtype=)`, and Triton 3.4's `triton.knobs`."""


def test_the_floor_is_what_the_newest_of_them_needs():
    used = set()
    for path in (ROOT / "calibtrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kinds = ((ast.keyword, "arg"), (ast.Attribute, "attr"), (ast.alias, "name"))
            used |= {getattr(node, field) for kind, field in kinds if isinstance(node, kind)}
    assert set(CAME_WITH) <= used  # a name that is gone may lower the floor
    floor = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert tuple(map(int, floor.groups())) == max(CAME_WITH.values())
    assert tuple(map(int, version("torch").split(".")[:2])) >= max(CAME_WITH.values())
