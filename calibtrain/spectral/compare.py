"""What changed between a weight matrix W0 and W, measured and held against chance. Needs torch alone."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.spectral import drift as drifts
from calibtrain.spectral.consistency import consistency, null_consistency
from calibtrain.spectral.null import LEVEL, TESTS, Test, adjusted, against, null_tests
from calibtrain.spectral.polar import polar_by_products
from calibtrain.spectral.split import (
    Bases,
    Split,
    bases_of,
    mean_angle,
    nearest_to_identity,
    split,
    subspace_angle,
    upright,
)

FULL_SIDE = 2048
"""Matrices whose shorter side is at most this get a full SVD unless a rank is asked for."""
TOP = 256
"""Singular triples of a larger one."""
SUBSPACES = (1, 8, 64)
CONSISTENCY_DRAWS = 3
"""At most so many draws of the consistency's null, whose spread is small and which no test uses."""
SHOWN = 64
"""Singular values kept of a spectrum, evenly spread."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How matrices are compared."""

    null_seeds: int = 5  # draws of each null
    rank: int | None = None  # singular triples; None: all of a matrix up to FULL_SIDE wide, else TOP
    seed: int = 0  # of the nulls
    level: float = LEVEL  # share of false discoveries

    def __post_init__(self) -> None:
        if self.null_seeds != 0 and self.null_seeds < 2:
            raise UserError(f"null seeds: {self.null_seeds} draw tells no spread; give 0 (no tests) or at least 2")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank: {self.rank} is not a number of singular values")
        if not 0 < self.level < 1:
            raise UserError(f"level: {self.level} is not between 0 and 1")


def compare(
    base: Tensor | Mapping[str, Tensor], tuned: Tensor | Mapping[str, Tensor], settings: Settings | None = None
) -> dict[str, Any]:
    """Compare two matrices (out, in), or the matrices of two state dicts by name.

    Two tensors: the row of `compare_matrix`. Two mappings: {"matrices": [row, ...], "left_out": [{"name", "why"}]} with
    q values over all matrices. Raises UserError where shapes differ or a weight is not finite.
    """
    settings = settings or Settings()
    if isinstance(base, Tensor) and isinstance(tuned, Tensor):
        row = compare_matrix("matrix", base, tuned, settings)
        judge([row], settings.level)
        return row
    if isinstance(base, Tensor) or isinstance(tuned, Tensor):
        raise UserError("compare takes two matrices or two state dicts, not one of each")
    rows, left_out = [], []
    for name in [*base, *(name for name in tuned if name not in base)]:
        if name not in tuned or name not in base:
            left_out.append({"name": name, "why": f"only in the {'base' if name in base else 'tuned'} weights"})
        elif base[name].ndim != 2 or not base[name].is_floating_point():
            left_out.append({"name": name, "why": "no matrix of floating point numbers"})
        else:
            rows.append(compare_matrix(name, base[name], tuned[name], settings))
    if not rows:
        raise UserError("the two state dicts share no matrix")
    judge(rows, settings.level)
    return {"matrices": rows, "left_out": left_out}


