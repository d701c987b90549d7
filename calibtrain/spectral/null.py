"""Is it more than chance? Updates that know nothing of W0, drawn as large as the real one, and tests against them.

A small change of a matrix turns its singular vectors far and both sides alike, whatever the change is: first-order
perturbation divides by differences of singular values. So raw angles, ratios and consistencies say nothing, and what is
tested here has no such denominators. With M = U0^T (W - W0) V0 and s the singular values of W0:

    scale            sum s_i M_ii / sum s_i^2                       a - 1 of the nearest a W0; 0 by chance
    shared_rotation  |skew(off-diagonal M)|^2 / |off-diagonal M|^2  0 if both sides turn alike; 1/2 by chance
    uniform_scaling  (sum s_i M_ii)^2 / (sum s_i^2 sum M_ii^2)      1 if one factor changed all values; 1/k by chance

Three nulls, each of the update's norm: `gaussian` (independent entries), `row_column` (with the update's own row and column
norms) and `directions` (its own singular values in random directions: for a LoRA update, a random one of its rank). A p
value is that of a new draw from the null's normal distribution, whose mean and width come from the draws (Student's t);
the largest of the three counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibtrain.spectral.split import Bases

NULLS = ("gaussian", "row_column", "directions")
TESTS = ("scale", "shared_rotation", "uniform_scaling")
LEVEL = 0.05
"""Share of false discoveries (Benjamini, Hochberg 1995)."""


@dataclass(frozen=True, slots=True)
class Null:
    """A statistic under one null: mean of its draws, the range that holds 95 % of new draws, and the p value."""

    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, slots=True)
class Test:
    """A statistic, its nulls by name and the largest of their p values. `value` is NaN where there is nothing to test."""

    value: float
    nulls: Mapping[str, Null]
    p: float


def statistics(inner: Tensor, values: Tensor) -> dict[str, float]:
    """The three statistics of `inner` = M (k, k) for singular `values` (k,) of W0; for uniform_scaling its signed root."""
    diagonal, square = inner.diagonal(), values.square().sum()
    along = (diagonal * values).sum()
    everything, spectrum = inner.square().sum(), diagonal.square().sum()
    across = everything - spectrum
    # |skew|^2 = (|off|^2 - <off, off^T>) / 2
    mirrored = (inner * inner.mT).sum() - spectrum
    return {
        "scale": float(along / square),
        "shared_rotation": float((across - mirrored) / 2 / across) if float(across) > 0 else math.nan,
        "uniform_scaling": float(along / (square * spectrum).sqrt()) if float(spectrum) > 0 else math.nan,
    }


@torch.no_grad()
def null_tests(first: Bases, change: Tensor, inner: Tensor, seeds: int, generator: torch.Generator) -> dict[str, Test]:
    """Test `change` = W - W0 (m, n), upright, with `inner` = U0^T (W - W0) V0, against `seeds` draws of each null."""
    found = statistics(inner, first.values)
    draws: dict[str, list[dict[str, float]]] = {name: [] for name in NULLS}
    rows, columns = change.square().sum(1).sqrt(), change.square().sum(0).sqrt()
    norm = rows.norm()
    # A draw is noise: float32 is enough for it.
    bases = Bases(first.left.float(), first.values.float(), first.right.float(), first.error)
    for _ in range(seeds if float(norm) > 0 else 0):
        drawn = _draw(bases, inner.float(), rows.float(), columns.float(), norm.float(), generator)
        for name, inside in drawn.items():
            draws[name].append(statistics(inside, bases.values))
    return {
        name: _test(name, found[name], {null: [one[name] for one in draws[null]] for null in NULLS}) for name in TESTS
    }


def _draw(
    first: Bases, inner: Tensor, rows: Tensor, columns: Tensor, norm: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """One update of each null, seen in the bases of W0: (k, k)."""
    m, n, k = first.left.shape[0], first.right.shape[0], first.rank

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=inner.device)

    # Independent normal entries stay so in any orthonormal bases: no need to draw what lies outside.
    gaussian = normal(k, k) * (norm / math.sqrt(m * n))
    matched = normal(m, n).mul_(rows[:, None]).mul_(columns / norm)
    turned = _rotation(normal(k, k)) @ inner @ _rotation(normal(k, k))
    return {"gaussian": gaussian, "row_column": first.inside(matched), "directions": turned}


def _rotation(normal: Tensor) -> Tensor:
    """Uniform over the orthogonal group: QR with the signs of Mezzadri (2007, arXiv math-ph/0609050)."""
    q, r = torch.linalg.qr(normal)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _test(name: str, value: float, draws: Mapping[str, Sequence[float]]) -> Test:
    tail = "lower" if name == "shared_rotation" else "both"
    nulls = {null: against(value, found, tail) for null, found in draws.items() if len(found) > 1}
    nulls = {} if math.isnan(value) else {null: one for null, one in nulls.items() if not math.isnan(one.p)}
    p = max((one.p for one in nulls.values()), default=math.nan)
    if name == "uniform_scaling":  # shown as a share; tested with its sign, under which a draw is close to normal
        nulls = {null: _squared(one, draws[null]) for null, one in nulls.items()}
        value = value**2
    return Test(value, nulls, p)


def _squared(null: Null, draws: Sequence[float]) -> Null:
    reach = min(1.0, max(abs(null.low), abs(null.high)))
    return Null(math.fsum(one**2 for one in draws) / len(draws), 0.0, reach**2, null.p)


def against(value: float, draws: Sequence[float], tail: str) -> Null:
    """`value` against n `draws` of a normal null: t = (value - mean) / (sd sqrt(1 + 1/n)) with n - 1 degrees of freedom.

    `tail` is "lower", "upper" or "both".
    """
    n = len(draws)
    mean = math.fsum(draws) / n
    width = math.sqrt(math.fsum((one - mean) ** 2 for one in draws) / (n - 1) * (1 + 1 / n))
    if width == 0.0:
        return Null(mean, mean, mean, math.nan)
    t = (value - mean) / width
    upper = student_tail(t, n - 1)
    p = {"upper": upper, "lower": 1.0 - upper if t > 0 else student_tail(-t, n - 1)}.get(
        tail, min(1.0, 2 * student_tail(abs(t), n - 1))
    )
    reach = width * _quantile(n - 1)
    return Null(mean, mean - reach, mean + reach, p)


def student_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's t with a whole number of degrees of freedom (Abramowitz, Stegun 26.7.3 and 26.7.4)."""
    if t < 0:
        return 1.0 - student_tail(-t, freedom)
    # The far tail by its own series: 1 - A would be rounding there.
    if t * t > freedom:
        return _far_tail(t, freedom)
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = term if not odd or freedom > 1 else 0.0
    for i in range(2 if odd else 1, freedom - 1, 2):
        term *= cosine**2 * i / (i + 1)
        total += term
    within = (2 / math.pi * (angle + sine * total)) if odd else sine * total
    return max(0.0, (1.0 - within) / 2)


def _far_tail(t: float, freedom: int) -> float:
    """x^v / (v B(v/2, 1/2)) (1 + ...) with x^2 = v / (v + t^2): the incomplete beta series I_{x^2}(v/2, 1/2) / 2."""
    x = freedom / (freedom + t * t)
    a = freedom / 2
    log_beta = math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5)
    term, total = 1.0, 1.0 / a
    for i in range(1, 80):
        term *= (i - 0.5) / i * x
        total += term / (a + i)
    return 0.5 * math.exp(a * math.log(x) - log_beta) * total


def _quantile(freedom: int) -> float:
    """T with P(|T| > t) = .05, by halving."""
    low, high = 0.0, 700.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > 0.025 else (low, middle)
    return high


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg q values of `p_values`, in their order; NaN, which is not counted as a test, stays."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    result, least = [math.nan] * len(p_values), 1.0
    for place in range(len(tested), 0, -1):
        p, i = tested[place - 1]
        least = min(least, p * len(tested) / place)
        result[i] = least
    return result
