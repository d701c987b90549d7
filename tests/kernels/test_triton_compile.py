"""Every tuned Triton kernel compiles for its architecture and fits: ahead of time, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (make peers)")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from kernel_report import SHARED_LIMIT, report


@pytest.mark.parametrize(
    "architecture", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
def test_kernels_fit_without_spills(architecture):
    rows = list(report((architecture,)))
    assert len(rows) == 10
    for row in rows:
        assert row["local"] == 0, row
        assert row["registers"] <= 255, row
        assert 0 < row["shared"] <= SHARED_LIMIT[architecture], row
        assert (row["mma"] > 0) == (row["dtype"] != "fp32"), row  # fp32 products are exact ones
