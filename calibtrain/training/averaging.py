"""The mean of the weights along the last part of a run (Izmailov et al. 2018, arXiv 1803.05407).

A constant step keeps circling the valley it has found; the mean of where it has been generalises better, is less sure of
what it memorised, and costs one more copy of the weights. It observes: the trajectory is that of a run without it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

SNAPSHOTS = 50
"""Weights of about so many steps, evenly spaced, enter the mean; more cost time and change nothing."""


class WeightAverage:
    """Running mean of the trained weights in fp32, over snapshots of the last `share` of `total_steps`.

    Every rank keeps the mean of what it holds whole, so it works below ZeRO-3, where weights are not partitioned.
    """

    def __init__(self, module: nn.Module, share: float, total_steps: int) -> None:
        self.parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self.first = total_steps - max(1, round(share * total_steps))
        self.every = max(1, (total_steps - self.first) // SNAPSHOTS)
        self.total_steps = total_steps
        self.count = 0
        self.means: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take in the weights after `step` finished steps, when it is their turn; the last step's always."""
        if step <= self.first or ((self.total_steps - step) % self.every):
            return
        self.count += 1
        for name, parameter in self.parameters.items():
            if name not in self.means:
                self.means[name] = parameter.detach().float().clone()
            else:
                mean = self.means[name]
                mean.add_(parameter.detach().to(mean.dtype) - mean, alpha=1.0 / self.count)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the mean in place of the weights; the optimiser's own copy is not touched, so train no further."""
        for name, mean in self.means.items():
            self.parameters[name].copy_(mean)

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint, the same on every rank."""
        return {"count": torch.tensor(self.count), **{f"mean/{name}": mean for name, mean in self.means.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the state of a checkpoint, each mean where its weight lies."""
        self.count = int(tensors["count"])
        saved = {name.removeprefix("mean/"): mean for name, mean in tensors.items() if name.startswith("mean/")}
        self.means = {name: mean.to(self.parameters[name].device, copy=True) for name, mean in saved.items()}
