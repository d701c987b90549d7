"""Tensors of a Hugging Face directory, one at a time: safetensors and JSON alone, nothing is ever unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.spectral.layouts import Part

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names of the dtypes that are analysed, and torch's."""
PLAIN = {*DTYPES, "BOOL", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "C64"}
DEQUANTISE = "give the model that it was made of, or dequantise it and save it with save_pretrained"
PACKED = ("weight", "qweight", "weight_packed", "_blocks")
"""Endings of the names of weights; of another dtype than these they are quantised."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it: "BF16"

    def read(self, part: Part | None = None) -> Tensor:
        """The tensor, or one matrix (out, in) of it, in its stored dtype and its own memory.

        Raises UserError where a value is NaN or infinite, or the file is not what it was.
        """
        if part is None:
            return self._finite(self._mapped().clone(), self.name)
        matrix = part.view(part.block(self._mapped())).clone(memory_format=torch.contiguous_format)
        return self._finite(matrix.reshape(-1, matrix.shape[-1]), part.name(self.name))

    def read_block(self, part: Part) -> Tensor:
        """The contiguous block that holds a matrix, as `read` does."""
        return self._finite(part.block(self._mapped()).clone(), self.name)

    def _mapped(self) -> Tensor:
        # Mapped anew each time: pages of a file that stays mapped would count as memory until all of it is in there.
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as file:
                return file.get_tensor(self.name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.file}: cannot read {self.name} ({error}); copy or download the file again"
            ) from None

    def _finite(self, tensor: Tensor, name: str) -> Tensor:
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise UserError(
                f"{self.file}: {bad} of {tensor.numel()} values of {name} are NaN or infinite; the model is broken, take "
                "an earlier checkpoint"
            )
        return tensor


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model directory: what config.json says and where each tensor lies."""

    path: Path
    settings: dict[str, Any]
    tensors: dict[str, Stored]


def open_model(path: Path) -> ModelFiles:
    """Where the tensors of a model directory lie; only headers are read.

    Raises UserError where it is no model directory, holds no safetensors or quantised ones, or a file is missing or broken.
    """
    if not path.exists():
        raise UserError(f"{path}: no such directory")
    if not path.is_dir():
        raise UserError(f"{path}: not a directory; give the Hugging Face directory that holds the model")
    settings_file = path / "config.json"
    if not settings_file.is_file():
        _refuse_other_formats(path)
        raise UserError(f"{path}: no model directory: it has no config.json and no adapter_config.json")
    settings = read_json(settings_file)
    if settings.get("quantization_config"):
        quantiser = settings["quantization_config"]
        method = quantiser.get("quant_method") if isinstance(quantiser, dict) else None
        raise UserError(f"{path}: quantised ({method or 'quantization_config'} in config.json); {DEQUANTISE}")
    single = (path / "model.safetensors").is_file() or not (path / INDEX).is_file()
    tensors = _single(path) if single else _sharded(path)
    check_plain(path, tensors)
    return ModelFiles(path, settings, tensors)


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object; UserError where it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a JSON object; copy or download it again")
    return content


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, a shared one by all its names; UserError where it is cut off or broken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
            found = {
                name: Stored(file, name, tuple(one.get_shape()), str(one.get_dtype())) for name, one in slices.items()
            }
            # safetensors' save_model keeps one of the tensors that share memory, and puts the others' names beside it.
            shared = {other: found[kept] for other, kept in (opened.metadata() or {}).items() if kept in found}
            return {**shared, **found}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: no whole safetensors file ({error}); copy or download it again") from None


def check_plain(path: Path, tensors: dict[str, Stored]) -> None:
    """Raise UserError where weights are packed integers or floats of 8 bits and fewer."""
    for name, stored in tensors.items():
        packed = name.endswith(PACKED) and len(stored.shape) > 1 and stored.dtype not in DTYPES
        if packed or stored.dtype not in PLAIN:
            raise UserError(f"{path}: quantised ({name} is {stored.dtype}); {DEQUANTISE}")


def _single(path: Path) -> dict[str, Stored]:
    file = path / "model.safetensors"
    if file.is_file():
        return read_header(file)
    if any(path.glob("*.safetensors")):
        raise UserError(
            f"{path}: neither model.safetensors nor {INDEX}: the index of its shards is missing; copy it too"
        )
    _refuse_other_formats(path)
    raise UserError(f"{path}: holds no weights (*.safetensors)")


def _refuse_other_formats(path: Path) -> None:
    again = "load it with from_pretrained and save it with save_pretrained, which writes safetensors"
    for pattern, how in (
        ("*.bin", again),
        ("*.pt", again),
        ("*.pth", again),
        ("*.gguf", "load it with from_pretrained(..., gguf_file=...) and save it with save_pretrained"),
    ):
        if any(path.glob(pattern)):
            raise UserError(f"{path}: its weights are {pattern}, and only safetensors are read; {how}")


def _sharded(path: Path) -> dict[str, Stored]:
    index = path / INDEX
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{index}: has no weight_map; copy or download it again")
    headers: dict[str, dict[str, Stored]] = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard:  # an index must not lead out of its directory
            raise UserError(f"{index}: {shard} is not the name of a file beside it")
        if not (path / shard).is_file():
            raise UserError(f"{path / shard}: missing, and {INDEX} names it; copy or download the shard")
        headers[shard] = read_header(path / shard)
    for name, shard in where.items():
        if name not in headers[shard]:
            raise UserError(f"{path / shard}: holds no {name}, which {INDEX} puts there; copy or download both again")
    shared = {
        name: stored
        for header in headers.values()
        for name, stored in header.items()
        if name != stored.name and stored.name in where
    }
    return {**shared, **{name: headers[shard][name] for name, shard in where.items()}}
