"""A checkpoint's tensors as pieces of flat parameters: each rank writes those it holds, and any other reads what it needs.

A file a rank, in safetensors; its metadata say of which parameter a piece is and where it begins. What is read is the
elements asked for, not the file, so that no process ever holds more of a checkpoint than its own part.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calibtrain.errors import UserError

FILE = "rank-{:05d}.safetensors"
INDEX = "index"
"""Key of a file's metadata that holds, as JSON, what its tensors are."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements from `start` on of a row-major flat parameter of `shape`; each of `tensors` is (n,).

    `scalars` belong to the whole parameter, such as the number of its updates.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Whole:
    """Tensors of the parameters `names` that cannot be cut anew; just the same layout finds them again, by their `key`."""

    key: str
    names: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, float]


T = TypeVar("T", Piece, Whole)


def write_shard(
    directory: Path, rank: int, ranks: int, pieces: Sequence[Piece], wholes: Sequence[Whole], facts: Mapping[str, Any]
) -> None:
    """Write what this rank holds. Raises OSError or SafetensorError where there is no room."""
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {"ranks": ranks, "facts": dict(facts), "pieces": {}, "wholes": {}}
    for piece in pieces:
        index["pieces"][piece.name] = {"shape": piece.shape, "start": piece.start, "scalars": dict(piece.scalars)}
        tensors |= {f"{piece.name}/{key}": one for key, one in piece.tensors.items()}
    for number, whole in enumerate(wholes):
        index["wholes"][whole.key] = {"place": f"whole/{number}", "names": whole.names, "scalars": dict(whole.scalars)}
        # Clones: safetensors refuses tensors that share memory, as tables of an optimiser's do.
        tensors |= {f"whole/{number}/{key}": one.clone() for key, one in whole.tensors.items()}
    host = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    save_file(host, directory / FILE.format(rank), {INDEX: json.dumps(index)})


def on_host(one: T) -> T:
    """A copy of a Piece or a Whole in host memory, which stays as it is while training goes on."""
    return replace(one, tensors={key: held.detach().to("cpu", copy=True) for key, held in one.tensors.items()})


@dataclass(frozen=True, slots=True)
class _Held:
    """A piece in a file."""

    file: Any
    start: int
    stop: int


class Shards:
    """What all ranks have written into `directory`; a context, within which the files are open.

    Raises UserError where a file is missing or is none of ours.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.facts: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.keys: dict[str, set[str]] = {}  # of each parameter
        self.scalars: dict[str, dict[str, float]] = {}
        self._held: dict[tuple[str, str], list[_Held]] = {}
        self.uncut: set[str] = set()  # parameters of which there is a Whole
        self._wholes: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Shards:
        try:
            paths = sorted(self.directory.glob(FILE.replace("{:05d}", "*")))
            found = [self._read_index(path) for path in paths]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            self._open.close()
            raise UserError(f"{self.directory} cannot be read ({error})") from error
        if not found or len(found) != found[0]:
            self._open.close()
            wanted = found[0] if found else "some"
            raise UserError(f"{self.directory} holds {len(found)} of {wanted} files: its shards are not whole")
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, name: str, key: str, start: int, into: Tensor) -> None:
        """Fill the flat tensor `into` with the elements from `start` on. Raises UserError where some are missing."""
        stop, done = start + into.numel(), start
        for held in sorted(self._held.get((name, key), ()), key=lambda one: one.start):
            if held.start <= done < min(stop, held.stop):
                end = min(stop, held.stop)
                part = held.file.get_slice(f"{name}/{key}")[done - held.start : end - held.start]
                into[done - start : end - start].copy_(part)
                done = end
        if done < stop:
            raise UserError(f"{self.directory} holds no elements {done} to {stop} of {name} ({key})")

    def whole(self, key: str) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """Tensors and scalars of a `Whole`; None where no rank has written it."""
        if key not in self._wholes:
            return None
        file, told = self._wholes[key]
        prefix = told["place"] + "/"
        tensors = {one.removeprefix(prefix): file.get_tensor(one) for one in file.keys() if one.startswith(prefix)}  # noqa: SIM118
        return tensors, told["scalars"]

    def full(self, name: str, key: str) -> Tensor:
        """All elements of a parameter, in its shape, float32."""
        shape = self.shapes[name]
        flat = torch.empty(math.prod(shape))
        self.read(name, key, 0, flat)
        return flat.view(shape)

    def _read_index(self, path: Path) -> int:
        """Note what a file holds. Returns how many files there should be."""
        file = self._open.enter_context(safe_open(path, framework="pt"))
        index = json.loads(file.metadata()[INDEX])
        self.facts = index["facts"]
        keys: dict[str, list[str]] = {}
        for one in file.keys():  # noqa: SIM118
            name, _, key = one.rpartition("/")
            keys.setdefault(name, []).append(key)
        for name, told in index["pieces"].items():
            self.shapes[name] = tuple(told["shape"])
            ours = self.scalars.setdefault(name, {})
            ours |= told["scalars"]
            for key in keys[name]:
                self.keys.setdefault(name, set()).add(key)
                (size,) = file.get_slice(f"{name}/{key}").get_shape()
                self._held.setdefault((name, key), []).append(_Held(file, told["start"], told["start"] + size))
        for key, told in index["wholes"].items():
            self._wholes[key] = file, told
            self.uncut |= set(told["names"])
        return int(index["ranks"])
