"""Weight penalties as a decoupled step, in the way of AdamW's weight decay: once an optimiser step, on shards, no graph.

For every sampled matrix, with R the penalty's estimate and dR its gradient by hand,

    W <- W - min(lr * weight * |W0|^2 / (2 * layer_fraction), R / |dR|^2) dR

In the first bound `weight` has the unit of AdamW's weight_decay: an angle budget of 0 decays W towards W0 exactly as
weight_decay does towards 0, and the others share its scale. The second is the Polyak step (Loizou et al. 2021,
arXiv 2002.10542): a step never overshoots the sampled penalty's own zero, so no weight makes it diverge.

Which matrices and which probes are functions of (seed, step) alone, the same on every rank: a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.losses.rotation_lora import lora_sums
from calibtrain.losses.rotation_probes import (
    NAMES,
    Shard,
    Sums,
    estimator,
    identity_probes,
    penalty_norm,
    probe_size,
    run_together,
    sign_probes,
)

GROUP_ELEMENTS = 2**26
"""Matrices are handled side by side as long as the vectors of all of them have fewer elements."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank holds of a trained matrix (rows, columns): `read` gives its contiguous elements, from `start` on.

    `write` is told the elements after an update in place (DeepSpeed may have handed out a copy). `replicated`: every rank
    holds all of it; then each does its share of the products and all of the update.
    """

    shape: tuple[int, int]
    start: int
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None] = lambda flat: None
    replicated: bool = False

    @classmethod
    def parameter(cls, parameter: nn.Parameter) -> Held:
        """All of a contiguous parameter (rows, columns)."""
        rows, columns = parameter.shape
        return cls((rows, columns), 0, lambda: parameter.data.view(-1), replicated=True)

    def share(self, flat: Tensor, rank: int, ranks: int) -> tuple[int, int]:
        """Range of `flat`, as read, that `rank` puts into sums: all of a shard, its part of what every rank holds."""
        return share(flat.numel(), rank, ranks) if self.replicated else (0, flat.numel())

    def part(self, rank: int, ranks: int) -> Tensor:
        """The matrix, with zeros where it is another rank's to tell."""
        flat = self.read()
        begin, end = self.share(flat, rank, ranks)
        whole = flat.new_zeros(self.shape[0] * self.shape[1])
        whole[self.start + begin : self.start + end] = flat[begin:end]
        return whole.view(self.shape)


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A trained matrix W; `initial` (and `polar`, for polar_drift) have those elements of W0 (of polar(W0))."""

    name: str
    weight: Held
    initial: Tensor
    norm: float  # of `penalty_norm`
    squared_norm: float  # |W0|_F^2
    polar: Tensor | None = None

    @classmethod
    def of(cls, penalty: str, parameter: nn.Parameter, *, name: str = "", polar: Tensor | None = None) -> DenseMatrix:
        """A trained parameter (rows, columns) that is whole in this process; W0 is what it holds now.

        polar_drift also takes `polar`, from `calibtrain.spectral.polar.polar_factor(parameter)`. Raises UserError for a
        parameter that is no contiguous matrix, of half precision, frozen or 0 everywhere.
        """
        if parameter.ndim != 2 or not parameter.is_contiguous():
            raise UserError(f"{penalty} {name}: a contiguous matrix is held, not one of shape {tuple(parameter.shape)}")
        if not parameter.requires_grad:
            raise UserError(f"{penalty} {name}: the parameter is frozen, and does not leave where it is")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"{penalty} {name}: the weights are {parameter.dtype}, in which so small a step is rounded away; hold the "
                "optimiser's fp32 masters"
            )
        if (polar is None) == (penalty == "polar_drift"):
            raise UserError(f"{penalty} {name}: polar(W0) is what polar_drift takes, and no other penalty")
        initial = parameter.detach().clone()
        norms = penalty_norm(penalty, initial), float(initial.square().sum())
        if not norms[0] > 0:
            raise UserError(f"{penalty} {name}: the matrix is 0 everywhere, and nothing relative to it can be held")
        flat = None if polar is None else polar.reshape(-1)
        return cls(name, Held.parameter(parameter), initial.view(-1), *norms, flat)


@dataclass(frozen=True, slots=True)
class LoRAMatrix:
    """W = W0 + scaling * b @ a, trained `a` (r, in) and `b` (out, r); `reference` is a piece of W0 (or of polar(W0))."""

    name: str
    a: Held
    b: Held
    reference: Shard
    scaling: float
    norm: float
    squared_norm: float


class DecoupledPenalty:
    """One penalty on many matrices.

    Args:
        penalty: its name, one of `rotation_probes.NAMES`.
        weight: its strength, in the unit of AdamW's weight_decay.
        matrices: in the same order on every rank.
        probes: vectors per matrix and step; None is exact.
        layer_fraction: share of the matrices that a step takes, in turn at random; their weight makes up for it.
        scale: of the Gram drifts; None is free.
        budget: of angle_budget.
        seed: of the probes and of the choice of matrices.
        reduce: adds a flat tensor up over ranks in place; None on one rank.
        rank, ranks: this process among those that `reduce` adds up.

    Raises UserError for a penalty that there is not, no matrices, and numbers out of range.
    """

    def __init__(
        self,
        penalty: str,
        weight: float,
        matrices: Sequence[DenseMatrix | LoRAMatrix],
        *,
        probes: int | None = 8,
        layer_fraction: float = 1.0,
        scale: float | None = 1.0,
        budget: float = 0.0,
        seed: int = 0,
        reduce: Callable[[Tensor], None] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if penalty not in NAMES:
            raise UserError(f"no weight penalty is called {penalty!r}; there are {', '.join(NAMES)}")
        if not matrices:
            raise UserError(f"{penalty}: there is no matrix to hold")
        if weight < 0 or not 0 < layer_fraction <= 1 or (probes is not None and probes < 1):
            raise UserError(
                f"{penalty}: weight must be 0 or more, layer_fraction in (0, 1] and probes at least 1 or None, got "
                f"{weight}, {layer_fraction} and {probes}"
            )
        if scale is None and any(isinstance(one, LoRAMatrix) for one in matrices):
            raise UserError(f"{penalty}: a free scale has no closed form for LoRA; give a number")
        self.penalty = penalty
        self.weight = weight
        self.matrices = list(matrices)
        self.probes = probes
        self.count = max(1, round(layer_fraction * len(self.matrices)))
        self.scale = scale
        self.budget = budget
        self.seed = seed
        self.reduce = reduce
        self.rank, self.ranks = rank, ranks

    @torch.no_grad()
    def step(self, step: int, learning_rate: float) -> Tensor:
        """Take the penalty's step number `step`. Returns the mean estimate over the sampled matrices, () float32."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randperm(len(self.matrices), generator=generator)[: self.count].sort().values.tolist()
        reach = learning_rate * self.weight * len(self.matrices) / self.count
        values: list[Tensor] = []
        for group in self._groups([self.matrices[i] for i in chosen]):
            dense = [one for one in group if isinstance(one, DenseMatrix)]
            lora = [one for one in group if isinstance(one, LoRAMatrix)]
            values += self._step_dense(dense, generator, reach) + self._step_lora(lora, reach)
        return torch.stack(values).mean()

    def _groups(self, matrices: Sequence[DenseMatrix | LoRAMatrix]) -> Iterator[list[DenseMatrix | LoRAMatrix]]:
        group: list[DenseMatrix | LoRAMatrix] = []
        size = 0
        for one in matrices:
            shape = one.weight.shape if isinstance(one, DenseMatrix) else one.reference.shape
            needed = 4 * sum(shape) * (self.probes or max(shape))
            if group and size + needed > GROUP_ELEMENTS:
                yield group
                group, size = [], 0
            group.append(one)
            size += needed
        yield group

    def _step_dense(self, group: Sequence[DenseMatrix], generator: torch.Generator, reach: float) -> list[Tensor]:
        flats = [one.weight.read() for one in group]
        sums = [self._sums(one, flat, generator) for one, flat in zip(group, flats, strict=True)]
        estimates = run_together(sums, self.reduce)
        for one, flat, found in zip(group, flats, estimates, strict=True):
            size = _step_size(reach * one.squared_norm / 2, found.value, found.squared_gradient())
            if self.penalty == "angle_budget":
                flat.sub_((flat - one.initial.to(flat.dtype)) * (size * found.drift_factor))
            else:
                Shard(one.weight.shape, one.weight.start, flat).add_product(found.left, found.right, -size)
            one.weight.write(flat)
        return [found.value for found in estimates]

    def _sums(self, one: DenseMatrix, flat: Tensor, generator: torch.Generator) -> Sums:
        probes = None
        if self.penalty != "angle_budget":
            size = probe_size(self.penalty, one.weight.shape)
            if self.probes is None or self.probes >= size:
                probes = identity_probes(size, flat.dtype, flat.device)
            else:
                probes = sign_probes(size, self.probes, generator, flat.dtype).to(flat.device)
        begin, end = one.weight.share(flat, self.rank, self.ranks)
        piece = Shard(one.weight.shape, one.weight.start + begin, flat[begin:end])
        polar = None if one.polar is None else piece.like(one.polar[begin:end])
        return estimator(
            self.penalty,
            piece,
            piece.like(one.initial[begin:end]),
            probes,
            one.norm,
            polar=polar,
            scale=self.scale,
            budget=self.budget,
        )

    def _step_lora(self, group: Sequence[LoRAMatrix], reach: float) -> list[Tensor]:
        sums = [
            lora_sums(
                self.penalty,
                one.a.part(self.rank, self.ranks),
                one.b.part(self.rank, self.ranks),
                one.reference,
                one.scaling,
                one.norm,
                self.budget,
            )
            for one in group
        ]
        values = []
        for one, (value, *gradients) in zip(group, run_together(sums, self.reduce), strict=True):
            squared = sum((gradient.square().sum() for gradient in gradients), start=value.new_zeros(()))
            size = _step_size(reach * one.squared_norm / 2, value, squared)
            for held, gradient in zip((one.a, one.b), gradients, strict=True):
                flat = held.read()
                mine = gradient.reshape(-1)[held.start : held.start + flat.numel()]
                flat.sub_(mine.to(flat.dtype) * size)
                held.write(flat)
            values.append(value)
        return values


def share(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """The contiguous range of `size` elements that is `rank`'s."""
    each = -(-size // ranks)
    return min(size, rank * each), min(size, (rank + 1) * each)


def _step_size(reach: float, value: Tensor, squared_gradient: Tensor) -> Tensor:
    polyak = torch.where(squared_gradient > 0, value / squared_gradient.clamp(min=1e-38), 0.0)
    return polyak.clamp(max=reach)
