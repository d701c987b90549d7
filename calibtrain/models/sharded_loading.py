"""A Hugging Face model whose weights lie in parts from the start: each rank reads its own part of each from safetensors.

No rank holds the model at any time, on the host or on the device, and nothing is sent: N ranks read the files once between
them. transformers' own way (HfDeepSpeedConfig) maps all of it on rank 0 and sends every weight twice.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.models.sharding import Partition, Read, parameters_on_meta, replace_parameters

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Place = tuple[Path, str]
"""A file and the key of a tensor in it."""


def safetensors_places(find: Callable[[str], Path | None]) -> dict[str, Place] | None:
    """Where each tensor of a model lies; `find` gives a file of its source by name. None without safetensors.

    Raises OSError, ValueError or SafetensorError for files that are damaged or not all there.
    """
    index = find(INDEX)
    if index is not None:
        weights = _weight_map(index)
        files = {name: find(name) for name in sorted(set(weights.values()))}
        if lost := [name for name, file in files.items() if file is None]:
            raise OSError(f"{index.name} names {lost[0]}, which is not there")
        return {key: (file, key) for key, name in weights.items() if (file := files[name]) is not None}
    whole = find(WEIGHTS)
    if whole is None:
        return None
    with safe_open(whole, "pt") as opened:
        return {key: (whole, key) for key in opened.keys()}  # noqa: SIM118


def _weight_map(index: Path) -> dict[str, str]:
    found = json.loads(index.read_text(encoding="utf-8"))
    weights = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise ValueError(f"{index.name} has no weight_map of tensors to files")
    return weights


def load_in_parts(
    build: Callable[[], Any], places: dict[str, Place], zero: dict[str, Any], dtype: torch.dtype, source: str
) -> tuple[Any, list[str]]:
    """The model that `build` makes, in evaluation mode, its weights in parts and in `dtype`, and what the files lack.

    `zero` is the DeepSpeed config that its engine gets. What is not in the files is drawn by rank 0, as the model says.
    Raises UserError, with `source` in it, for a weight of another shape than the model's. Collective.
    """
    with torch.random.fork_rng(devices=[]), parameters_on_meta():
        model = build()
    model.tie_weights()
    partition = Partition(zero)
    plain, converted = _sources(model, places)
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, one in model.named_parameters(remove_duplicate=False):
        names[one].append(name)
    waiting: dict[str, nn.Parameter] = {name: one for one, those in names.items() for name in those}
    made: dict[nn.Parameter, nn.Parameter] = {}

    def take(name: str, shape: tuple[int, ...], read: Read) -> None:
        one = waiting.get(name)
        if one is None or one in made:
            return
        if tuple(one.shape) != tuple(shape):
            raise UserError(
                f"{source}: {name} is {list(shape)} in its files, and its config.json makes it {list(one.shape)}"
            )
        made[one] = partition.parameter(one, dtype, read)

    for name, place in plain.items():
        if name in waiting:
            take(name, _shape(place), _reader(place))
    for parts in converted:  # a layer's experts, say, whole on every rank for a moment
        for name, value in parts(model).items():
            take(name, tuple(value.shape), _sliced(value))
    missing = {one: those[0] for one, those in names.items() if one not in made}
    for one, value in _drawn(model, missing).items():
        made[one] = partition.parameter(one, dtype, _sliced(value))
    replace_parameters(model, list(made.items()))
    _fill_buffers(model, plain, partition.device)
    if missing:
        logger.debug("%s: its files lack %s", source, ", ".join(missing.values()))
    return model.eval(), sorted(missing.values())


def _sources(model: Any, places: dict[str, Place]) -> tuple[dict[str, Place], list[Callable[[Any], dict[str, Tensor]]]]:
    """Which tensor of the files is which of the model's, and what makes those that transformers puts together of several."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    known = model.state_dict(keep_vars=True)
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    plain: dict[str, Place] = {}
    groups: dict[str, Any] = {}
    for key in sorted(places, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known:
            continue
        if pattern is None:
            plain[name] = places[key]
            continue
        converter = by_pattern[pattern]
        if name not in groups:
            groups[name] = WeightConverter(
                converter.source_patterns, converter.target_patterns, operations=converter.operations
            )
        groups[name].add_tensor(name, key, pattern, _whole(places[key]))

    def convert(name: str, group: Any) -> Callable[[Any], dict[str, Tensor]]:
        def found(model: Any) -> dict[str, Tensor]:
            values = group.convert(name, model=model, config=model.config)
            return {key: one[0] if isinstance(one, list) else one for key, one in values.items()}

        return found

    return plain, [convert(name, group) for name, group in groups.items()]


def _shape(place: Place) -> tuple[int, ...]:
    with safe_open(place[0], "pt") as opened:
        return tuple(opened.get_slice(place[1]).get_shape())


def _reader(place: Place) -> Read:
    """Reads the rows that hold the elements, and no more. The file is open no longer: its pages are no memory of ours."""

    def read(start: int, end: int) -> Tensor:
        with safe_open(place[0], "pt") as opened:
            piece = opened.get_slice(place[1])
            shape = piece.get_shape()
            if not shape:
                return opened.get_tensor(place[1]).reshape(-1)[start:end]
            width = 1
            for size in shape[1:]:
                width *= size
            first = start // width if width else 0
            rows = piece[first : -(-end // width) if width else 0].reshape(-1)
            return rows[start - first * width : end - first * width].clone()

    return read


def _sliced(value: Tensor) -> Read:
    return lambda start, end: value.detach().reshape(-1)[start:end]


def _whole(place: Place) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(place[0], "pt") as opened:
            return opened.get_tensor(place[1]).clone()

    return read


def _drawn(model: Any, missing: dict[nn.Parameter, str]) -> dict[nn.Parameter, Tensor]:
    """Starting values of weights that no file has, a module at a time; those of rank 0 for all. Collective."""
    found: dict[nn.Parameter, Tensor] = {}
    for module in model.modules():
        own = {name: one for name, one in module._parameters.items() if one in missing and one not in found}
        for name, one in own.items():
            module._parameters[name] = nn.Parameter(torch.zeros(one.shape, dtype=one.dtype), one.requires_grad)
        if own:
            model._init_weights(module)
        for name, one in own.items():
            value = module._parameters[name].detach()
            module._parameters[name] = one
            if dist.is_initialized() and dist.get_world_size() > 1:
                device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
                moved = value.to(device)
                dist.broadcast(moved, 0)
                value = moved.cpu()
            found[one] = value
    return found


def _fill_buffers(model: nn.Module, plain: dict[str, Place], device: torch.device) -> None:
    """Buffers are small and whole on every rank: saved ones as they were saved, the others as the model makes them."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            place = plain.get(f"{prefix}.{name}" if prefix else name)
            value = buffer if place is None else _whole(place)().to(buffer.dtype)
            module._buffers[name] = value.to(device)
