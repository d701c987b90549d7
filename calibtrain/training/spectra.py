"""How far chosen matrices are from where the run began, read on the shards that train them.

Nothing is gathered while training: a reading adds up products of each rank's elements with a few vectors. A reading is a
function of the weights alone: the vectors are drawn from a matrix's name, never from the global generator, and the power
iteration sets out from the singular vectors of W0 each time, so that a resumed run reads what an unbroken one does. Drift
and alpha are exact. The penalties' values are estimates from the same PROBES sign vectors in every reading, and exact with
LoRA and where a matrix is no larger. Spectral norms come from below, and were within 1e-6 of the SVD's on SmolLM2-135M.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from calibtrain.config import RunConfig
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.losses.rotation_lora import lora_sums
from calibtrain.losses.rotation_probes import (
    NAMES,
    Shard,
    drift_estimator,
    identity_probes,
    penalty_norm,
    probe_size,
    run_together,
    sign_probes,
)
from calibtrain.losses.rotation_step import Held
from calibtrain.training.engine import Engine
from calibtrain.training.matrices import Reduce, begin, trained_layers

T = TypeVar("T")
Sums = Generator[Tensor, Tensor, T]

PROBES = 16
BLOCK = 8
"""Vectors that the power iteration takes along."""
FRESH = 2
"""Of them drawn at random, for what W0 did not have."""
PASSES = 8
"""Multiplications by W^T W in a reading."""
ROUNDS, SETTLED = 50, 1e-7
"""At the start as many times PASSES at most, until the norm of W0 grows by no larger a share."""
GROUP_ELEMENTS = 2**24
"""Matrices are read side by side as long as they have fewer elements together: fp32 copies of them are made."""

PENALTIES = tuple(name for name in NAMES if name != "angle_budget")  # which is the drift, squared


@dataclass(frozen=True, slots=True)
class Watched:
    """A matrix W (out, in) and where it began; `masters` are W itself, or A and B of W = W0 + scaling B A."""

    name: str
    masters: list[Held]
    scaling: float
    first: Shard  # this rank's elements of W0, in the model's dtype
    polar: Shard  # of polar(W0), in fp32
    squared_norm: float  # |W0|_F^2
    gram_norm: float  # |W0 W0^T|_F^2
    spectral_norm: float  # of W0
    block: Tensor  # (in, K) orthonormal, fp32: largest singular directions of W0, and random ones

    def norm(self, penalty: str) -> float:
        """What the value of `penalty` is divided by."""
        return self.squared_norm if penalty == "polar_drift" else self.gram_norm


class Spectra:
    """Readings of the matrices every `every` steps."""

    def __init__(self, matrices: Sequence[Watched], every: int, world: World) -> None:
        self.matrices = matrices
        self.every = every
        self.rank, self.ranks = world.rank, world.size
        self.reduce = Reduce(world) if world.size > 1 else None

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether the weights are read after `step` finished steps: also after the last."""
        return step % self.every == 0 or step == total_steps

    @torch.no_grad()
    def read(self) -> dict[str, dict[str, float]]:
        """Module -> quantity -> value of the fp32 masters as they are now. Collective; the same on every rank."""
        found: dict[str, dict[str, float]] = {}
        for group in _groups(self.matrices):
            now = [_now(one, self.rank, self.ranks) for one in group]
            moments = run_together([one.moments() for one in now], self.reduce)
            penalties = iter(run_together([sums for one in now for sums in one.penalties()], self.reduce))
            norms = run_together(
                [
                    power_iteration(one.weight, one.start.block, moment.left, moment.right)
                    for one, moment in zip(now, moments, strict=True)
                ],
                self.reduce,
            )
            for one, moment, (norm, _) in zip(group, moments, norms, strict=True):
                squared_norm = one.squared_norm + 2 * moment.inner + moment.squared_drift
                found[one.name] = {
                    "relative_drift": sqrt(moment.squared_drift / one.squared_norm),
                    "alpha": 1.0 + moment.inner / one.squared_norm,
                    "spectral_norm_ratio": norm / one.spectral_norm,
                    "stable_rank": squared_norm / norm**2 if norm else nan,
                    **{name: float(next(penalties)) for name in PENALTIES},
                }
        return found


