"""Broken configs and rows end in one clear message: a few of the cases of benchmarks/fuzz.py."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from fuzz import Bench, outcome


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", ["config_case", "row_case"])
def test_no_input_ends_in_a_traceback_or_never(bench, kind, monkeypatch):
    monkeypatch.chdir(bench.folder)
    found = {}
    for number in range(120):
        shown, case = getattr(bench, kind)(random.Random(f"suite {number}"))
        became, said = outcome(case)
        found.setdefault(became, []).append(f"{said}\n{shown}")
    broken = [text for became, texts in found.items() if became not in ("ok", "refused") for text in texts]
    assert not broken, broken[0]
    assert len(found["ok"]) > 5
    assert len(found["refused"]) > 40
