"""Activations and the key-value cache as an engine computes them: on the scheme's grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.quantization.affine import Grid, from_grid, quantize_tokens, to_grid
from calibtrain.quantization.blocks import Inputs, run_block
from calibtrain.quantization.inputs import over_ranks
from calibtrain.quantization.schemes import Scheme


@contextmanager
def quantized_inputs(layers: Mapping[str, nn.Module], scheme: Scheme, scales: Mapping[str, Tensor]) -> Iterator[None]:
    """Let layers read their activations on the scheme's grid, as an engine computes them."""
    grid = scheme.activations
    if grid is None:
        yield
        return

    def hook(name: str) -> Callable[..., Any]:
        def quantize(module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0]
            if not scheme.static:
                return (quantize_tokens(x, grid), *args[1:])
            if name not in scales:
                return args
            scale = scales[name].float().to(x.device)
            zero = torch.zeros_like(scale)
            return (from_grid(to_grid(x.float(), scale, zero, grid), scale, zero).to(x.dtype), *args[1:])

        return quantize

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Cache:
    """Takes keys and values as the key-value cache does, and keeps the largest of each."""

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}

    def update(self, keys: Tensor, values: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """As transformers' caches: what attention reads."""
        for name, states in (("k_scale", keys), ("v_scale", values)):
            here = states.abs().amax().float()
            self.largest[name] = torch.maximum(self.largest[name], here) if name in self.largest else here
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        """Of what came before: nothing."""
        return 0


@torch.no_grad()
def cache_scales(
    block: nn.Module,
    index: int,
    name: str,
    batches: Sequence[Inputs],
    layers: Mapping[str, nn.Module],
    scheme: Scheme,
    scales: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Float8 scales of a block's keys, rotated as they are kept, and values. UserError where it takes no cache."""
    cache = _Cache()
    with quantized_inputs(layers, scheme, scales):
        for batch in batches:
            arguments = {**batch.arguments[index], "past_key_values": cache, "use_cache": True}
            given = [*batch.arguments[:index], arguments]
            run_block(block, index, replace(batch, arguments=given))
    attention = next((key for key, one in block.named_modules() if getattr(one, "layer_idx", None) is not None), None)
    if not cache.largest or attention is None:
        raise UserError(f"--kv-cache: {name} hands no keys and values to a cache; leave the option out")
    for largest in cache.largest.values():
        over_ranks(largest, dist.ReduceOp.MAX)
    highest = Grid(8, floating=True).high
    return {f"{name}.{attention}.{key}": one / highest for key, one in cache.largest.items()}