@torch.no_grad()
def compare_matrix(
    name: str, base: Tensor, tuned: Tensor, settings: Settings, factors: tuple[Tensor, Tensor] | None = None
) -> dict[str, Any]:
    """One matrix W0 -> W (out, in) as a JSON-able row (docs/spectra.md tells each number); tests still lack their q.

    Arithmetic is float64 for a full SVD, float32 for a top-k one. `factors` (out, r), (r, in) give W - W0 exactly, as an
    adapter holds it. `name` seeds the nulls, so that a row does not depend on the others.
    """
    _check(name, base, tuned)
    rank = settings.rank or (None if min(base.shape) <= FULL_SIDE else TOP)
    top = rank is not None and rank < min(base.shape)
    dtype = torch.float32 if top else torch.float64
    flipped = base.shape[0] < base.shape[1]
    start = upright(base.to(dtype))
    # Subtracted before rounding to float32, so that a small change keeps its digits.
    change = upright((tuned.double() - base.double()).to(dtype) if factors is None else _product(factors).to(dtype))
    end = start + change
    generator = torch.Generator(device=base.device).manual_seed(settings.seed * 1_000_003 + zlib.crc32(name.encode()))
    first, second = bases_of(start, rank, generator), bases_of(end, rank, generator)
    if not float(first.values[0]) > 0:
        raise UserError(
            f"{name} is 0 everywhere in the base model, and nothing relative to it can be told; leave it out"
        )
    inner = first.inside(change)
    overlaps = first.left.mT @ second.left, first.right.mT @ second.right
    total = float(change.square().sum())
    fit = split(first, inner, total)
    row: dict[str, Any] = {
        "name": name,
        "shape": list(base.shape),
        "dtype": str(tuned.dtype).removeprefix("torch."),
        "rank": first.rank,
        "basis_error": max(first.error, second.error),
        "squared_norm": float(start.square().sum()),
        "relative_drift": math.sqrt(total) / float(start.norm()),
        "rounding_share": _rounding(tuned) / total if total > 0 and factors is None else 0.0,
        "update_rank": _update_rank(change, factors),
        "scale": _scale(first, second, fit),
        "spectrum": _spectrum(first, second, total),
        "spectral_norm_ratio": float(second.values[0] / first.values[0]),
        "stable_rank": [
            float(one.square().sum()) / float(s.values[0]) ** 2 for one, s in ((start, first), (end, second))
        ],
        "angles": _angles(first, second, fit, overlaps, flipped=flipped),
        "consistency": _consistency(first, overlaps, start, math.sqrt(total), settings.null_seeds, generator),
        "drift": _drift(start, end, first, single=tuned.dtype != torch.float64, flipped=flipped),
        "shares": {
            "scale": fit.scale_share,
            "shared_rotation": fit.rotation_share,
            "rest": fit.rest_share,
            "of_rest": {
                "spectrum": fit.spectrum_share,
                "unshared_rotation": fit.unshared_share,
                "outside": fit.outside_share,
            },
        },
    }
    tests = null_tests(first, change, inner, settings.null_seeds, generator)
    row["tests"] = {key: _told(test) for key, test in tests.items()}
    return row


def judge(rows: Iterable[dict[str, Any]], level: float) -> None:
    """Add q (Benjamini-Hochberg over the rows) and `beyond` to the tests of `rows`, and name each row's kind."""
    rows = list(rows)
    for name in TESTS:
        for row, q in zip(rows, adjusted([row["tests"][name]["p"] for row in rows]), strict=True):
            row["tests"][name] |= {"q": q, "beyond": q <= level}
    for row in rows:
        row["kind"] = kind_of(row)


def kind_of(row: Mapping[str, Any]) -> str:
    """What one change is, in a word: unchanged, scale, shared rotation, independent rotations, low rank, noise or mixed.

    A name is given where one part is most of the change; what noise could be is noise.
    """
    shares, tests = row["shares"], row["tests"]
    if row["relative_drift"] == 0:
        return "unchanged"
    if shares["scale"] > 0.5:
        return "scale"
    inside = shares["shared_rotation"] + shares["of_rest"]["unshared_rotation"]
    turned_apart = shares["of_rest"]["unshared_rotation"] / inside if inside > 0 else 1.0
    if shares["shared_rotation"] > 0.5 and turned_apart < 0.25 and tests["shared_rotation"]["beyond"]:
        return "shared rotation"
    # Noise changes singular values by 1/(longer side) of its energy; rotations by nothing.
    if row["spectrum"]["change"] < 0.25 / max(row["shape"]):
        return "independent rotations"
    if row["update_rank"] <= min(row["shape"]) / 4:
        return "low rank"
    return "mixed" if any(test["beyond"] for test in tests.values()) else "noise"


def _check(name: str, base: Tensor, tuned: Tensor) -> None:
    if base.shape != tuned.shape or base.ndim != 2 or not base.numel():
        raise UserError(
            f"{name}: {tuple(base.shape)} against {tuple(tuned.shape)}; two matrices of one shape are compared"
        )
    for side, one in (("base", base), ("tuned", tuned)):
        if not bool(torch.isfinite(one).all()):
            raise UserError(f"{name}: the {side} weights hold NaN or infinite numbers")


def _product(factors: tuple[Tensor, Tensor]) -> Tensor:
    return factors[0].double() @ factors[1].double()


def _rounding(tuned: Tensor) -> float:
    """|.|^2 of rounding to the stored dtype, at most: a twelfth of the squared spacing at each number, moved or not."""
    exponent = torch.frexp(tuned.float()).exponent.double() - 1
    spacing = torch.exp2(exponent + math.log2(torch.finfo(tuned.dtype).eps))
    return float((spacing.square() * (tuned != 0)).sum()) / 12


def _update_rank(change: Tensor, factors: tuple[Tensor, Tensor] | None) -> int:
    """Least rank that holds 99 % of |W - W0|^2."""
    if factors is not None:  # |B A| has the singular values of R_B R_A^T
        inner = torch.linalg.qr(factors[0].double()).R @ torch.linalg.qr(factors[1].double().mT).R.mT
        energies = torch.linalg.svdvals(inner).square()
    else:
        single = change.float()
        energies = torch.linalg.eigvalsh(single.mT @ single).flip(0).clamp(min=0)
    total = float(energies.sum())
    if total == 0:
        return 0
    return int((energies.cumsum(0) < 0.99 * total).sum()) + 1