def build_spectra(config: RunConfig, engine: Engine, world: World) -> Spectra | None:
    """Readings against what the engine's weights are now: call it before a checkpoint is loaded. Collective."""
    tracking = config.tracking
    if not tracking.spectra_every:
        return None
    layers = spectra_layers(trained_layers(engine.module.policy.causal_model), tracking.spectra_modules)
    matrices = [_watch(name, layer, engine, world, number) for number, (name, layer) in enumerate(layers)]
    return Spectra(matrices, tracking.spectra_every, world)


def spectra_layers(layers: Sequence[tuple[str, Any]], wanted: Sequence[str] | str) -> list[tuple[str, Any]]:
    """Those of `layers` that tracking.spectra_modules names. Raises UserError for a name that is none of theirs."""
    if not layers:
        raise UserError("tracking.spectra_every: the run trains no linear layer, so that nothing can drift")
    if wanted == "all-linear":
        return list(layers)
    if wanted == "first-middle-last":
        blocks = {name: int(found[1]) for name, _ in layers if (found := re.search(r"\.(\d+)\.", name))}
        numbers = sorted(set(blocks.values())) or [0]
        picked = {numbers[0], numbers[len(numbers) // 2], numbers[-1]}
        return [(name, one) for name, one in layers if blocks.get(name, 0) in picked]
    missing = [one for one in wanted if not any(_lies_in(name, one) for name, _ in layers)]
    if missing:
        raise UserError(
            f"tracking.spectra_modules: no trained linear layer is called or lies in {', '.join(missing)}; there are "
            f"{', '.join(sorted({name.rpartition('.')[2] for name, _ in layers}))}, as in {layers[0][0]}"
        )
    return [(name, layer) for name, layer in layers if any(_lies_in(name, one) for one in wanted)]


def _lies_in(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."


def power_iteration(piece: Shard, block: Tensor, left: Tensor, right: Tensor) -> Sums[tuple[float, Tensor]]:
    """Spectral norm of W from below, and the right singular directions (in, K) that it was found with.

    W is the sum over ranks of their `piece`, plus left (out, r) @ right (in, r).T, which every rank has; `block` (in, K)
    orthonormal is where to set out from. All have one dtype. Yields what wants adding up over ranks, as `run_together`
    expects it. The norm is NaN where W is not finite.
    """
    for _ in range(PASSES):
        image = (yield piece.apply(block)) + left @ (right.mT @ block)
        block = torch.linalg.qr((yield piece.apply_transposed(image)) + right @ (left.mT @ image)).Q
    image = (yield piece.apply(block)) + left @ (right.mT @ block)
    gram = image.double().mT @ image.double()
    if not bool(gram.isfinite().all()):
        return nan, block
    return sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1]))), block


class Moments(NamedTuple):
    """What is exact of W - W0; `left` (out, r) @ `right` (in, r).T is it with LoRA, and r = 0 without."""

    squared_drift: float  # |W - W0|_F^2
    inner: float  # <W - W0, W0>
    left: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True)
class _Dense:
    """W as it is now: this rank's elements in fp32."""

    start: Watched
    weight: Shard
    first: Shard
    drift: Shard

    def moments(self) -> Sums[Moments]:
        drift, first = self.drift.flat, self.first.flat
        sums = yield torch.stack([one.sum(dtype=torch.float64) for one in (drift.square(), drift * first)])
        squared_drift, inner = sums.tolist()
        return Moments(squared_drift, inner, *(drift.new_zeros(size, 0) for size in self.drift.shape))

    def penalties(self) -> Iterator[Sums[Tensor]]:
        generator = _generator(self.start.name)
        for name in PENALTIES:
            size = probe_size(name, self.drift.shape)
            probes = sign_probes(size, PROBES, generator) if size > PROBES else identity_probes(size)
            yield self._penalty(name, probes.to(self.drift.flat.device))

    def _penalty(self, name: str, probes: Tensor) -> Sums[Tensor]:
        norm, polar = self.start.norm(name), self.start.polar
        found = yield from drift_estimator(name, self.drift, self.first, probes, norm, polar=polar)
        return found.value


