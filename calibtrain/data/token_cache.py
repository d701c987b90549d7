"""Encoded records on disk: made once, mapped by every process, the same sequences bit for bit.

A cache is a directory of flat arrays without headers. `ids.bin` and `labels.bin` hold the tokens of all sequences one behind
the other and are read a sequence at a time; `sequences.bin` and `groups.bin` say where each begins and are mapped, so that
what stays in memory does not grow with what the records say. `meta.json` has the arrays' sizes and what was dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from calibtrain.data.drops import DropReport
from calibtrain.data.encode import Encoded
from calibtrain.data.lazy import Lazy
from calibtrain.shared_files import one_at_a_time

VERSION = 1
TOKEN = np.dtype("<i4")
SEQUENCE = np.dtype(
    [("ids", "<i8"), ("labels", "<i8"), ("start", "<i4"), ("role", "i1"), ("paired", "?"), ("weight", "<f8")]
)
"""Of each sequence: where its ids and its labels end, its `completion_start`, `role`, whether it is of a pair, `weight`."""
GROUP = np.dtype([("sequences", "<i8"), ("record", "<i8")])
"""Of each record: where its sequences end, and its index in its split."""
FILES = {"ids.bin": TOKEN, "labels.bin": TOKEN, "sequences.bin": SEQUENCE, "groups.bin": GROUP}
BUFFERED = 1024
"""Records between two writes."""


@dataclass(frozen=True)
class TokenCache:
    """An open cache; `len` counts the records that were kept."""

    ids: int  # file descriptors
    labels: int
    sequences: np.ndarray  # (sequences,) SEQUENCE, mapped
    groups: np.ndarray  # (records,) GROUP, mapped
    drops: dict[str, Any]  # `DropReport.as_json` of the encoding

    def __len__(self) -> int:
        return len(self.groups)

    def read(self, place: int) -> tuple[Encoded, ...]:
        """The sequences of one record. Raises OSError where the files were cut short since they were opened."""
        first = int(self.groups["sequences"][place - 1]) if place else 0
        last, record = (int(value) for value in self.groups[place])
        return tuple(self._sequence(number, record) for number in range(first, last))

    def examples(self, kept: int) -> Lazy[tuple[Encoded, ...]]:
        """As a sequence, of which the last `kept` that were asked for stay in memory."""
        return Lazy(len(self), self.read, kept)

    def _sequence(self, number: int, record: int) -> Encoded:
        row = self.sequences[number]
        before = self.sequences[number - 1] if number else np.zeros((), dtype=SEQUENCE)
        return Encoded(
            _tokens(self.ids, int(before["ids"]), int(row["ids"])),
            int(row["start"]),
            int(row["role"]),
            record,
            pair_id=record if row["paired"] else -1,
            weight=float(row["weight"]),
            labels=_tokens(self.labels, int(before["labels"]), int(row["labels"])),
        )


def _tokens(descriptor: int, start: int, stop: int) -> tuple[int, ...]:
    if start == stop:
        return ()
    found = os.pread(descriptor, (stop - start) * TOKEN.itemsize, start * TOKEN.itemsize)
    if len(found) < (stop - start) * TOKEN.itemsize:
        raise OSError(f"a file of the tokenised cache has become shorter: {len(found)} bytes at token {start}")
    return tuple(np.frombuffer(found, dtype=TOKEN).tolist())


def open_cache(folder: Path) -> TokenCache | None:
    """The cache in a directory; None where there is none, or not a whole one. Its files close with the last use of it."""
    with contextlib.ExitStack() as opened:
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            for name in FILES:
                if (folder / name).stat().st_size != meta["bytes"][name]:
                    return None
            sequences, groups = (
                np.memmap(folder / name, dtype=FILES[name], mode="r") for name in ("sequences.bin", "groups.bin")
            )
            ids = os.open(folder / "ids.bin", os.O_RDONLY)
            opened.callback(os.close, ids)
            labels = os.open(folder / "labels.bin", os.O_RDONLY)
            opened.callback(os.close, labels)
            cache = TokenCache(ids, labels, sequences, groups, meta["drops"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        weakref.finalize(cache, opened.pop_all().close)
        return cache


def make_cache(folder: Path, groups: Callable[[DropReport], Iterable[tuple[Encoded, ...]]], strict: bool) -> None:
    """Write the sequences of `groups`, which notes in a report what it drops, unless the cache is there.

    Whole or not at all; of several processes one writes and the others wait, on one machine and where the file system
    knows locks. Raises OSError where it cannot be written, and what `groups` raises.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder) as alone:
        if open_cache(folder) is not None:
            return
        if alone:  # what killed runs left half-written
            for left in folder.parent.glob(f"{folder.name}.part-*"):
                shutil.rmtree(left, ignore_errors=True)
        partial = folder.with_name(f"{folder.name}.part-{uuid.uuid4().hex}")
        partial.mkdir()
        try:
            drops = DropReport(strict=strict)
            _write(partial, groups(drops))
            sizes = {name: (partial / name).stat().st_size for name in FILES}
            meta = {"version": VERSION, "bytes": sizes, "drops": drops.as_json()}
            with (partial / "meta.json").open("w", encoding="utf-8") as file:
                json.dump(meta, file)
                _to_disk(file)
            if open_cache(folder) is None:  # without locks another process may have been faster
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write(partial: Path, groups: Iterable[tuple[Encoded, ...]]) -> None:
    ids: list[int] = []
    labels: list[int] = []
    sequences: list[tuple[Any, ...]] = []
    kept: list[tuple[int, int]] = []
    total_ids = total_labels = total = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((partial / name).open("wb")) for name in FILES}

        def write() -> None:
            for name, values in zip(FILES, (ids, labels, sequences, kept), strict=True):
                np.array(values, dtype=FILES[name]).tofile(files[name])
                values.clear()  # type: ignore[attr-defined]

        for group in groups:
            for one in group:
                ids.extend(one.ids)
                labels.extend(one.labels)
                total_ids, total_labels = total_ids + len(one.ids), total_labels + len(one.labels)
                paired = one.pair_id >= 0
                sequences.append((total_ids, total_labels, one.completion_start, one.role, paired, one.weight))
            total += len(group)
            kept.append((total, group[0].record_id))
            if len(kept) == BUFFERED:
                write()
        write()
        for file in files.values():
            _to_disk(file)


def _to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
