"""What the readers of compressed-tensors directories read, and under which names: some models are stored unlike they run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.quantization.affine import QuantizedWeight, quantize_weight
from calibtrain.quantization.schemes import Scheme

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read the same input and that engines make one of."""


def check_readable(model: nn.Module, scheme: Scheme) -> None:
    """Raise UserError, before any work, for a model that no reader would read once it is quantised so."""
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            raise UserError(
                f"{type(model).__name__}: {name} is a Conv1D, which stores its weight as (in, out); compressed-tensors "
                "directories hold (out, in), and transformers quantises nn.Linear alone, so that nothing would load it"
            )
    floating = scheme.weights.floating
    if has_fused_experts(model) and not floating and (scheme.activations is not None or not scheme.weights.symmetric):
        raise UserError(
            f"--scheme: transformers reads the experts of {type(model).__name__} with symmetric 4- or 8-bit weights alone, "
            "or in float8: take w4a16, w8a16 or fp8, without --asymmetric"
        )


def check_ignored(layers: Sequence[str], ignored: Collection[str]) -> None:
    """Raise UserError where an engine fuses two of a model's `layers` of which one stays in full precision (`ignored`)."""
    for name in layers:
        place, _, own = name.rpartition(".")
        for group in (one for one in FUSED if own in one):
            together = [f"{place}.{one}" for one in group if f"{place}.{one}" in layers]
            if name not in ignored and any(one in ignored for one in together):
                raise UserError(
                    f"--ignore: vLLM fuses {', '.join(group)} into one layer, so that all of them stay in full precision "
                    f"or none ({name} would be quantised)"
                )


def has_fused_experts(model: nn.Module) -> bool:
    """Whether a model holds the matrices of many experts in one parameter (experts, out, in), as Mixtral does."""
    return any(_is_experts(module) for module in model.modules())


def stored_names(model: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by the names that files have them under, which readers expect; fused experts are taken apart."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(parameters)))


@torch.no_grad()
def quantize_experts(model: Any, block: nn.Module, prefix: str, scheme: Scheme) -> dict[str, QuantizedWeight]:
    """Round the fused experts of a block to nearest, in place as well; by the names that files have them under.

    `prefix` is the block's own name with a dot behind it. They cannot stay in full precision: transformers looks for
    quantised ones where any layer is quantised to integers. Their parameters are left out of `others`.
    """
    experts = fused_parameters(block, prefix)
    found: dict[str, QuantizedWeight] = {}
    for name, matrix in stored_names(model, experts).items():
        found[name.removesuffix(".weight")] = quantize_weight(matrix, scheme.weights, scheme.group_size)
    for parameter in experts.values():
        # The rows of gate and up lie one behind the other, and each row has its own scales.
        parts = [quantize_weight(one, scheme.weights, scheme.group_size).dequantized() for one in parameter]
        parameter.copy_(torch.stack(parts))
    return found


def fused_parameters(block: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Parameters (experts, out, in) of a block, by their names in the model."""
    return {
        f"{prefix}{place}.{name}": parameter.detach()
        for place, module in block.named_modules()
        if _is_experts(module)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def routers(model: Any) -> list[str]:
    """Names, in files, of layers that send tokens to experts: engines take them for linear ones, to be ignored."""
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("Router", "Gate"))
        and not isinstance(module, nn.Linear)
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    return [name.removesuffix(".weight") for name in stored_names(model, weights)]


def _is_experts(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "down_proj" in own and own["down_proj"].ndim == 3
