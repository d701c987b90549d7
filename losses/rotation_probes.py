"""Unbiased estimators of the rotation penalties with gradients by hand, on whole matrices or on flat shards of them.

Every penalty but the angle budget is |F(W)|_F^2 of a matrix F, and E|F z|^2 = |F|_F^2 for probes z with independent
entries of mean 0 and variance 1 (signs here: never noisier than Gaussians). F z takes a few products of W with vectors, and
the gradient of |F z|^2 has rank two, so that neither the Gram matrix nor a graph through W is ever made. With the columns
of the identity as probes (`identity_probes`) the same code is exact.

Products with a matrix that is cut into contiguous pieces of its row-major flat form (as ZeRO shards are) are sums over
the pieces: K (out + in) numbers a product are added up over ranks, and each rank holds the gradient of its own piece.
Each estimator is a generator: it yields a tensor that wants adding up, and is sent the sum. So the sums of many matrices
share one all-reduce (`run_together`), and a single process needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from calibtrain.errors import UserError

T = TypeVar("T")
Sums = Generator[Tensor, Tensor, "Estimate"]


@dataclass(frozen=True, slots=True)
class Shard:
    """A contiguous piece of a row-major (rows, columns) matrix: `flat` (L,) are its elements from `start` on.

    Only whole rows are kept together; a first and a last row that are cut are pieces of their own.
    """

    shape: tuple[int, int]
    start: int
    flat: Tensor
    transposed: bool = False

    @classmethod
    def whole(cls, matrix: Tensor) -> Shard:
        """All of `matrix` (rows, columns), contiguous."""
        return cls((matrix.shape[0], matrix.shape[1]), 0, matrix.view(-1))

    @property
    def T(self) -> Shard:
        """The transpose: the same elements, seen from the other side."""
        return Shard(self.shape, self.start, self.flat, not self.transposed)

    def like(self, flat: Tensor) -> Shard:
        """The same piece of another matrix of this shape."""
        return Shard(self.shape, self.start, flat, self.transposed)

    def pieces(self) -> list[tuple[int, int, Tensor]]:
        """(first row, first column, view (rows, columns)) of at most three rectangles, in the stored orientation."""
        columns, begin, end = self.shape[1], self.start, self.start + self.flat.numel()
        cuts = [begin, min(end, -(-begin // columns) * columns)]
        cuts += [max(cuts[1], end // columns * columns), end]
        found = []
        for first, last in pairwise(cuts):
            if last > first:
                width = min(columns, last - first)
                found.append(
                    (first // columns, first % columns, self.flat[first - begin : last - begin].view(-1, width))
                )
        return found

    def apply(self, vectors: Tensor) -> Tensor:
        """This piece's part of matrix @ `vectors` (columns, K). Returns (rows, K) in the dtype of `vectors`."""
        return self._times(vectors, self.transposed)

    def apply_transposed(self, vectors: Tensor) -> Tensor:
        """This piece's part of matrix.T @ `vectors` (rows, K). Returns (columns, K)."""
        return self._times(vectors, not self.transposed)

    def _times(self, vectors: Tensor, turned: bool) -> Tensor:
        result = vectors.new_zeros(self.shape[1 if turned else 0], vectors.shape[1])
        for row, column, view in self.pieces():
            rows, columns = slice(row, row + view.shape[0]), slice(column, column + view.shape[1])
            # The few vectors stand on the left: CPU libraries are several times slower the other way round.
            if turned:
                result[columns] += (vectors[rows].mT @ view.to(vectors.dtype)).mT
            else:
                result[rows] += (vectors[columns].mT @ view.to(vectors.dtype).mT).mT
        return result

    def add_product(self, left: Tensor, right: Tensor, factor: float | Tensor) -> None:
        """Add this piece of factor * `left` (rows, J) @ `right`.T (J, columns) in place."""
        if self.transposed:
            left, right = right, left
        left = left * factor
        for row, column, view in self.pieces():
            view.addmm_(left[row : row + view.shape[0]], right[column : column + view.shape[1]].mT)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A penalty's value and its gradient, left @ right.T + drift_factor * (W - W0), the same on every rank."""

    value: Tensor  # () in the dtype of the probes
    left: Tensor  # (out, J)
    right: Tensor  # (in, J)
    drift_factor: Tensor | float = 0.0
    squared_drift: Tensor | float = 0.0  # |W - W0|_F^2, where drift_factor is not 0

    def squared_gradient(self) -> Tensor:
        """|gradient|_F^2, from the factors alone."""
        product = ((self.left.mT @ self.left) * (self.right.mT @ self.right)).sum()
        return product + torch.as_tensor(self.drift_factor) ** 2 * self.squared_drift