def _scale(first: Bases, second: Bases, fit: Split) -> dict[str, float]:
    """Level, spread and slope of s_i / s0_i. Directions with no singular value to speak of are left out."""
    seen = first.values > 1e-7 * first.values[0]
    before = first.values[seen].log()
    ratio = second.values[seen].clamp(min=torch.finfo(second.values.dtype).tiny).log() - before
    quartiles = torch.quantile(ratio, torch.tensor([0.25, 0.5, 0.75], dtype=ratio.dtype, device=ratio.device))
    centred = before - before.mean()
    slope = float((centred * ratio).sum() / centred.square().sum()) if float(centred.abs().max()) > 1e-9 else 0.0
    return {
        "alpha": fit.scale,
        "median": math.exp(float(quartiles[1])),
        "spread": float(quartiles[2] - quartiles[0]),
        "slope": slope,
    }


def _spectrum(first: Bases, second: Bases, total: float) -> dict[str, Any]:
    """Some singular values before and after; `change`: their change beyond one factor, as a share of |W - W0|^2."""
    factor = (first.values * second.values).sum() / first.values.square().sum()
    change = float((second.values - factor * first.values).square().sum())
    count = min(SHOWN, first.rank)
    index = torch.linspace(0, first.rank - 1, count, dtype=torch.float64).round().long()
    return {
        "change": change / total if total > 0 else 0.0,
        "index": index.tolist(),
        "before": first.values[index.to(first.values.device)].tolist(),
        "after": second.values[index.to(second.values.device)].tolist(),
    }


def _angles(
    first: Bases, second: Bases, fit: Split, overlaps: tuple[Tensor, Tensor], *, flipped: bool
) -> dict[str, Any]:
    """Angles in degrees; of vectors weighted by s0^2, within repeated values as small as they can be."""
    weights = first.values.square()
    sides = {
        "left": mean_angle(nearest_to_identity(overlaps[0], first.values), weights),
        "right": mean_angle(nearest_to_identity(overlaps[1], first.values), weights),
    }
    subspaces = [
        {
            "k": k,
            "left": subspace_angle(first.left[:, :k], second.left[:, :k]),
            "right": subspace_angle(first.right[:, :k], second.right[:, :k]),
        }
        for k in SUBSPACES
        if k <= first.rank
    ]
    if flipped:
        sides = {"left": sides["right"], "right": sides["left"]}
        subspaces = [{"k": one["k"], "left": one["right"], "right": one["left"]} for one in subspaces]
    return {**sides, "shared": mean_angle(fit.rotation, weights), "subspaces": subspaces}


def _consistency(
    first: Bases, overlaps: tuple[Tensor, Tensor], start: Tensor, norm: float, seeds: int, generator: torch.Generator
) -> dict[str, float]:
    nf = consistency(*overlaps)
    draws = null_consistency(first, norm, min(seeds, CONSISTENCY_DRAWS), generator, start)
    if len(draws) < 2:
        return {"nf": nf, "null": math.nan, "null_low": math.nan, "null_high": math.nan}
    null = against(nf, draws, "lower")
    return {"nf": nf, "null": null.mean, "null_low": null.low, "null_high": null.high}


def _drift(start: Tensor, end: Tensor, first: Bases, *, single: bool, flipped: bool) -> dict[str, float]:
    """The weight penalties' values, by their own functions: in float32 where both matrices are stored in it or less."""
    polar = first.left @ first.right.mT if first.full else polar_by_products(start)[0]
    squared = float(start.square().sum())
    w0, w, polar = (one.mT if flipped else one for one in (start, end, polar))
    if single:
        w0, w, polar = w0.float(), w.float(), polar.float()
    return {
        "row_gram_drift": float(drifts.row_gram_drift(w, w0)),
        "column_gram_drift": float(drifts.column_gram_drift(w, w0)),
        "polar_drift": float(drifts.polar_drift(w, polar, squared)),
        "row_stretch": float(drifts.row_stretch(w, w0)),
        "column_stretch": float(drifts.column_stretch(w, w0)),
    }


def _told(test: Test) -> dict[str, Any]:
    nulls = {name: {"mean": n.mean, "low": n.low, "high": n.high, "p": n.p} for name, n in test.nulls.items()}
    return {"value": test.value, "nulls": nulls, "p": test.p}
