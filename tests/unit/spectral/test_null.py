"""Under a null the tests cry wolf no more often than they say, whatever the null is."""

from __future__ import annotations

import math

import pytest
import torch

from calibtrain.spectral.consistency import consistency, null_consistency
from calibtrain.spectral.null import LEVEL, TESTS, adjusted, against, null_tests, student_tail
from calibtrain.spectral.split import bases_of, upright
from tests.unit.spectral.truth import pair

DRAWS = 200
ALLOWED = LEVEL + 2 * math.sqrt(LEVEL * (1 - LEVEL) / DRAWS)
"""Share of false alarms, and two standard errors of 200 draws."""


def noise(kind: str, shape: tuple[int, int], draw: torch.Generator) -> torch.Tensor:
    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=draw, dtype=torch.float64)

    if kind == "gaussian":
        return normal(*shape)
    if kind == "a few loud rows":
        return normal(*shape) * normal(shape[0], 1).exp() * normal(1, shape[1]).exp()
    rank = 1 if kind == "rank 1" else 8
    return normal(shape[0], rank) @ normal(rank, shape[1])


@pytest.mark.parametrize("kind", ["gaussian", "a few loud rows", "rank 8", "rank 1"])
def test_noise_is_called_significant_no_more_often_than_stated(kind):
    found = {name: [] for name in TESTS}
    for seed in range(DRAWS):
        shape = ((40, 40), (56, 32), (32, 56))[seed % 3]
        w0 = upright(pair("noise", shape, seed)[0])
        change = 1e-3 * noise(kind, tuple(w0.shape), torch.Generator().manual_seed(10_000 + seed))
        first = bases_of(w0)
        tests = null_tests(first, change, first.inside(change), 5, torch.Generator().manual_seed(seed))
        for name in TESTS:
            found[name].append(tests[name].p)
    for name, p_values in found.items():
        assert sum(p <= LEVEL for p in p_values) / DRAWS <= ALLOWED, name
        assert sum(q <= LEVEL for q in adjusted(p_values)) / DRAWS <= LEVEL, name


@pytest.mark.parametrize(("kind", "name"), [("scale", "scale"), ("shared rotation", "shared_rotation")])
def test_structure_is_found(kind, name):
    p_values = []
    for seed in range(20):
        w0, w = (upright(one) for one in pair(kind, (48, 48), seed))
        first = bases_of(w0)
        p_values.append(null_tests(first, w - w0, first.inside(w - w0), 5, torch.Generator().manual_seed(seed))[name].p)
    assert all(q <= LEVEL for q in adjusted(p_values))


@pytest.mark.parametrize("shape", [(48, 48), (80, 40)])
def test_the_null_of_the_consistency_is_that_of_real_noise(shape):
    """The eigenproblem in the bases of W0 stands for noise on the whole matrix and an SVD."""
    w0, _ = pair("noise", shape, 0)
    first, norm = bases_of(w0), 0.05 * float(w0.norm())
    quick = null_consistency(first, norm, 40, torch.Generator().manual_seed(0), w0)
    draw = torch.Generator().manual_seed(1)
    slow = []
    for _ in range(40):
        added = torch.randn(shape, generator=draw, dtype=torch.float64)
        u, _, vt = torch.linalg.svd(w0 + added * norm / math.sqrt(w0.numel()), full_matrices=False)
        slow.append(consistency(first.left.mT @ u, first.right.mT @ vt.mT))
    middle = [math.fsum(one) / 40 for one in (quick, slow)]
    spread = max(torch.tensor(quick).std(), torch.tensor(slow).std()) / math.sqrt(40)
    assert abs(middle[0] - middle[1]) < 4 * float(spread)


def test_the_tail_of_student_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 9, 50):
        for t in (-2.0, 0.0, 0.3, 1.0, 2.5, 8.0, 60.0, 1000.0):
            assert student_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-7, abs=1e-300)


def test_one_more_draw_is_judged_by_the_draws_before_it():
    assert against(3.0, [1.0, 2.0, 3.0], "upper").p == pytest.approx(student_tail(1 / math.sqrt(4 / 3), 2))
    assert against(1.0, [1.0, 2.0, 3.0], "lower").p == against(3.0, [1.0, 2.0, 3.0], "upper").p
    assert math.isnan(against(1.0, [2.0, 2.0], "both").p)  # nothing is known of the spread


def test_benjamini_hochberg():
    stats = pytest.importorskip("scipy.stats")
    p = [0.01, 0.04, 0.03, 0.005, 0.9, 0.2]
    assert adjusted(p) == pytest.approx(stats.false_discovery_control(p).tolist())
    with_gap = adjusted([0.01, math.nan, 0.02])
    assert math.isnan(with_gap[1])
    assert with_gap[::2] == pytest.approx([0.02, 0.02])
