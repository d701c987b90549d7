"""What a change W0 -> W is made of: one factor on all singular values, one rotation of both singular bases, and the rest.

He and Cao (2025, arXiv 2509.17866) describe post-training as W ~ a (U0 Q) S0 (V0 Q)^T with one orthogonal Q a matrix. In
the bases of W0, with B = U0^T W V0, the best such fit has a closed form: |B - a Q S0 Q^T| is least where the columns of Q
are the eigenvectors of sym(B), largest first, and a = <eigenvalues of sym(B), S0> / |S0|^2. What it leaves are a change of
the spectrum beyond one factor, the skew part of B (left and right vectors turned apart) and what leaves the bases of W0.

All matrices here stand upright (rows >= columns): see `upright`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.spectral.polar import singular_triples, top_singular_by_products

PARTS = ("scale", "rotation", "residual")
TIE = 1e-9
"""Singular values closer than this share of the largest are one value: their vectors have no direction of their own."""


@dataclass(frozen=True, slots=True)
class Bases:
    """Singular triples of a matrix (m, n): `left` (m, k), `values` (k,) descending, `right` (n, k)."""

    left: Tensor
    values: Tensor
    right: Tensor
    error: float  # |W^T U - V S|_F / |S|_F; 0 for a full SVD

    @property
    def rank(self) -> int:
        """K."""
        return self.values.shape[0]

    @property
    def full(self) -> bool:
        """Whether every direction of the shorter side is in."""
        return self.rank == min(self.left.shape[0], self.right.shape[0])

    def inside(self, matrix: Tensor) -> Tensor:
        """U^T `matrix` V. (m, n) to (k, k)."""
        return self.left.mT @ matrix @ self.right

    def outside(self, inner: Tensor) -> Tensor:
        """U `inner` V^T. (k, k) to (m, n)."""
        return self.left @ inner @ self.right.mT


@dataclass(frozen=True, slots=True)
class Split:
    """The best fit a Q S0 Q^T of a change seen in the bases of W0, and the shares of |W - W0|_F^2."""

    scale: float  # a
    rotation: Tensor  # Q (k, k), the nearest to the identity where singular values repeat
    spectrum: Tensor  # eigenvalues of sym(B) (k,), descending: what S0 became
    scale_share: float  # explained by a W0 alone
    rotation_share: float  # explained by the fit beyond that
    spectrum_share: float  # of the rest: singular values changed beyond one factor
    unshared_share: float  # of the rest: left and right vectors turned apart
    outside_share: float  # of the rest: outside the bases of W0

    @property
    def rest_share(self) -> float:
        """1 - scale_share - rotation_share."""
        return self.spectrum_share + self.unshared_share + self.outside_share


def upright(matrix: Tensor) -> Tensor:
    """`matrix` or its transpose: rows >= columns."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


@torch.no_grad()
def bases_of(matrix: Tensor, rank: int | None = None, generator: torch.Generator | None = None) -> Bases:
    """All singular triples of an upright matrix, or the `rank` largest by products alone (`generator` draws the probes)."""
    if rank is None or rank >= min(matrix.shape):
        return Bases(*singular_triples(matrix), error=0.0)
    generator = generator or torch.Generator(device=matrix.device).manual_seed(0)
    return Bases(*top_singular_by_products(matrix, rank, generator))


@torch.no_grad()
def split(first: Bases, inner: Tensor, total: float) -> Split:
    """Fit the structure to `inner` = U0^T (W - W0) V0 (k, k); `total` is |W - W0|_F^2, inside the bases or not.

    The shares add up to 1 and none is negative: each is the drop of the squared error that the part brings.
    """
    s = first.values
    square = s.square().sum()
    turned, vectors = torch.linalg.eigh(torch.diag(s) + (inner + inner.mT) / 2)
    turned, vectors = turned.flip(0), vectors.flip(1)
    scale = float(((turned * s).sum() / square).clamp(min=0.0))
    within = float(inner.square().sum())
    # |D|^2 - |D - (a - 1) W0|^2 at its best a, in the bases.
    by_scale = float((inner.diagonal() * s).sum() ** 2 / square)
    unshared = float(((inner - inner.mT) / 2).square().sum())
    spectrum = float((turned - scale * s).square().sum())
    by_rotation = max(0.0, within - by_scale - unshared - spectrum)
    parts = [by_scale, by_rotation, spectrum, unshared, max(0.0, total - within)]
    shares = [one / total if total > 0 else 0.0 for one in parts]
    return Split(scale, nearest_to_identity(vectors, s), turned, *shares)


