"""A block rounded layer after layer, each towards what the block in full precision hands on, where answers depend on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.quantization.activations import quantized_inputs
from calibtrain.quantization.affine import QuantizedWeight
from calibtrain.quantization.blocks import Inputs, matrix_of, run_block, stages_of
from calibtrain.quantization.inputs import check_finite
from calibtrain.quantization.observers import static_input_scales
from calibtrain.quantization.preserve import Weights
from calibtrain.quantization.rounding import Moments, corrected, round_compensated
from calibtrain.quantization.schemes import Scheme

DAMPING, RIDGE = 0.1, 3.0
"""Shares of the mean second moment, added to every input's: in rounding, and in making up for what the layers before lack.
With a few hundred texts smaller ones fit those, and serve new questions worse (docs/quantization.md)."""
OWN_INPUT = ""
"""The block's own input, as a place in the residual stream; others are modules that read it."""


class _SeenAllError(Exception):
    """Ends a run of a block whose rest nobody looks at."""


@dataclass(slots=True)
class _Trace:
    """What one batch showed in a block."""

    read: dict[str, Tensor] = field(default_factory=dict)  # by layer, where it was asked for
    made: dict[str, Tensor] = field(default_factory=dict)  # by layer
    stream: dict[str, Tensor] = field(default_factory=dict)  # what each norm reads, and the block itself
    output: Tensor | None = None


@torch.no_grad()
def match_block(
    block: nn.Module,
    reference: nn.Module,
    index: int,
    batches: Sequence[Inputs],
    references: Sequence[Inputs],
    layers: Mapping[str, nn.Module],
    scheme: Scheme,
    weights: Weights,
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """Quantise the `layers` of a block in place. Returns their weights, and scales of their inputs where those are static.

    reference: the block in full precision; references: what it reads, where `batches` are what the rounded blocks before
    hand on. A layer that writes into the residual stream makes up for what the stream lacks there, too.
    Raises UserError where a layer reads NaN or infinite numbers.
    """
    twins = dict(zip(layers, _same_modules(block, reference, layers), strict=True))
    joins = joins_of(reference, index, references[0], twins)
    wanted = [_wanted(reference, index, other, twins, set(joins.values())) for other in references]
    quantized: dict[str, QuantizedWeight] = {}
    scales: dict[str, Tensor] = {}
    for stage in stages_of(block, index, batches[0], layers):
        some = {name: layers[name] for name in stage}
        if scheme.static:
            scales |= static_input_scales(block, index, batches, some, scheme)
        moments = {name: Moments.of(matrix_of(one)) for name, one in some.items()}
        for number, (batch, other) in enumerate(zip(batches, wanted, strict=True)):
            with quantized_inputs(layers, scheme, scales):
                found = trace(block, index, batch, some, whole=False)
            for name in stage:
                check_finite(found.read[name], index, name)
                lacking = other.made.pop(name).float() - found.made[name].float()
                if name in joins:
                    lacking += other.stream[joins[name]].float() - found.stream[joins[name]].float()
                read, counted = found.read[name][batch.real], weights[name][number][batch.real]
                moments[name].update(read, lacking[batch.real], counted)
        for name, one in some.items():
            moments[name].all_reduce()
            better = corrected(matrix_of(one), moments[name], RIDGE)
            quantized[name] = round_compensated(better, moments[name].inputs, scheme, DAMPING, matrix_of(one).dtype)
            matrix_of(one).copy_(quantized[name].dequantized())
    return quantized, scales


def _wanted(
    reference: nn.Module, index: int, batch: Inputs, layers: Mapping[str, nn.Module], places: set[str]
) -> _Trace:
    """What the layers should make, and the residual stream at the `places` to which some of it is added."""
    found = trace(reference, index, batch, layers)
    return _Trace(made=found.made, stream={one: found.stream[one] for one in places})


def joins_of(block: nn.Module, index: int, batch: Inputs, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers whose output is added to the residual stream as it is, each with the place whose stream it is added to.

    Found by the numbers, not by names: stream + output is bit for bit what is read later on, or the block's own output.
    """
    seen = trace(block, index, batch, layers)
    places = list(seen.stream)
    assert seen.output is not None
    found: dict[str, str] = {}
    for name, made in seen.made.items():
        for place in places:
            behind = [*(seen.stream[one] for one in places if one != place), seen.output]
            before = seen.stream[place]
            if before.shape == made.shape and any(torch.equal(before + made, after) for after in behind):
                found.setdefault(name, place)  # a norm at the block's beginning reads what the block does
    return found


def trace(
    block: nn.Module, index: int, batch: Inputs, layers: Mapping[str, nn.Module], *, whole: bool = True
) -> _Trace:
    """Run a block on a batch and keep what its layers read and make, and the residual stream where a norm reads it.

    whole: to its end; else until all of the layers have run.
    """
    found = _Trace(stream={OWN_INPUT: batch.hidden})

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found.read[name], found.made[name] = args[0], output
            if not whole and len(found.made) == len(layers):
                raise _SeenAllError

        return hook

    def keep_stream(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.stream[name] = args[0]

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    for name, module in block.named_children():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1:
            handles.append(module.register_forward_pre_hook(keep_stream(name)))
    try:
        found.output = run_block(block, index, batch)
    except _SeenAllError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def _same_modules(block: nn.Module, reference: nn.Module, layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The reference's counterparts of the layers."""
    names = {id(module): name for name, module in block.named_modules()}
    return [reference.get_submodule(names[id(module)]) for module in layers.values()]