@dataclass(frozen=True, slots=True)
class _LoRA:
    """W = W0 + scaling B A as it is now: this rank's elements of W0 in fp32, and A and B with zeros for the others'."""

    start: Watched
    weight: Shard  # of W0 alone
    a: Tensor
    b: Tensor

    def moments(self) -> Sums[Moments]:
        flat = yield torch.cat([self.a.reshape(-1), self.b.reshape(-1)])
        a, b = flat[: self.a.numel()].view(self.a.shape), flat[self.a.numel() :].view(self.b.shape)
        left, image = b * self.start.scaling, (yield self.weight.apply(a.mT))
        a64, left64 = a.double(), left.double()
        squared_drift = ((left64.mT @ left64) * (a64 @ a64.mT)).sum()
        return Moments(float(squared_drift), float((left64 * image.double()).sum()), left, a.mT)

    def penalties(self) -> Iterator[Sums[Tensor]]:
        return (self._penalty(name) for name in PENALTIES)

    def _penalty(self, name: str) -> Sums[Tensor]:
        reference = self.start.polar if name == "polar_drift" else self.weight
        value, *_ = yield from lora_sums(name, self.a, self.b, reference, self.start.scaling, self.start.norm(name))
        return value


def _now(one: Watched, rank: int, ranks: int) -> _Dense | _LoRA:
    if len(one.masters) == 2:
        a, b = (held.part(rank, ranks) for held in one.masters)
        return _LoRA(one, one.first.like(one.first.flat.to(a.device, a.dtype)), a, b)
    flat = one.masters[0].read()
    first_at, end = one.masters[0].share(flat, rank, ranks)
    weight, first = one.first.like(flat[first_at:end]), one.first.like(one.first.flat.to(flat.dtype))
    return _Dense(one, weight, first, first.like(weight.flat - first.flat))


def _watch(name: str, layer: Any, engine: Engine, world: World, number: int) -> Watched:
    begun = begin(layer, engine, world)
    squared_norm = float(begun.whole.square().sum(dtype=torch.float64))
    if not squared_norm > 0:
        raise UserError(
            f"tracking.spectra_modules: {name} is 0 everywhere, and nothing relative to it can be told; name other modules"
        )
    spectral_norm, block = _top(begun.whole, name)
    lora = len(begun.masters) == 2
    first_at, end = (0, begun.own.numel()) if lora else begun.masters[0].share(begun.own, world.rank, world.size)
    # A frozen W0 stays where it is; a trained one is kept as the run began with it, in the model's dtype.
    own = begun.own if lora else begun.own[first_at:end].to(begun.dtype, copy=True)
    first = Shard(begun.shape, begun.start + first_at, own)
    return Watched(
        name=name,
        masters=begun.masters,
        scaling=layer.scaling["default"] if lora else 1.0,
        first=first,
        polar=first.like(begun.polar_piece(number, world)[first_at:end].to(begun.device, copy=True)),
        squared_norm=squared_norm,
        gram_norm=penalty_norm("row_gram_drift", begun.whole),
        spectral_norm=spectral_norm,
        block=block.to(begun.device),
    )


@torch.no_grad()
def _top(whole: Tensor, name: str) -> tuple[float, Tensor]:
    """Spectral norm of W0, and the vectors that readings set out from."""
    columns = min(BLOCK, whole.shape[1])
    random = torch.randn(whole.shape[1], columns, generator=_generator(name)).to(whole.device)
    block, found, shard = torch.linalg.qr(random).Q, 0.0, Shard.whole(whole)
    nothing = [whole.new_zeros(size, 0) for size in whole.shape]
    for _ in range(ROUNDS):
        ((norm, block),) = run_together([power_iteration(shard, block, *nothing)])
        grown, found = norm > found * (1 + SETTLED), max(norm, found)
        if not grown:
            break
    known = max(1, columns - FRESH)
    return found, torch.linalg.qr(torch.cat([block[:, :known], random[:, known:]], 1)).Q


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _groups(matrices: Sequence[Watched]) -> Iterator[list[Watched]]:
    group: list[Watched] = []
    size = 0
    for one in matrices:
        elements = one.first.shape[0] * one.first.shape[1]
        if group and size + elements > GROUP_ELEMENTS:
            yield group
            group, size = [], 0
        group.append(one)
        size += elements
    yield group
