"""SmoothQuant: outliers of the activations are moved into the weights, so that both fit their 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calibtrain.quantization.blocks import Inputs, observe
from calibtrain.quantization.folds import Fold, apply_fold, shared_by_heads, weight_in
from calibtrain.quantization.inputs import check_finite, over_ranks

SMALLEST = 1e-5  # of a weight's maximum and of a scale, as the authors clamp


@torch.no_grad()
def smooth_block(
    block: nn.Module,
    index: int,
    batches: Sequence[Inputs],
    folds: Sequence[Fold],
    alpha: float = 0.5,
    *,
    further: bool = False,
) -> dict[str, Any]:
    """Smooth the inputs of a block's layers, in place; what it computes stays the same (Xiao et al. 2211.10438).

    alpha: how much of the difficulty goes into the weights. further: also the exact folds that the authors leave out
    (values into the attention's output, up into down). Returns the smallest and the largest scale by source of the fold.
    Raises UserError where a layer reads NaN or infinite numbers.
    """
    chosen = [fold for fold in folds if fold.observed is not None and (further or fold.published)]
    largest = _largest_inputs(block, index, batches, [str(fold.observed) for fold in chosen])
    facts = {}
    for fold in chosen:
        x_max = shared_by_heads(fold, largest[str(fold.observed)], "max")
        w_max = torch.stack([weight_in(block, name).abs().flatten(0, -2).amax(0).float() for name in fold.targets])
        scale = smoothing_scale(x_max, shared_by_heads(fold, w_max.amax(0), "max"), alpha)
        apply_fold(block, fold, scale)
        facts[fold.source] = [scale.min().item(), scale.max().item()]
    return facts


def smoothing_scale(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), each (in,); 1 for channels that are always 0 or that nothing reads."""
    scale = (x_max.pow(alpha) / w_max.clamp(min=SMALLEST).pow(1 - alpha)).clamp(min=SMALLEST)
    return torch.where((x_max == 0) | (w_max == 0), 1.0, scale)


def _largest_inputs(block: nn.Module, index: int, batches: Sequence[Inputs], names: Sequence[str]) -> dict[str, Tensor]:
    """max|X_j| (in,) of what each module reads at real tokens, over all ranks, in float32."""
    largest: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, batch: Inputs) -> None:
        check_finite(x, index, name)
        here = x.abs().amax(0).float()
        largest[name] = torch.maximum(largest[name], here) if name in largest else here

    observe(block, index, batches, {name: block.get_submodule(name) for name in names}, see)
    return {name: over_ranks(largest[name], dist.ReduceOp.MAX) for name in names}
