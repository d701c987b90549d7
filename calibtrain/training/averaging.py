"""The mean of the weights along the last part of a run (Izmailov et al. 2018, arXiv 1803.05407).

A constant step keeps circling the valley it has found; the mean of where it has been generalises better, is less sure of
what it memorised, and costs one more copy of the weights. It observes: the trajectory is that of a run without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calibtrain.losses.rotation_step import share
from calibtrain.models.sharding import full_shape, is_sharded, part_range
from calibtrain.training.shards import Piece

AVERAGE, MEAN = "average/", "mean"
"""How the means are named among a checkpoint's tensors."""
SNAPSHOTS = 50
"""Weights of about so many steps, evenly spaced, enter the mean; more cost time and change nothing."""


class WeightAverage:
    """Running mean of the trained weights in fp32, over snapshots of the last `share` of `total_steps`.

    Each rank of `ranks` keeps the mean of its own elements: its ZeRO-3 parts, or a share of what every rank holds whole.
    """

    def __init__(self, module: nn.Module, share: float, total_steps: int, rank: int = 0, ranks: int = 1) -> None:
        self.parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self.first = total_steps - max(1, round(share * total_steps))
        self.every = max(1, (total_steps - self.first) // SNAPSHOTS)
        self.total_steps = total_steps
        self.rank, self.ranks = rank, ranks
        self.count = 0
        self.means: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take in the weights after `step` finished steps, when it is their turn; the last step's always."""
        if step <= self.first or ((self.total_steps - step) % self.every):
            return
        self.count += 1
        for name, parameter in self.parameters.items():
            own = self._own(parameter)
            if name not in self.means:
                self.means[name] = own.float().clone()
            else:
                mean = self.means[name]
                mean.add_(own.to(mean.dtype) - mean, alpha=1.0 / self.count)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the mean in place of the weights; the optimiser's own copy is not touched, so train no further. Collective."""
        for name, mean in self.means.items():
            parameter: Any = self.parameters[name]
            if is_sharded(parameter):
                self._own(parameter).copy_(mean)
                if (
                    parameter.data.numel() == parameter.ds_numel
                ):  # a small weight, which ZeRO-3 keeps whole beside its parts
                    parameter.partition()
                    parameter.all_gather()
                continue
            if self.ranks > 1:
                whole = mean.new_zeros(parameter.numel())
                whole[slice(*share(parameter.numel(), self.rank, self.ranks))] = mean
                dist.all_reduce(whole)  # each element is one rank's, and 0 on the others
                mean = whole
            parameter.copy_(mean.view_as(parameter))

    def pieces(self) -> list[Piece]:
        """This rank's part of the means, for a checkpoint."""
        found = []
        for name, mean in self.means.items():
            start, stop = self._range(self.parameters[name])
            if stop > start:
                found.append(
                    Piece(AVERAGE + name, full_shape(self.parameters[name]), start, {MEAN: mean[: stop - start]})
                )
        return found

    def load(self, count: int, read: Callable[[str, str, int, Tensor], None]) -> None:
        """Take up the means of a checkpoint, each where its weight lies; `read` as `Shards.read`."""
        self.count, self.means = count, {}
        for name, parameter in self.parameters.items() if count else ():
            start, stop = self._range(parameter)
            mean = torch.zeros_like(self._own(parameter), dtype=torch.float32)
            read(AVERAGE + name, MEAN, start, mean[: stop - start])
            self.means[name] = mean

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """(start, stop) of this rank's elements of a weight."""
        return part_range(parameter) if is_sharded(parameter) else share(parameter.numel(), self.rank, self.ranks)

    def _own(self, parameter: Any) -> Tensor:
        """This rank's elements of a weight as they are now, flat."""
        if is_sharded(parameter):
            return parameter.ds_tensor.detach().view(-1)
        flat = parameter.detach().reshape(-1)
        return flat[slice(*share(flat.numel(), self.rank, self.ranks))]
