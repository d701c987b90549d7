"""Quantised models for tests, rounded to nearest: the directory, and the same numbers in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from calibtrain.quantization.affine import QuantizedWeight, from_grid, quantize_tokens, quantize_weight, to_grid
from calibtrain.quantization.blocks import matrices_in
from calibtrain.quantization.directory import ModelWriter
from calibtrain.quantization.schemes import Scheme, is_ignored

INPUT_SCALE, KV_SCALE = 0.0625, 0.03125  # in any dtype
BLOCKS = "model.layers"


def quantized_blocks(model: Any, scheme: Scheme, ignore: tuple[str, ...] = ()) -> Iterator[tuple[dict, dict]]:
    """(quantised weights, other parameters) of each block of a Llama-like model."""
    for index, block in enumerate(model.model.layers):
        prefix = f"{BLOCKS}.{index}."
        weights = {
            name: quantize_weight(module.weight.detach(), scheme.weights, scheme.group_size)
            for name, module in matrices_in(block, prefix).items()
            if not is_ignored(name, ignore)
        }
        parameters = {prefix + name: one.detach() for name, one in block.named_parameters()}
        yield weights, {n: one for n, one in parameters.items() if n.removesuffix(".weight") not in weights}


def add_block(writer: ModelWriter, index: int, weights: dict[str, QuantizedWeight], others: dict) -> None:
    """With static scales of INPUT_SCALE and KV_SCALE where the scheme has some."""
    inputs = {name: torch.tensor(INPUT_SCALE) for name in weights}
    cache = {f"{BLOCKS}.{index}.self_attn.{one}_scale": torch.tensor(KV_SCALE) for one in "kv"}
    writer.add_block(
        index, weights, others, inputs if writer.scheme.static else {}, cache if writer.scheme.kv_cache else None
    )


def outside_blocks(model: Any) -> dict[str, torch.Tensor]:
    """Embeddings, final norm and head."""
    return {name: one.detach() for name, one in model.named_parameters() if not name.startswith(BLOCKS)}


def write_quantized(model: Any, source: Path, target: Path, scheme: Scheme, ignore: tuple[str, ...] = ()) -> Path:
    """The whole directory, of a model that lies in `source`."""
    writer = ModelWriter(source, target, scheme, "mark")
    for index, (weights, others) in enumerate(quantized_blocks(model, scheme, ignore)):
        add_block(writer, index, weights, others)
    names = [name for name in matrices_in(model) if is_ignored(name, ignore)]
    writer.finish(outside_blocks(model), names)
    return target


@contextlib.contextmanager
def quantized_in_memory(model: Any, scheme: Scheme, ignore: tuple[str, ...] = ()) -> Iterator[Any]:
    """`model` itself with rounded weights, and inputs rounded as the scheme says."""
    modules = dict(model.named_modules())
    kept, handles = {}, []

    def rounded(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, grid = args[0], scheme.activations
        assert grid is not None
        if not scheme.static:
            return (quantize_tokens(x, grid),)
        scale, zero = torch.tensor(INPUT_SCALE), torch.tensor(0.0)
        return (from_grid(to_grid(x.float(), scale, zero, grid), scale, zero).to(x.dtype),)

    try:
        for weights, _ in quantized_blocks(model, scheme, ignore):
            for name, weight in weights.items():
                kept[name] = modules[name].weight.data
                modules[name].weight.data = weight.dequantized()
                if scheme.activations is not None:
                    handles.append(modules[name].register_forward_pre_hook(rounded))
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in kept.items():
            modules[name].weight.data = weight
