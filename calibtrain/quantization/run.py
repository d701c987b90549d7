"""A model directory quantised block by block: fold, round, hand on what the rounded block makes, write."""

from __future__ import annotations

import copy
import hashlib
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.quantization.activations import cache_scales, quantized_inputs
from calibtrain.quantization.affine import quantize_weight
from calibtrain.quantization.awq import awq_block
from calibtrain.quantization.blocks import (
    Inputs,
    Text,
    first_inputs,
    matrices_in,
    matrix_of,
    run_block,
)
from calibtrain.quantization.directory import ModelWriter
from calibtrain.quantization.folds import Fold, folds_of, no_folds_reason
from calibtrain.quantization.matching import match_block
from calibtrain.quantization.observers import first_token_outliers, static_input_scales
from calibtrain.quantization.preserve import Weights, token_weights
from calibtrain.quantization.readers import (
    check_ignored,
    check_readable,
    fused_parameters,
    has_fused_experts,
    quantize_experts,
    routers,
    stored_names,
)
from calibtrain.quantization.rotation import rotation_of, why_not_rotated
from calibtrain.quantization.schemes import Scheme, fit_groups, is_ignored
from calibtrain.quantization.smoothquant import smooth_block
from calibtrain.quantization.streaming import StreamedModel

ALPHA, ROTATED_ALPHA = 0.8, 0.5
"""Of SmoothQuant where none is asked for; in a rotated model what its MLP multiplies alone is smoothed, and there .8 gives
the weights worse outliers than it takes from the activations."""

