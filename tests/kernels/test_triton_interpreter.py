"""The Triton kernels' results without a GPU, under Triton's interpreter, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (make peers)")

ROOT = Path(__file__).parents[2]
STATISTICS = ("logprob", "entropy", "sum_p2", "confidence")
# Of float32 sums; the gradients of 16-bit inputs are rounded to them, once as a logit's gradient and once as the result.
GRADIENT_ERROR = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
CASES = ("plain", "bias_softcap_scale", "bfloat16", "float16", "one", "none")
LOOPS = ("loops", "loops_few_tokens", "loops_bfloat16")  # several vocabulary blocks a program, several backward turns


@pytest.fixture(scope="module")
def found():
    """What tests/kernels/triton_cases.py prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CALIBTRAIN_OPS": "triton", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.triton_cases"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout)


@pytest.mark.parametrize(("case", "upstream"), [
    *((case, kind) for case in CASES for kind in ("logprob", "entropy", "sum_p2", "all")),
    *((case, kind) for case in LOOPS for kind in ("sum", "all")),
])  # fmt: skip
def test_values_and_gradients_are_those_of_the_reference(found, case, upstream):
    errors = found[f"{case}/{upstream}"]
    gradient_error = GRADIENT_ERROR.get(case.removeprefix("loops_"), 1e-5)
    assert {name: errors[name] for name in STATISTICS if not errors[name] < 1e-5} == {}
    assert errors["correct"] == 0.0
    assert {name: value for name, value in errors.items() if name.startswith("d ") and not value < gradient_error} == {}


def test_logprob_keeps_its_relative_precision(found):
    assert found["extreme"]["logprob near 0"] < 1e-5
    assert found["extreme"]["logprob near -30"] < 1e-6


def test_rows_that_are_not_finite_are_nan_and_others_are_not(found):
    assert all(rows == [False, True, True, False] for rows in found["not finite"].values())


def test_the_layout_of_an_argument_in_memory_changes_no_bit(found):
    assert [kind for kind, same in found["laid out"].items() if not same] == []
    assert len(found["laid out"]) == 10


def test_all_temperatures_at_once_are_those_of_the_reference(found):
    """Absolute, of the logits: the same for 16-bit inputs, whose products are kept in float32."""
    worst = {dtype: max(errors.values()) for dtype, errors in found["temperatures"].items()}
    assert max(worst.values()) < 2e-5, worst
