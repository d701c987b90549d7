"""log1mexp against mpmath, in value and gradient."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibtrain.ops import log1mexp

POINTS = [-1e-12, -1e-9, -1e-3, -0.5, -math.log(2), -0.7, -80.0, -1e4]
PRECISION = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("point", POINTS)
def test_value_and_gradient(point, dtype):
    x = torch.tensor(point, dtype=dtype, requires_grad=True)
    y = log1mexp(x)
    y.backward()
    with mpmath.workdps(60):
        exact = mpmath.mpf(x.item())  # of the point as the dtype has it
        value = float(mpmath.log(1 - mpmath.exp(exact)))
        gradient = float(-mpmath.exp(exact) / (1 - mpmath.exp(exact)))
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert y.item() == pytest.approx(value, rel=min(PRECISION[dtype], 3e-7), abs=1e-38)
    assert x.grad.item() == pytest.approx(gradient, rel=PRECISION[dtype], abs=1e-38)


@pytest.mark.parametrize("dtype", [*PRECISION, torch.float16])
def test_zero_is_finite(dtype):
    x = torch.tensor([0.0, -0.0, 1e-3], dtype=dtype, requires_grad=True)
    y = log1mexp(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert (y < -10).all()
    assert x.grad.tolist() == [0.0, 0.0, 0.0]


@given(st.floats(max_value=0.0, allow_nan=False, width=32))
def test_finite_gradient_everywhere(point):
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(point, dtype=dtype).clamp(min=-1e30).requires_grad_()
        y = log1mexp(x)
        y.backward()
        assert y.isfinite()
        assert y <= 0
        assert x.grad.isfinite()
        assert x.grad <= 0


def test_gradcheck_over_both_branches():
    x = torch.tensor([-0.01, -0.3, -0.69, -0.70, -1.0, -5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log1mexp, (x,))
    assert torch.autograd.gradgradcheck(log1mexp, (x,))


def test_nan_stays_nan():
    assert log1mexp(torch.tensor(float("nan"))).isnan()