METHODS = ("minmax", "smoothquant", "awq", "preserve")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is quantised.

    ignore: layers left in full precision, as in `schemes.is_ignored`. alpha: SmoothQuant's.
    rotate: turn the residual stream first (`rotation`); a head that is the embedding becomes a matrix of its own.
    """

    scheme: Scheme
    method: str
    ignore: tuple[str, ...] = ()
    alpha: float = ALPHA
    rotate: bool = False
    seed: int = 0
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class _Twin:
    """Beside the model that is rounded, the one in full precision."""

    weights: Weights
    references: Sequence[Inputs]  # what its block reads


@dataclass(slots=True)
class _Facts:
    """What is told of a run beside the model."""

    folds: dict[str, Any] = field(default_factory=dict)
    massive: dict[str, Any] = field(default_factory=dict)


def quantize_directory(
    source: Path,
    target: Path,
    texts: Sequence[Text],
    settings: Settings,
    *,
    on_block: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Quantise the Hugging Face directory `source` into `target`, whole or not at all; texts calibrate it.

    Goes on where an interrupted run of the same source, texts and settings stopped. Returns plain facts: the scheme as it
    was taken, what stayed in full precision, folds, massive activations, seconds, peak memory in GB. Raises UserError,
    before anything is written, for an unknown method, a quantised source and layers that the scheme does not fit.
    """
    started = time.monotonic()
    streamed, chosen, ignored, scheme = _opened(source, settings)
    fused = has_fused_experts(
        streamed.model
    )  # they are not read back from what is written, so that such runs start anew
    writer = ModelWriter(source, target, scheme, _mark(source, texts, settings), untied=settings.rotate)
    facts = _Facts()
    try:
        batches = references = first_inputs(streamed.model, texts, streamed.pad_id)
        weights = None
        if settings.method == "preserve":
            weights = token_weights(streamed, chosen, texts, batches, seed=settings.seed)
        count = len(streamed.blocks)
        for index in range(count):
            block = streamed.bring(index)
            reference = copy.deepcopy(block) if weights is not None else None
            layers = {name: one for name, one in chosen.items() if name.startswith(f"{streamed.name_of(index)}.")}
            if index < writer.done() and not fused:
                scales = _restore(writer, index, block, streamed.name_of(index), layers)
            else:
                twin = None if weights is None else _Twin(weights, references)
                scales = _quantize_block(streamed, index, batches, layers, scheme, settings, twin, writer, facts)
            with quantized_inputs(layers, scheme, scales), torch.no_grad():
                batches = [one.with_hidden(run_block(block, index, one)) for one in batches]
                if reference is not None:
                    references = [one.with_hidden(run_block(reference, index, one)) for one in references]
            streamed.drop(index)
            on_block(index + 1, count)
        writer.finish(streamed.others(), [*ignored, *routers(streamed.model)])
    finally:
        writer.abandon()
    return {
        "scheme": asdict(scheme),
        "label": scheme.label,
        "method": settings.method,
        "samples": len(texts),
        "asked_group_size": settings.scheme.group_size,
        "full_precision": [*ignored, "embeddings, norms and head"],
        "folds": facts.folds,
        "no_folds": None if settings.method == "minmax" else no_folds_reason(streamed.model),
        "rotated": settings.rotate,
        "massive_first_tokens": facts.massive,
        "seconds": round(time.monotonic() - started, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def check(source: Path, settings: Settings) -> None:
    """Raise UserError for whatever `quantize_directory` would refuse, before there are texts; no block is read."""
    _opened(source, settings)


def _opened(source: Path, settings: Settings) -> tuple[StreamedModel, dict[str, nn.Module], list[str], Scheme]:
    """The model, the layers to quantise by full name, those that stay, and the scheme that fits."""
    if settings.method not in METHODS:
        raise UserError(f"--method: {settings.method!r} is none of {', '.join(METHODS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    streamed = StreamedModel(source, trust_remote_code=settings.trust_remote_code, device=device)
    chosen, ignored = _chosen(streamed, settings)
    check_readable(streamed.model, settings.scheme)
    if settings.rotate:
        if (reason := why_not_rotated(streamed.model)) is not None:
            raise UserError(f"--rotate: {reason}; leave the option out")
        streamed.rotate(rotation_of(streamed.model, settings.seed))
    widths = {name: matrix_of(one).shape[1] for name, one in chosen.items()}
    return streamed, chosen, ignored, fit_groups(settings.scheme, widths | _experts_widths(streamed))


def _chosen(streamed: StreamedModel, settings: Settings) -> tuple[dict[str, nn.Module], list[str]]:
    """The layers to quantise by full name, and the names of those that stay."""
    matrices: dict[str, nn.Module] = {}
    for index, block in enumerate(streamed.blocks):
        matrices |= matrices_in(block, f"{streamed.name_of(index)}.")
    ignored = [name for name in matrices if is_ignored(name, settings.ignore)]
    unknown = [one for one in settings.ignore if not any(is_ignored(name, (one,)) for name in (*matrices, "lm_head"))]
    if unknown:
        known = list(dict.fromkeys(name.rpartition(".")[2] for name in matrices))
        raise UserError(f"--ignore: no layer is called {unknown[0]!r}; there are {', '.join(known)}")
    chosen = {name: one for name, one in matrices.items() if name not in ignored}
    if not chosen:
        raise UserError("--ignore: leaves no layer to quantise")
    check_ignored(list(matrices), ignored)
    return chosen, ignored


def _experts_widths(streamed: StreamedModel) -> dict[str, int]:
    return {
        name: parameter.shape[-1]
        for index, block in enumerate(streamed.blocks)
        for name, parameter in fused_parameters(block, f"{streamed.name_of(index)}.").items()
    }


def _quantize_block(
    streamed: StreamedModel,
    index: int,
    batches: Sequence[Inputs],
    layers: Mapping[str, nn.Module],
    scheme: Scheme,
    settings: Settings,
    twin: _Twin | None,
    writer: ModelWriter,
    facts: _Facts,
) -> dict[str, Tensor]:
    """Quantise one block in place and write it. Returns the scales of its inputs, where they are static."""
    block, name = streamed.blocks[index], streamed.name_of(index)
    folds = folds_of(streamed.model, block)
    massive = first_token_outliers(block, index, batches, layers)
    facts.massive |= {layer: asdict(one) for layer, one in massive.items()}
    ranges: Mapping[str, tuple[Tensor, Tensor]] = {}
    if settings.method == "smoothquant" or (settings.method == "preserve" and scheme.activations is not None):
        facts.folds[name] = _smoothed(block, index, batches, folds, settings)
    elif settings.method == "awq":
        ranges = awq_block(block, index, batches, folds, scheme, layers)
        facts.folds[name] = [fold.source for fold in folds]
    if twin is not None:
        # A copy of the folded block, so that both compute alike but for rounding.
        full = copy.deepcopy(block)
        quantized, scales = match_block(block, full, index, batches, twin.references, layers, scheme, twin.weights)
    else:
        scales = static_input_scales(block, index, batches, layers, scheme) if scheme.static else {}
        quantized = {
            layer: quantize_weight(matrix_of(one), scheme.weights, scheme.group_size, *ranges.get(layer, ()))
            for layer, one in layers.items()
        }
        with torch.no_grad():
            for layer, one in quantized.items():
                matrix_of(layers[layer]).copy_(one.dequantized())
    experts = fused_parameters(block, f"{name}.")
    quantized |= quantize_experts(streamed.model, block, f"{name}.", scheme) if experts else {}
    kept = {f"{name}.{key}": value for key, value in block.state_dict().items() if f"{name}.{key}" not in experts}
    kept = stored_names(streamed.model, kept) if experts else kept
    others = {key: value for key, value in kept.items() if key.removesuffix(".weight") not in quantized}
    cache = cache_scales(block, index, name, batches, layers, scheme, scales) if scheme.kv_cache else None
    writer.add_block(index, quantized, others, scales, cache)
    return scales


def _smoothed(
    block: nn.Module, index: int, batches: Sequence[Inputs], folds: Sequence[Fold], settings: Settings
) -> dict[str, Any]:
    if not settings.rotate:
        return smooth_block(block, index, batches, folds, settings.alpha, further=settings.method == "preserve")
    # Turned, nothing stands out any more but what the MLP multiplies.
    products = [fold for fold in folds if fold.form == "rows" and not fold.part.endswith("o_proj")]
    return smooth_block(block, index, batches, products, settings.alpha, further=True)


def _restore(
    writer: ModelWriter, index: int, block: nn.Module, name: str, layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Give a block the weights that an interrupted run has written."""
    quantized, others = writer.read_block(index)
    with torch.no_grad():
        for layer, one in quantized.items():
            matrix_of(layers[layer]).copy_(one.dequantized())
        block.load_state_dict({key.removeprefix(f"{name}."): value for key, value in others.items()}, strict=False)
    return writer.read_scales(index)[0]


def _mark(source: Path, texts: Sequence[Text], settings: Settings) -> str:
    """Hash of all that the blocks are made from."""
    digest = hashlib.sha256()
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb") as stream:
            while part := stream.read(1 << 22):
                digest.update(part)
    digest.update(json.dumps([[list(one.prompt), list(one.answer)] for one in texts]).encode())
    digest.update(json.dumps(asdict(settings), sort_keys=True).encode())
    return digest.hexdigest()