def nearest_to_identity(vectors: Tensor, values: Tensor) -> Tensor:
    """Columns (k, k) with the sign, and within repeated `values` (k,) the basis, that lie nearest to the identity."""
    signs = torch.where(vectors.diagonal() < 0, -1.0, 1.0).to(vectors.dtype)
    vectors = vectors * signs
    for start, end in _ties(values):
        block = vectors[:, start:end]
        left, _, right = torch.linalg.svd(block[start:end])
        vectors[:, start:end] = block @ (right.mT @ left.mT)
    return vectors


def _ties(values: Tensor) -> list[tuple[int, int]]:
    """[start, end) of each run of repeated values."""
    if values.numel() < 2:
        return []
    same = ((values[:-1] - values[1:]) <= TIE * values[0]).tolist()
    runs, start = [], None
    for i, one in enumerate([*same, False]):
        if one and start is None:
            start = i
        if not one and start is not None:
            runs.append((start, i + 1))
            start = None
    return runs


def mean_angle(rotation: Tensor, weights: Tensor) -> float:
    """Root mean square angle in degrees between each axis and what `rotation` (k, k) makes of it, by `weights` (k,)."""
    angles = torch.rad2deg(torch.acos(rotation.diagonal().clamp(-1.0, 1.0)))
    return math.sqrt(float((angles.square() * weights).sum() / weights.sum()))


def subspace_angle(first: Tensor, second: Tensor) -> float:
    """Largest principal angle in degrees between the spans of two orthonormal sets of columns (m, c).

    Small ones by their sine (Björck, Golub 1973): a cosine near 1 has lost them.
    """
    overlap = first.mT @ second
    cosine = min(1.0, float(torch.linalg.svdvals(overlap)[-1]))
    if cosine < 0.7:
        return math.degrees(math.acos(cosine))
    return math.degrees(math.asin(min(1.0, float(torch.linalg.matrix_norm(second - first @ overlap, 2)))))


@torch.no_grad()
def without(
    part: str, initial: Tensor, weight: Tensor, *, random_rotation: int | None = None, generator_key: int = 0
) -> Tensor:
    """W with one part of its change from W0 undone: an intervention on the weights.

    `part` is "scale" (a becomes 1), "rotation" (Q becomes I) or "residual" (only a (U0 Q) S0 (V0 Q)^T is kept).
    `random_rotation` is a seed: instead of no rotation, every plane (i, j) turns by as much as before, in a random
    direction. `initial`, `weight` (out, in) floating; returns float64 (out, in). Takes a full SVD of both sides' size.
    """
    check_part(part, random_rotation)
    start, end = upright(initial.double()), upright(weight.double())
    first = bases_of(start)
    inner = first.inside(end - start)
    fit = split(first, inner, float((end - start).square().sum()))
    s = torch.diag(first.values)
    turned = (fit.rotation * first.values) @ fit.rotation.mT
    if part == "scale":
        result = end - first.outside((fit.scale - 1.0) * turned)
    elif part == "residual":
        result = start + first.outside(fit.scale * turned - s)
    else:
        place = s
        if random_rotation is not None:
            place = _same_angles(first.values, inner, random_rotation, generator_key)
        result = end - first.outside(fit.scale * (turned - place))
    return result if initial.shape[0] >= initial.shape[1] else result.mT


def check_part(part: str, random_rotation: int | None) -> None:
    """Raise UserError for a part that is none, and for a random rotation in another part's place."""
    if part not in PARTS:
        raise UserError(f"unknown part {part!r}; there are {', '.join(PARTS)}")
    if random_rotation is not None and part != "rotation":
        raise UserError("a random rotation takes the rotation's place: it goes with the part `rotation` alone")


def _same_angles(values: Tensor, inner: Tensor, seed: int, key: int) -> Tensor:
    """Q' S Q'^T whose planes turn by the angles of Q, to first order, each with a random sign."""
    generator = torch.Generator(device="cpu").manual_seed(seed * 1_000_003 + key)
    k = values.shape[0]
    signs = torch.randint(0, 2, (k, k), generator=generator).to(inner).mul_(2).sub_(1).triu(1)
    symmetric = (inner + inner.mT) / 2
    turned = torch.diag(values) + torch.diag(symmetric.diagonal()) + symmetric * (signs + signs.mT)
    vectors = torch.linalg.eigh(turned).eigenvectors.flip(1)
    return (vectors * values) @ vectors.mT
