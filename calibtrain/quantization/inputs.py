"""What the searches share: inputs that must be finite, and sums and maxima over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from calibtrain.errors import UserError


def check_finite(x: Tensor, index: int, name: str) -> None:
    """Raises UserError where a layer of block `index` reads NaN or infinite numbers."""
    if not torch.isfinite(x).all():
        raise UserError(
            f"block {index}, {name}: reads NaN or infinite numbers; the model is broken or overflows in its dtype "
            f"({str(x.dtype).removeprefix('torch.')})"
        )


def over_ranks(x: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    """The sum, minimum or maximum of a tensor over all ranks, in place; as it is where there is one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        on = x.cuda() if dist.get_backend() == "nccl" else x  # which knows no tensors in host memory
        dist.all_reduce(on, op=how)
        x.copy_(on)
    return x
