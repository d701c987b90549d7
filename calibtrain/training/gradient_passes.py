"""Passes over the gradients: their norm in one read, and DeepSpeed's ZeRO 1 and 2 without those that change nothing.

They are passes over all weights, which a short step on a CPU waits for. What is replaced are methods of DeepSpeed's
optimizer that are not in its documentation: that is done for the versions that the tests were run with, and others do
their own work.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TESTED = "0.19."
"""Versions of DeepSpeed whose passes are known (tests/distributed/test_gradients.py compares bit by bit)."""
ROW = 2**12
"""Elements whose squares add up in float32: the relative error stays below 1e-7, where 3e7 at once are off by 0.2 %."""


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares of all elements, () float64; NaN or infinite where an element is."""
    parts = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        dtype = torch.promote_types(flat.dtype, torch.float32)
        whole = flat.numel() // ROW * ROW
        rows = flat[:whole].view(-1, ROW), flat[None, whole:]
        parts += [
            torch.linalg.vector_norm(one, dim=1, dtype=dtype).double().square().sum() for one in rows if one.numel()
        ]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def leave_out_passes(optimizer: Any, ranks: int) -> None:
    """Take from a ZeRO-1 or ZeRO-2 optimizer what no result needs.

    - It looks for gradients that are not finite in a pass of its own; the norm, computed next, tells of the same ones.
    - For the norm it copies every gradient to float64; `squared_norm` reads them once.
    - A single rank averages with nobody, yet divides by 1, flattens, widens and copies back. What is left is widening
      each gradient into the fp32 sum, or adding it from the second micro-batch on.
    """
    if not importlib.metadata.version("deepspeed").startswith(TESTED):
        return
    if getattr(optimizer, "compute_grad_norm", False):
        optimizer.check_overflow = lambda partition_gradients=True: None
        optimizer.get_grad_norm_direct = lambda gradients, *_: _norm_over_ranks(optimizer, gradients)
    if ranks == 1 and hasattr(optimizer, "_build_compact_grad_partition_buffer") and not optimizer.cpu_offload:
        _OneRank(optimizer)


def _norm_over_ranks(optimizer: Any, gradients: Any) -> Tensor:
    """Norm of the partitions `gradients` of a group of parameters, () float32; -1 where it is not finite."""
    flat = getattr(gradients, "flat_partition", None)
    total = squared_norm(gradients if flat is None else [flat]).to(optimizer.device)
    torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, -1.0)


class _OneRank:
    """The fp32 sums of a single rank's gradients; on a CPU they keep their memory from step to step."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.build = optimizer._build_compact_grad_partition_buffer
        self.epilogue = optimizer.independent_gradient_partition_epilogue
        self.sums: dict[int, Any] = {}
        self.unwritten: dict[int, dict[int, Tensor]] = {}  # group, parameter id: those without a gradient in this step
        optimizer._build_compact_grad_partition_buffer = self.sums_of_a_step
        optimizer.average_tensor = self.add_bucket
        optimizer.independent_gradient_partition_epilogue = self.end_of_backward

    def sums_of_a_step(self, group: int) -> Any:
        """The sums of a group of parameters, all of which wait for their first gradient."""
        found = self.sums.get(group)
        if found is None:
            found = self.build(group)
            if found.flat_partition.device.type == "cpu":  # fresh memory there is slower than a pass over it
                self.sums[group] = found
        parameters = self.optimizer.params_in_partition[group]
        self.unwritten[group] = {self.optimizer.get_param_id(one): one for one in parameters}
        return found

    def add_bucket(self, bucket: Tensor, communication_type: torch.dtype) -> None:
        """Add each gradient of a bucket to its sum; gradients without an fp32 sum stay where they are."""
        optimizer, start = self.optimizer, 0
        for group, index, parameter in optimizer.ipg_buckets[communication_type].params:
            size = optimizer.bit16_groups[group][index].numel()
            total = optimizer._get_compact_grad_partition_slice(group, 0, parameter, size)
            if total is not None:
                first = self.unwritten[group].pop(parameter, None) is not None
                (total.copy_ if first else total.add_)(bucket[start : start + size])
            start += size

    def end_of_backward(self) -> None:
        """Zero what had no gradient."""
        self.epilogue()
        for group, waiting in self.unwritten.items():
            for parameter, one in waiting.items():
                self.optimizer._get_compact_grad_partition_slice(group, 0, parameter, one.numel()).zero_()
            waiting.clear()
