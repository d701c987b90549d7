"""A quantised model on disk: a compressed-tensors directory, which transformers and vLLM load as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.models.quantized import check_full_precision
from calibtrain.quantization.affine import QuantizedWeight
from calibtrain.quantization.formats import packing_of, quantization_config
from calibtrain.quantization.schemes import Scheme

SHARD_BYTES = 2 * 2**30
"""Weights are written in files of at most so many bytes."""

CARRIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
    "chat_template.json",
    "generation_config.json",
    "*processor_config.json",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""Files of the source that the quantised model needs beside its weights, and what they may be used for."""


class ModelWriter:
    """Writes a quantised model block by block, whole or not at all.

    Blocks are kept beside the target in TARGET.partial, from which an interrupted run goes on; `finish` gathers them.
    """

    def __init__(self, source: Path, target: Path, scheme: Scheme, mark: str, *, untied: bool = False) -> None:
        """source: Hugging Face directory of the model in full precision. mark: what the blocks are made from; blocks of
        another mark are thrown away. untied: the head is no longer the embedding.

        Raises UserError where compressed-tensors is missing, the source is quantised, the target exists or cannot be
        written, or TARGET.partial is not this writer's.
        """
        self.source, self.target, self.scheme = Path(source), Path(target), scheme
        self.partial = self.target.with_name(self.target.name + ".partial")
        self.packing = packing_of(scheme)
        self.settings = _untied(read_config(self.source)) if untied else read_config(self.source)
        if os.path.lexists(self.target):
            raise UserError(f"{self.target}: exists already; give another place, or move or remove it")
        progress = self.partial / "progress.json"
        if os.path.lexists(self.partial) and not progress.is_file():
            raise UserError(f"{self.partial}: is in the way and not an interrupted run's; move or remove it")
        with self._writing():
            if progress.is_file() and _mark_of(progress) != mark:
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
            _write_text(progress, json.dumps({"mark": mark}))

    def done(self) -> int:
        """How many blocks, from the first on, are written."""
        count = 0
        while self._block(count).is_file():
            count += 1
        return count

    def add_block(
        self,
        index: int,
        quantized: Mapping[str, QuantizedWeight],
        others: Mapping[str, Tensor],
        input_scales: Mapping[str, Tensor] | None = None,
        kv_scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write block `index`.

        quantized: by the layer's name ("model.layers.0.mlp.up_proj"); others: what stays, by the parameter's name
        ("model.layers.0.mlp.up_proj.bias"). input_scales: where activations are static, one number for each quantised
        layer. kv_scales: where the cache is quantised, by the attention's name with .k_scale and .v_scale behind it.
        """
        tensors: dict[str, Tensor] = {}
        for name, weight in quantized.items():
            tensors |= {f"{name}.{key}": value for key, value in self.packing.pack(weight).items()}
            if self.scheme.static:
                tensors[f"{name}.input_scale"] = (input_scales or {})[name].reshape(1).to(weight.dtype)
        dtype = next((weight.dtype for weight in quantized.values()), torch.float32)
        tensors |= {name: scale.reshape(1).to(dtype) for name, scale in (kv_scales or {}).items()}
        tensors |= others
        with self._writing():
            _save(tensors, self._block(index))

    def read_block(self, index: int) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """The quantised weights and the other parameters of a written block, as they were given."""
        tensors = self._tensors(index)
        quantized: dict[str, QuantizedWeight] = {}
        for name in [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]:
            parts = {key: tensors.pop(f"{name}.{key}") for key in self.packing.keys}
            quantized[name] = self.packing.unpack(parts)
        scales = (".input_scale", ".k_scale", ".v_scale")
        return quantized, {name: one for name, one in tensors.items() if not name.endswith(scales)}

    def read_scales(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`input_scales` and `kv_scales` of a written block, as `add_block` takes them, in the model's dtype."""
        tensors = self._tensors(index)
        end = ".input_scale"
        inputs = {name.removesuffix(end): one for name, one in tensors.items() if name.endswith(end)}
        return inputs, {name: one for name, one in tensors.items() if name.endswith((".k_scale", ".v_scale"))}

    def finish(self, others: Mapping[str, Tensor], ignored: Sequence[str]) -> None:
        """Write what lies outside the blocks (`others`, by the parameter's name) and let the target appear.

        ignored: names of the linear layers that stay in full precision; a head is among them by itself.
        """
        model = self.partial / "model"
        with self._writing():
            shutil.rmtree(model, ignore_errors=True)
            model.mkdir()
            dtype = self._gather(_stored_once(others, self.settings), model)
            config = {key: value for key, value in self.settings.items() if key != "torch_dtype"}
            names = list(dict.fromkeys(["lm_head", *ignored]))
            config |= {"dtype": dtype, "quantization_config": quantization_config(self.scheme, names)}
            for pattern in CARRIED:
                for file in self.source.glob(pattern):
                    if file.is_file():
                        shutil.copyfile(file, model / file.name)
            for folder in self.source.glob("additional_chat_templates"):
                shutil.copytree(folder, model / folder.name)
            # Last, since a directory with a config.json is taken for a model.
            _write_text(model / "config.json", json.dumps(config, indent=2) + "\n")
            os.rename(model, self.target)
        shutil.rmtree(self.partial, ignore_errors=True)

    def abandon(self) -> None:
        """Leave nothing behind where no block is written; written blocks are kept to go on from."""
        if not self.done():
            shutil.rmtree(self.partial, ignore_errors=True)

    def _gather(self, others: Mapping[str, Tensor], model: Path) -> str:
        """Write all tensors in shards, holding one in memory. Returns the dtype of the quantised layers."""
        shards: list[dict[str, int]] = []
        held: dict[str, Tensor] = {}
        size, dtype = 0, None
        for name, tensor in self._all(others):
            if name.endswith(".weight_scale"):
                dtype = str(tensor.dtype).removeprefix("torch.")
            if held and size + tensor.nbytes > SHARD_BYTES:
                shards.append(_write_shard(held, model, len(shards)))
                held, size = {}, 0
            held[name], size = tensor, size + tensor.nbytes
        shards.append(_write_shard(held, model, len(shards)))
        _name_shards(shards, model)
        return dtype or "float32"

    def _all(self, others: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from others.items()
        for index in range(self.done()):
            with safe_open(self._block(index), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, file.get_tensor(name)

    def _tensors(self, index: int) -> dict[str, Tensor]:
        return load_file(self._block(index))

    def _block(self, index: int) -> Path:
        return self.partial / f"block-{index:05d}.safetensors"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tell what the disk refuses in one line; what is of no use is removed."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            kept = self.done() > 0
            shutil.rmtree(self.partial / "model" if kept else self.partial, ignore_errors=True)
            then = "; the same command goes on from the blocks that are written" if kept else ""
            raise UserError(f"{self.target}: cannot be written ({error}){then}") from error


def read_config(source: Path) -> dict[str, Any]:
    """config.json of a model that may be quantised. Raises UserError where there is none, or the model already is."""
    file = source / "config.json"
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a Hugging Face model directory") from error
    check_full_precision(source, settings)
    return settings


def _untied(settings: dict[str, Any]) -> dict[str, Any]:
    """A config whose head is a matrix of its own, said wherever the config speaks of it."""
    nested = {key: _untied(one) for key, one in settings.items() if key == "text_config" and isinstance(one, dict)}
    return {**settings, **nested, "tie_word_embeddings": False}


def _stored_once(others: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without a head that is the embedding."""
    nested = settings.get("text_config", {})
    tied = settings.get("tie_word_embeddings", nested.get("tie_word_embeddings", False))
    seen, stored = set(), {}
    for name, tensor in others.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place in seen or (tied and name.endswith("lm_head.weight")):
            continue
        seen.add(place)
        stored[name] = tensor
    return stored


def _mark_of(progress: Path) -> Any:
    try:
        return json.loads(progress.read_text(encoding="utf-8")).get("mark")
    except (OSError, ValueError, AttributeError):
        return None


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".tmp")
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(_apart(own), partial, metadata={"format": "pt"})
    os.replace(partial, path)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, where needed: safetensors refuses tensors that share memory, as views of one parameter do."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        if place in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()
        seen.add(place)
    return tensors


def _write_shard(tensors: Mapping[str, Tensor], model: Path, index: int) -> dict[str, int]:
    _save(tensors, model / f"shard-{index}")
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _name_shards(shards: Sequence[Mapping[str, int]], model: Path) -> None:
    """One shard is model.safetensors; more have an index."""
    if len(shards) == 1:
        os.replace(model / "shard-0", model / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(model / f"shard-{index}", model / name)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(sum(shard.values()) for shard in shards)
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    _write_text(model / "model.safetensors.index.json", index_text + "\n")
