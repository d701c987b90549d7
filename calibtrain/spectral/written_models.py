"""A model directory with some matrices replaced, written matrix by matrix; all else stays byte for byte what it was."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.spectral.directories import Pair, has_tied_head, is_adapter, is_head, open_pairs
from calibtrain.spectral.layouts import kind
from calibtrain.spectral.lora_files import MERGE
from calibtrain.spectral.model_files import ModelFiles, Stored, open_model

OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".onnx"}
"""Endings of files that would still hold the old weights; they are not copied."""
FOLDERS = ("additional_chat_templates",)


def write_model(
    base: Path,
    tuned: Path,
    output: Path,
    change: Callable[[Pair, Tensor, Tensor], Tensor],
    *,
    layers: set[int] | None = None,
    modules: Sequence[str] | None = None,
) -> None:
    """Write `tuned` to the new directory `output` with the matrix W of each pair replaced by change(pair, W0, W) (out, in).

    The pairs are those of `open_pairs`; the result is stored in the dtype of W. In memory is one block of a tensor at a
    time: one expert of a stack, all parts of a fused matrix. Nothing is left at `output` when it fails or is interrupted.

    Raises UserError where `open_pairs` does, where `tuned` is an adapter, `output` is taken, the disk is full, or a result
    is not finite in the dtype of W.
    """
    if is_adapter(tuned):
        raise UserError(f"{tuned}: an adapter, and a whole model is to be written; {MERGE}")
    output = output.expanduser().resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; give a new or empty directory")
    pairs = open_pairs(base, tuned, layers=layers, modules=modules).pairs
    model = open_model(tuned)
    files = _files(model)
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _check_space(files, output.parent)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for file in files:
            target = partial / file.relative_to(tuned)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        _replace(pairs, model, partial, change)
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); nothing is left there") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(model: ModelFiles) -> list[Path]:
    """All that is copied: weights in use, settings, tokenizer and chat templates, but no other weights or folders."""
    weights = {stored.file for stored in model.tensors.values()}
    beside = [file for file in sorted(model.path.iterdir()) if file.is_file() and file.suffix not in OTHER_WEIGHTS]
    inside = [file for folder in FOLDERS for file in sorted((model.path / folder).glob("*")) if file.is_file()]
    return [*sorted(weights), *beside, *inside]


def _check_space(files: list[Path], folder: Path) -> None:
    needed, free = sum(file.stat().st_size for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB free; make room")


def _replace(
    pairs: list[Pair], model: ModelFiles, folder: Path, change: Callable[[Pair, Tensor, Tensor], Tensor]
) -> None:
    # Parts of one block are written at once.
    blocks: dict[tuple[str, int | None], list[Pair]] = defaultdict(list)
    for pair in pairs:
        blocks[_stored(pair).name, pair.part.expert].append(pair)
    heads = [stored for name, stored in model.tensors.items() if is_head(name)] if has_tied_head(model) else []
    for (name, _), parts in blocks.items():
        stored = model.tensors[name]
        block = stored.read_block(parts[0].part)
        for pair in parts:
            changed = change(pair, *pair.read())
            if changed.shape != pair.shape:
                raise ValueError(f"{pair.name}: the change gave {tuple(changed.shape)} for {pair.shape}")
            view = pair.part.view(block)
            view.copy_(changed.reshape(view.shape))
        if not torch.isfinite(block).all():
            raise UserError(f"{name}: the changed matrix has values that {pair.dtype} cannot hold")
        _write(folder, stored, block, parts[0].part.expert or 0)
        for head in heads:  # a second copy of the embedding
            if kind(name, stored.shape) == "embedding" and head.shape == stored.shape:
                _write(folder, head, block, 0)


def _stored(pair: Pair) -> Stored:
    if not isinstance(pair.after, Stored):
        raise TypeError(f"{pair.name} is an adapter's")
    return pair.after


def _write(folder: Path, stored: Stored, block: Tensor, place: int) -> None:
    """Put the bytes of `block`, the tensor's `place`-th of that size, where the copied file holds it."""
    with (folder / stored.file.name).open("r+b") as file:
        file.seek(_start(file, stored.name) + place * block.numel() * block.element_size())
        file.write(block.contiguous().view(torch.uint8).numpy().data)


def _start(file: BinaryIO, name: str) -> int:
    """Where a tensor's bytes begin in a safetensors file: a length (8 bytes), as much JSON, then the tensors."""
    length = int.from_bytes(file.read(8), "little")
    return 8 + length + int(json.loads(file.read(length))[name]["data_offsets"][0])