def sign_probes(size: int, count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent random signs. (size, count), on the generator's device."""
    shape = (size, count)
    return torch.randint(0, 2, shape, generator=generator, device=generator.device).to(dtype).mul_(2).sub_(1)


def identity_probes(size: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """Probes that make the estimators exact: the identity, scaled as if its columns were drawn. (size, size)."""
    return torch.eye(size, dtype=dtype, device=device).mul_(size**0.5)


def column_gram_probes(drift: Shard, initial: Shard, probes: Tensor, norm: float, scale: float | None = 1.0) -> Sums:
    """Estimate `column_gram_drift`. `drift` is W - W0, `probes` (in, K), `norm` |W0^T W0|_F^2.

    With E = G - a G0 and g = E z: |g|^2, of gradient 2 [(W z) g^T + (W g) z^T] per probe. `scale` None fits a for each half
    of the probes on the other half: independent of the probes it is used with, so the estimate is unbiased given a, and 0
    exactly where the penalty is. With identity probes a is the best one.
    """
    count = probes.shape[1]
    first, moved = (yield torch.cat([initial.apply(probes), drift.apply(probes)], 1)).split(count, 1)
    now = first + moved
    # E z for a = 1 is W0^T (D z) + D^T (W z): no difference of large numbers, which fp32 would not survive.
    part = initial.apply_transposed(torch.cat([moved, first], 1))
    part[:, :count] += drift.apply_transposed(now)
    change, start = (yield part).split(count, 1)
    if scale is None:
        residual = change - _excess_scale(change, start, exact=count == probes.shape[0]) * start
    else:
        residual = change - (scale - 1.0) * start
    image = yield initial.apply(residual) + drift.apply(residual)
    factor = 2.0 / (count * norm)
    value = residual.square().sum() / (count * norm)
    return Estimate(value, torch.cat([now, image], 1) * factor, torch.cat([residual, probes], 1))


def _excess_scale(change: Tensor, start: Tensor, exact: bool) -> Tensor:
    """The best a minus 1, per probe. (K,)."""
    inner, norm = (change * start).sum(0), start.square().sum(0)
    count = inner.shape[0]
    if exact:
        return (inner.sum() / norm.sum()).expand(count)
    if count < 2:
        raise UserError("a free scale takes at least 2 probes: it is fitted on one half and used with the other")
    half = count // 2
    ratios = [inner[half:].sum() / norm[half:].sum(), inner[:half].sum() / norm[:half].sum()]
    return torch.cat([ratios[0].expand(half), ratios[1].expand(count - half)])


def polar_probes(drift: Shard, polar: Shard, probes: Tensor, norm: float) -> Sums:
    """Estimate `polar_drift` for out >= in (else give it the transposes). `norm` is |W0|_F^2, `probes` (in, K).

    With S = skew(O0^T W), s = S z and c = (I - O0 O0^T) W z: |s|^2 + |c|^2, of gradient (O0 s + 2 c) z^T - (O0 z) s^T.
    S and c are 0 for W0, so W - W0 stands for W.
    """
    count = probes.shape[1]
    image, turned = (yield torch.cat([drift.apply(probes), polar.apply(probes)], 1)).split(count, 1)
    part = torch.cat([polar.apply_transposed(image), drift.apply_transposed(turned)], 1)
    inner, other = (yield part).split(count, 1)
    skew = (inner - other) / 2
    lifted, kept = (yield polar.apply(torch.cat([skew, inner], 1))).split(count, 1)
    outside = image - kept
    value = (skew.square().sum() + outside.square().sum()) / (count * norm)
    left = torch.cat([lifted + 2 * outside, -turned], 1) / (count * norm)
    return Estimate(value, left, torch.cat([probes, skew], 1))


def column_stretch_probes(drift: Shard, initial: Shard, probes: Tensor, norm: float) -> Sums:
    """Estimate `column_stretch`. `drift` is W - W0, `probes` (in, K), `norm` |W0^T W0|_F^2.

    With r = sym(W0^T D) z: |r|^2, of gradient (W0 r) z^T + (W0 z) r^T.
    """
    count = probes.shape[1]
    moved, first = (yield torch.cat([drift.apply(probes), initial.apply(probes)], 1)).split(count, 1)
    stretch = yield (initial.apply_transposed(moved) + drift.apply_transposed(first)) / 2
    image = yield initial.apply(stretch)
    factor = 1.0 / (count * norm)
    value = stretch.square().sum() * factor
    return Estimate(value, torch.cat([image, first], 1) * factor, torch.cat([probes, stretch], 1))


def angle_budget_step(drift: Shard, norm: float, budget: float) -> Sums:
    """`angle_budget`, exactly: it is element-wise and takes no probes. `norm` is |W0|_F^2."""
    squared = yield drift.flat.square().sum().reshape(1, 1)
    squared = squared.sum()
    excess = squared / norm - budget**2
    rows, columns = drift.shape
    factor = (excess > 0).to(excess.dtype) * (2.0 / norm)
    empty = drift.flat.new_zeros
    return Estimate(excess.clamp(min=0), empty(rows, 0), empty(columns, 0), factor, squared)


def turned(sums: Sums) -> Sums:
    """The estimate of a transposed matrix, told for the matrix itself."""
    found = yield from sums
    return Estimate(found.value, found.right, found.left, found.drift_factor, found.squared_drift)


def run_together(
    estimators: Sequence[Generator[Tensor, Tensor, T]], reduce: Callable[[Tensor], None] | None = None
) -> list[T]:
    """Run estimators side by side; `reduce` adds a flat tensor up over ranks in place, once a phase for all of them."""
    finished: list[Any] = [None] * len(estimators)
    waiting = {i: next(one) for i, one in enumerate(estimators)}
    while waiting:
        if reduce is not None:
            flat = torch.cat([part.reshape(-1) for part in waiting.values()])
            reduce(flat)
            pieces = flat.split([part.numel() for part in waiting.values()])
            waiting = {i: piece.view(part.shape) for (i, part), piece in zip(waiting.items(), pieces, strict=True)}
        sent, waiting = waiting, {}
        for i, summed in sent.items():
            try:
                waiting[i] = estimators[i].send(summed)
            except StopIteration as stopped:
                finished[i] = stopped.value
    return finished


def estimator(
    name: str,
    weight: Shard,
    initial: Shard,
    probes: Tensor | None,
    norm: float,
    *,
    polar: Shard | None = None,
    scale: float | None = 1.0,
    budget: float = 0.0,
) -> Sums:
    """The estimator of `name` for a piece of W (out, in) and the same pieces of W0 and, for polar_drift, of polar(W0).

    `probes` (size, K) with `probe_size` rows (None for angle_budget); `norm` from `penalty_norm`.
    """
    initial = initial.like(initial.flat.to(weight.flat.dtype))
    drift = weight.like(weight.flat - initial.flat)
    return drift_estimator(name, drift, initial, probes, norm, polar=polar, scale=scale, budget=budget)


def drift_estimator(
    name: str,
    drift: Shard,
    initial: Shard,
    probes: Tensor | None,
    norm: float,
    *,
    polar: Shard | None = None,
    scale: float | None = 1.0,
    budget: float = 0.0,
) -> Sums:
    """`estimator` from W - W0, for several estimates of one matrix; `initial` in the dtype of `drift`."""
    if name == "angle_budget":
        return angle_budget_step(drift, norm, budget)
    if probes is None:
        raise UserError(f"{name} takes probes: sign_probes, or identity_probes to be exact")
    if name == "polar_drift":
        if polar is None:
            raise UserError("polar_drift takes polar(W0) beside W0")
        if drift.shape[0] >= drift.shape[1]:
            return polar_probes(drift, polar, probes, norm)
        return turned(polar_probes(drift.T, polar.T, probes, norm))
    if name == "column_gram_drift":
        return column_gram_probes(drift, initial, probes, norm, scale)
    if name == "row_gram_drift":
        return turned(column_gram_probes(drift.T, initial.T, probes, norm, scale))
    if name == "column_stretch":
        return column_stretch_probes(drift, initial, probes, norm)
    if name == "row_stretch":
        return turned(column_stretch_probes(drift.T, initial.T, probes, norm))
    raise UserError(f"no weight penalty is called {name!r}; there are {', '.join(NAMES)}")


NAMES = ("row_gram_drift", "column_gram_drift", "polar_drift", "row_stretch", "column_stretch", "angle_budget")


def probe_size(name: str, shape: tuple[int, int]) -> int:
    """Entries of a probe of the penalty `name` for a matrix of `shape` (out, in)."""
    if name == "polar_drift":
        return min(shape)
    return shape[0] if name.startswith("row_") else shape[1]


def penalty_norm(name: str, initial: Tensor) -> float:
    """What the penalty `name` is divided by, from W0 (out, in), in float64 accuracy where `initial` has it."""
    if name in ("polar_drift", "angle_budget"):
        return float(initial.square().sum())
    small = initial if initial.shape[0] < initial.shape[1] else initial.mT
    return float((small @ small.mT).square().sum())


class _RotationEstimate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, sums: Callable[[Shard], Sums], initial: Tensor) -> Tensor:
        (found,) = run_together([sums(Shard.whole(weight.detach().contiguous()))])
        ctx.save_for_backward(found.left, found.right, weight, initial)
        ctx.drift_factor = found.drift_factor
        return found.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        left, right, weight, initial = ctx.saved_tensors
        gradient = left @ right.mT + ctx.drift_factor * (weight - initial.to(weight.dtype))
        return output * gradient, None, None


def rotation_penalty(
    name: str,
    weight: Tensor,
    initial: Tensor,
    probes: Tensor | None,
    norm: float,
    *,
    polar: Tensor | None = None,
    scale: float | None = 1.0,
    budget: float = 0.0,
) -> Tensor:
    """A penalty as a differentiable () tensor for a loss, where W is whole; backward is the hand gradient.

    `weight`, `initial` (out, in) floating; `probes` (`probe_size`, K) from `sign_probes` or, exactly, `identity_probes`;
    `norm` from `penalty_norm(name, W0)`; `polar` from `calibtrain.spectral.polar_factor(W0)`, for polar_drift.
    """
    first = Shard.whole(initial.contiguous())
    factor = None if polar is None else Shard.whole(polar.contiguous())

    def sums(shard: Shard) -> Sums:
        return estimator(name, shard, first, probes, norm, polar=factor, scale=scale, budget=budget)

    return _RotationEstimate.apply(weight, sums, initial)
