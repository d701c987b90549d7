"""Ranges of activations, from sums over tokens that do not depend on their order or on which rank saw them.

Whatever is kept of the tokens is a smallest, a largest number or a count: merging in any order and any partition gives
the same bits. A running average of minima and maxima, as some tools keep, depends on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.quantization.affine import Grid, from_grid, scale_and_zero, to_grid
from calibtrain.quantization.blocks import Inputs, observe
from calibtrain.quantization.inputs import over_ranks
from calibtrain.quantization.schemes import Scheme

TENSOR_BITS, CHANNEL_BITS = 7, 4
"""Bits of the mantissa that a histogram tells apart: over a tensor those of a bf16 number, over a channel fewer."""


class MinMax:
    """The smallest and the largest number, exactly."""

    def __init__(self, name: str, channels: int | None = None) -> None:
        """name: of the layer, for messages. channels: one range for each of so many, else one for all numbers."""
        self.name, self.channels = name, channels
        shape = () if channels is None else (channels,)
        self.low, self.high = torch.full(shape, float("inf")), torch.full(shape, float("-inf"))

    def update(self, x: Tensor) -> None:
        """Take in tokens x (N, C), no padding. Raises UserError that names the layer for NaN and infinity."""
        if not len(x):
            return
        dims = (0, 1) if self.channels is None else (0,)
        low, high = x.amin(dims).float().cpu(), x.amax(dims).float().cpu()
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise UserError(
                f"{self.name}: reads NaN or infinity; the model is broken, or computes in too few bits (fp32?)"
            )
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def merge(self, other: MinMax) -> None:
        """Take in what another observer saw."""
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)

    def all_reduce(self) -> None:
        """Take in what all ranks saw. Collective; nothing where there are none."""
        over_ranks(self.low, dist.ReduceOp.MIN)
        over_ranks(self.high, dist.ReduceOp.MAX)

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high), float32, () or (channels,). Raises UserError where no token was seen."""
        if not bool((self.low <= self.high).all()):
            raise UserError(f"{self.name}: no token reached it; give more samples, or leave it in full precision")
        return self.low, self.high


class Histogram(MinMax):
    """Counts of numbers by sign, exponent and leading bits of the mantissa: fixed bins, which never have to grow.

    A bin stands for its number of smallest magnitude. That is at most a part of 2^-7 below any other in it (one range for
    all numbers; a bf16 number is told exactly), or 2^-4 (one for each channel).
    """

    def __init__(self, name: str, channels: int | None = None) -> None:
        """As MinMax. Memory: 512 KB, or 32 KB a channel."""
        super().__init__(name, channels)
        self.dropped = 23 - (TENSOR_BITS if channels is None else CHANNEL_BITS)
        self.half = 2 ** (31 - self.dropped)  # bins of either sign
        self.counts = torch.zeros(channels or 1, 2 * self.half, dtype=torch.int64 if channels is None else torch.int32)

    def update(self, x: Tensor) -> None:
        """As MinMax."""
        super().update(x)
        bits = x.detach().float().cpu().contiguous().view(torch.int32)
        size = (bits & 0x7FFFFFFF) >> self.dropped
        place = torch.where(bits < 0, self.half - 1 - size, self.half + size)
        if self.channels is not None:
            place = place + torch.arange(self.channels, dtype=torch.int32) * 2 * self.half
        found = torch.bincount(place.flatten(), minlength=self.counts.numel())
        self.counts += found.view_as(self.counts).to(self.counts.dtype)

    def merge(self, other: MinMax) -> None:
        """As MinMax."""
        super().merge(other)
        assert isinstance(other, Histogram)
        self.counts += other.counts

    def all_reduce(self) -> None:
        """As MinMax."""
        super().all_reduce()
        over_ranks(self.counts, dist.ReduceOp.SUM)

    def values(self) -> Tensor:
        """The number that each bin stands for, ascending (bins,)."""
        size = torch.arange(self.half, dtype=torch.int32) << self.dropped
        return torch.cat([-size.view(torch.float32).flip(0), size.view(torch.float32)])


class Percentile(Histogram):
    """The range without the outermost numbers: (100 - p) % of all at either end, by the histogram.

    Each end is the number of that rank (the p-th percentile as one of the numbers, not between two), rounded to its bin:
    nearer to 0 by less than a part of 2^-7, or 2^-4 for channels.
    """

    def __init__(self, name: str, channels: int | None = None, p: float = 99.9) -> None:
        """p: 99.9 or 99.99 are usual."""
        super().__init__(name, channels)
        self.p = p

    def range(self) -> tuple[Tensor, Tensor]:
        """As MinMax."""
        low, high = super().range()
        total = self.counts.sum(-1, dtype=torch.int64)
        rank = (total.double() * (self.p / 100)).ceil().long().clamp(min=1)
        values = self.values()
        upwards = values[_first_at(self.counts, rank)]
        downwards = values.flip(0)[_first_at(self.counts.flip(-1), rank)]
        return torch.maximum(downwards.view_as(low), low), torch.minimum(upwards.view_as(high), high)


