"""Weights of an engine written as a Hugging Face directory, a layer gathered at a time and a file held at a time by rank 0.

Adapters are merged layer by layer, by their own code: each layer is put into a model without weights, merged there on the
CPU and taken out again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from calibtrain.config import ModelConfig
from calibtrain.distributed import is_main_rank, wait_for_main
from calibtrain.models.four_bit import dense, is_four_bit, is_packed
from calibtrain.models.policy import Policy, unwrapped
from calibtrain.models.sharding import full_shape, gathered
from calibtrain.spectral.shared_rotation import SharedRotationLinear

FILE_BYTES = 2**30
"""A file ends with the layer before the one that would make it larger: rank 0 holds one file at a time."""

Unit = list[tuple[str, nn.Parameter]]
"""A layer's parameters, or the consecutive ones before, between or behind layers."""


def write_in_files(
    policy: Policy,
    target: Path,
    make: Callable[[], LayerMerger],
    describe: Callable[[], Any],
    name_of: Callable[[str], str | None] = lambda name: name,
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the policy's weights, merged by `make()`, and what transformers writes beside them. Collective.

    describe: the model as it is written, without weights; its config goes with them. name_of: a causal model's name to that
    in `describe()`, None for what is left out. `more`: weights besides, by their names there. `make` and `describe` are
    called on rank 0 alone; what fails there is raised on all.
    """
    files = _files(policy, FILE_BYTES)
    names = [_file_name(number, len(files)) for number in range(1, len(files) + 1)]
    main = is_main_rank()
    weight_map: dict[str, str] = {}
    made: list[Any] = []
    size = 0

    def write(units: Sequence[dict[str, Tensor]], name: str, last: bool) -> None:
        nonlocal size
        if not made:
            target.mkdir(parents=True, exist_ok=True)
            made.extend((make(), describe()))
            if lost := sorted(made[0].parameters.keys() - {name for name, _ in policy.named_parameters()}):
                raise RuntimeError(f"export lost weights: missing {lost[:4]}")
            write_beside(made[1], target)
        merger, model = made
        found: dict[str, Tensor] = {}
        for unit in units:
            found |= {new: one for old, one in merger(unit).items() if (new := name_of(old)) is not None}
        if last:
            kept = {new: one for old, one in merger.buffers(policy).items() if (new := name_of(old)) is not None}
            found |= {**kept, **(more or {})}
        found = _as_saved(model, found)
        save_file(found, target / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(found, name))
        size += sum(one.numel() * one.element_size() for one in found.values())
        if last and len(files) > 1:
            totals = {"total_parameters": model.num_parameters(), "total_size": size}
            index = {"metadata": totals, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (target / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    for units, name in zip(files, names, strict=True):
        whole = [whole_weights(unit, keep=main) for unit in units]
        wait_for_main(partial(write, whole, name, name == names[-1]))
        del whole  # before the next file's come


def write_beside(model: Any, target: Path) -> None:
    """What transformers writes beside the weights: config.json, generation_config.json, a model's own code."""
    model.save_pretrained(target, state_dict={})
    for file in target.glob("model*.safetensors"):
        file.unlink()


class LayerMerger:
    """Takes a layer's weights by the policy's names and gives those of the plain model: merged, and in its dtype.

    `model`: the policy's model as it trains, with its adapters, on the meta device; its buffers are real. `finish` is called
    once the weights that `carries` names are in their places, to change them there.
    """

    def __init__(
        self,
        model: Any,
        config: ModelConfig,
        dtype: torch.dtype,
        carries: str = "",
        finish: Callable[[Any], None] = lambda model: None,
    ) -> None:
        self.policy, self.dtype, self.carries, self.finish = Policy(model), dtype, carries, finish
        # Merged in fp32: bf16 products of nearly the identity would lose the rotation; and a base in four bits is rounded
        # once already.
        self.wide = config.adapter is not None or is_four_bit(config)
        self.wrappers = dict(_wrappers(self.policy))
        self.prefix = "model.base_model.model." if hasattr(model, "get_base_model") else "model."
        self.places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in self.policy.modules():
            for name, one in module._parameters.items():
                if one is not None:
                    self.places.setdefault(one, []).append((module, name))
        self.parameters = dict(self.policy.named_parameters())

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The plain model's weights of a layer, all of whose are given; the memory of `weights` may be written on."""
        lost = sorted(weights.keys() - self.parameters.keys())
        if lost:
            raise RuntimeError(f"export lost weights: unexpected {lost[:4]}")
        for name, value in weights.items():
            self._put(name, nn.Parameter(value.float() if self.wide else value, requires_grad=False))
        for wrapper in {self._wrapper(name) for name in weights} - {None}:
            layer: Any = self.policy.get_submodule(str(wrapper))
            if isinstance(layer, SharedRotationLinear):
                layer.base.weight.copy_(layer.merged_weight())
            else:
                layer.merge()
        if self.wide:
            for name in weights:
                self._put(name, nn.Parameter(self._get(name).to(self.dtype), requires_grad=False))
        if self.carries in weights:
            self.finish(unwrapped(self.policy.model))
        plain = {new: self._get(name).detach() for name in weights if (new := self._plain_name(name)) is not None}
        for name in weights:
            self._put(name, self.parameters[name])
        return plain

    def buffers(self, policy: Policy) -> dict[str, Tensor]:
        """Buffers that are saved with the weights, as `policy` has them."""
        saved = self.policy.state_dict().keys()
        return {
            new: one.detach().cpu().clone()
            for name, one in policy.named_buffers()
            if name in saved and (new := self._plain_name(name)) is not None
        }

    def _put(self, name: str, value: nn.Parameter) -> None:
        for module, attribute in self.places[self.parameters[name]]:
            module._parameters[attribute] = value

    def _get(self, name: str) -> Tensor:
        module, attribute = self.places[self.parameters[name]][0]
        found = module._parameters[attribute]
        assert found is not None
        return found.data

    def _wrapper(self, name: str) -> str | None:
        path = name
        while "." in path:
            path = path.rpartition(".")[0]
            if path in self.wrappers:
                return path
        return None

    def _plain_name(self, name: str) -> str | None:
        """Name in the model without adapters; None for what belongs to an adapter."""
        wrapper = self._wrapper(name)
        if wrapper is not None:
            inner = f"{wrapper}.{self.wrappers[wrapper]}."
            if not name.startswith(inner):
                return None
            name = f"{wrapper}.{name.removeprefix(inner)}"
        return name.removeprefix(self.prefix)


def _wrappers(policy: Policy) -> Iterator[tuple[str, str]]:
    """(name, attribute of the layer within) of the layers around which an adapter lies."""
    for name, module in policy.named_modules():
        if isinstance(module, SharedRotationLinear):
            yield name, "base"
        elif hasattr(module, "base_layer") and hasattr(module, "merge"):
            yield name, "base_layer"


def _files(policy: Policy, most: int) -> list[list[Unit]]:
    """The layers of each file, in the model's order: the same on every rank."""
    files: list[list[Unit]] = [[]]
    size = 0
    for _, group in groupby(policy.named_parameters(), key=lambda one: _layer(one[0])):
        unit = list(group)
        own = sum(full_shape(one).numel() * _width(one) for _, one in unit)
        if files[-1] and size + own > most:
            files.append([])
            size = 0
        files[-1].append(unit)
        size += own
    return files


def _width(parameter: Any) -> int:
    """Bytes of an element as it is exported."""
    return int((parameter.quant_state if is_packed(parameter) else parameter).dtype.itemsize)


def _layer(name: str) -> str:
    found = re.match(r".*?\.\d+\.", name)
    return "" if found is None else found[0]


def whole_weights(unit: Unit, *, keep: bool) -> dict[str, Tensor]:
    """A layer's weights on the CPU, unpacked, on the ranks that `keep` them. Collective."""
    with gathered(one for _, one in unit):
        return {name: dense(one).cpu().clone() for name, one in unit} if keep else {}


def _as_saved(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes in which transformers saves a model: a layer's experts, say, one by one."""
    from transformers.core_model_loading import revert_weight_conversion

    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    kept = {name: one for name, one in weights.items() if name not in left_out}
    return {name: one.contiguous() for name, one in revert_weight_conversion(model, kept).items()}


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