class LeastError(Histogram):
    """The range, shrunk about 0, whose rounding errs least over the histogram: sum of |Q(x) - x|^norm.

    Shrinks by i / steps for i in 0 .. max_shrink * steps, as the "mse" observer of llm-compressor; all of them are tried,
    where that one stops after five without a gain. Its norm of 2.4 weighs large errors more than squares do.
    """

    def __init__(
        self,
        name: str,
        grid: Grid,
        channels: int | None = None,
        steps: int = 100,
        max_shrink: float = 0.2,
        norm: float = 2.4,
    ) -> None:
        """grid: on which the numbers are to be rounded."""
        super().__init__(name, channels)
        self.grid, self.steps, self.tries, self.norm = grid, steps, int(max_shrink * steps), norm

    def range(self) -> tuple[Tensor, Tensor]:
        """As MinMax."""
        low, high = super().range()
        found = [self._least(*one) for one in zip(self.counts, low.flatten(), high.flatten(), strict=True)]
        shrink = torch.tensor(found).view_as(low)
        return low * shrink, high * shrink

    def _least(self, counts: Tensor, low: Tensor, high: Tensor) -> float:
        used = counts.nonzero()[:, 0]
        x, n = self.values()[used], counts[used].double()
        best = (float("inf"), 1.0)
        for step in range(self.tries + 1):
            shrink = 1 - step / self.steps
            scale, zero = scale_and_zero(low * shrink, high * shrink, self.grid)
            error = (from_grid(to_grid(x, scale, zero, self.grid), scale, zero) - x).abs().double() ** self.norm
            best = min(best, (float((error * n).sum()), shrink), key=lambda one: one[0])
        return best[1]


def _first_at(counts: Tensor, rank: Tensor) -> Tensor:
    """Index of the bin that holds the number of each row's `rank` (from 1 on)."""
    return torch.searchsorted(counts.cumsum(-1, dtype=torch.int64), rank[:, None])[:, 0]


def observer_of(kind: str, name: str, grid: Grid) -> MinMax:
    """A fresh observer of one of `schemes.OBSERVERS`, over all numbers that layer `name` reads."""
    if kind == "minmax":
        return MinMax(name)
    return Percentile(name) if kind == "percentile" else LeastError(name, grid)


def static_input_scales(
    block: nn.Module,
    index: int,
    batches: Sequence[Inputs],
    layers: Mapping[str, nn.Module],
    scheme: Scheme,
) -> dict[str, Tensor]:
    """The scale (1,) of each layer's inputs, one for all tokens of all ranks, in its dtype.

    Symmetric, as engines want it. Collective where there are ranks. Raises UserError as the observers do.
    """
    assert scheme.activations is not None
    seen = {name: observer_of(scheme.observer, name, scheme.activations) for name in layers}
    observe(block, index, batches, layers, lambda name, x, _: seen[name].update(x))
    scales = {}
    for name, layer in layers.items():
        seen[name].all_reduce()
        dtype: Any = layer.weight.dtype
        scale, _ = scale_and_zero(*seen[name].range(), scheme.activations, dtype)
        scales[name] = scale.reshape(1).to(dtype)
    return scales


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A massive activation at the first token, which a range over all tokens has to hold."""

    times: float  # the largest number at first tokens, by the median over other tokens of each one's largest
    largest: float
    largest_of_others: float  # the range without first tokens


def first_token_outliers(
    block: nn.Module, index: int, batches: Sequence[Inputs], layers: Mapping[str, nn.Module], times: float = 20.0
) -> dict[str, FirstToken]:
    """Layers that read, at first tokens, more than `times` the median of other tokens (Sun et al., arXiv 2402.17762).

    Experts, which are sent single tokens, are left out.
    """
    first: dict[str, list[Tensor]] = {name: [] for name in layers}
    others: dict[str, list[Tensor]] = {name: [] for name in layers}

    def see(name: str, x: Tensor, batch: Inputs) -> None:
        place = torch.arange(batch.real.shape[1], device=x.device).expand_as(batch.real)[batch.real]
        if len(place) == len(x):
            largest = x.abs().amax(-1).float()
            first[name].append(largest[place == 0])
            others[name].append(largest[place > 0])

    observe(block, index, batches, layers, see)
    found = {}
    for name in layers:
        if others[name] and len(rest := torch.cat(others[name])):
            largest, median = torch.cat(first[name]).amax(), rest.median()
            if largest > times * median:
                ratio = float(largest / median.clamp(min=torch.finfo(torch.float32).tiny))
                found[name] = FirstToken(ratio, float(largest), float(rest.amax()))
    return found
