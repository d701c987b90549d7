"""Records of a file kept on disk with an index: what stays in memory does not grow with what the rows hold.

A first pass finds the columns, a second one reads every row, writes its record as a line of JSON and notes where it
stands, whose question it is and what it can be used for. Later runs on the same file find both in the cache directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, overload

import numpy as np

from calibtrain.config_data import FileSource
from calibtrain.data.drops import DropReport
from calibtrain.data.files import file_rows
from calibtrain.data.layout import Layout, find_layout
from calibtrain.data.rows import record_from_row
from calibtrain.data.sources import question_of, tell_unread, whole_float
from calibtrain.data.splits import saying
from calibtrain.data.strata import check_strata
from calibtrain.data.values import text_of
from calibtrain.errors import UserError
from calibtrain.records import Message, Record, ToolCall, unit_hash
from calibtrain.shared_files import one_at_a_time

logger = logging.getLogger(__name__)

VERSION = 3
EDGE = 2**20
"""So many bytes at either end of a file are hashed, with its size and time, to tell whether it is still the same."""
COLUMNS = {
    "offset": np.int64,
    "length": np.int32,
    "id": np.uint64,
    "key": np.uint64,
    "content": np.uint64,  # hash of what is asked and said
    "draw": np.float64,  # unit hashes of the question: its place in the draw, in the splits, in the validation split
    "split": np.float64,
    "held": np.float64,
    "cell": np.int32,  # of the strata
    "flags": np.uint8,
}
"""The index: an array a column, an entry a record, in draw order."""
CHOSEN, REJECTED, GRADABLE, CONVERSATION = 1, 2, 4, 8


@dataclass(frozen=True)
class Store:
    """The file of records, opened, its index and the strata's values of each cell."""

    path: Path
    index: Mapping[str, np.ndarray]
    cells: tuple[Mapping[str, str], ...]
    descriptor: int

    def read(self, row: int) -> Record:
        """The record at a place of the draw."""
        offset, length = int(self.index["offset"][row]), int(self.index["length"][row])
        return _loaded(os.pread(self.descriptor, length, offset))


class StoredRecords(Sequence[Record]):
    """Some of a store's records, each read when it is asked for. A slice is such a sequence again."""

    def __init__(self, store: Store, rows: np.ndarray) -> None:
        self.store = store
        self.rows = rows  # (n,) places of the draw

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> StoredRecords: ...
    def __getitem__(self, place: int | slice) -> Record | StoredRecords:
        if isinstance(place, slice):
            return StoredRecords(self.store, self.rows[place])
        return self.store.read(int(self.rows[place]))

    def column(self, name: str) -> np.ndarray:
        """A column of the index for these records."""
        return self.store.index[name][self.rows]

    def where(self, mask: np.ndarray) -> StoredRecords:
        """Those for which `mask` (n,) holds."""
        return StoredRecords(self.store, self.rows[mask])

    def flagged(self, flag: int) -> np.ndarray:
        """Which of them are CHOSEN (have an answer to learn), REJECTED (one to avoid), GRADABLE, or a CONVERSATION that
        teaches earlier answers too. (n,) bool.
        """
        return (self.column("flags") & flag) > 0

    def likenesses(self) -> list[Record]:
        """For each a record with its strata and nothing else; all of one cell are one object."""
        shown = [Record((Message("user", ""),), strata=strata) for strata in self.store.cells]
        return [shown[cell] for cell in self.column("cell")]

    @property
    def content_hash(self) -> str:
        """SHA-256 over what they ask and say, whatever their order. 64 hex digits."""
        return hashlib.sha256(np.sort(self.column("content")).tobytes()).hexdigest()


@dataclass(frozen=True)
class Made:
    """How a store's records come about, beside the file: whatever of it differs makes another store."""

    seed: int
    labelled: bool
    task: str  # its section, as JSON
    asked: Callable[[Record], Record]
    gradable: Callable[[Record], bool]
    objects: bool = False


def stored_records(source: FileSource, made: Made, directory: Path, drops: DropReport) -> StoredRecords:
    """Every record of the file in draw order, out of its store below `directory`, which is made where it is not there.

    Rows that cannot serve go to `drops`. Raises UserError as `load_records` does.
    """
    folder = directory / _key(source, made)
    if not (folder / "meta.json").is_file():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(folder):
                if not (folder / "meta.json").is_file():
                    logger.info("%s: reading every row once, to keep its records in %s", source.path, folder)
                    _make(source, made, folder, drops.strict)
        except OSError as error:
            raise UserError(f"{directory}: the records cannot be kept: {error.strerror or error}") from error
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        index = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
        descriptor = os.open(folder / "records.jsonl", os.O_RDONLY)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot be read ({error}); remove it, and it is made anew") from error
    if drops.strict and meta["unfit"]:
        _make(source, made, folder, strict=True)  # raises the error of the first one
    for row in meta["unfit"]:
        drops.refuse(row["reason"], row["place"], row["question"])
    store = Store(folder / "records.jsonl", index, tuple(meta["cells"]), descriptor)
    records = StoredRecords(store, np.arange(len(index["id"]), dtype=np.int64))
    check_strata(records.likenesses(), meta["strata"], str(source.path))
    return records


def _key(source: FileSource, made: Made) -> str:
    path = source.path
    try:
        state = path.stat()
        with path.open("rb") as file:
            edges = hashlib.sha256(file.read(EDGE))
            file.seek(max(0, state.st_size - EDGE))
            edges.update(file.read(EDGE))
    except OSError:
        edges, size = hashlib.sha256(), 0  # `file_rows` says what is wrong with it
    else:
        size = state.st_size
    facts = [VERSION, str(path.resolve()), size, edges.hexdigest(), source.columns, made.seed, made.labelled, made.task]
    facts.append([field.name for field in fields(Record)])
    if size:
        facts.append(state.st_mtime_ns)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _make(source: FileSource, made: Made, folder: Path, strict: bool) -> None:
    """Write the store whole or not at all: several processes may make the same."""
    drops, partial = DropReport(strict=strict), folder.with_name(f"{folder.name}.part-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        columns = {name: array(np.dtype(kind).char) for name, kind in COLUMNS.items()}
        cells: dict[tuple[tuple[str, str], ...], int] = {}
        layout, floats, listed = _survey(source, made)
        passed_over = Counter[str]()
        with (partial / "records.jsonl").open("wb") as file:
            for record in _records(source, layout, floats, made, drops, passed_over):
                line = _dumped(record)
                cell = cells.setdefault(tuple(record.strata.items()), len(cells))
                _note(columns, record, made, cell, file.tell(), len(line))
                file.write(line)
        if not columns["id"]:
            raise UserError(_nothing_left(source, drops))
        tell_unread(str(source.path), listed, layout, passed_over, len(columns["id"]) + len(drops.unfit))
        found = {name: np.frombuffer(columns[name], dtype=kind) for name, kind in COLUMNS.items()}
        # Stable: rows that ask the same stay in the file's order.
        order = np.lexsort((found["id"], found["draw"]))
        for name, values in found.items():
            np.save(partial / f"{name}.npy", values[order])
        unfit = [{"place": one.place, "reason": one.reason, "question": one.question} for one in drops.unfit]
        meta = {"cells": [dict(cell) for cell in cells], "strata": layout.strata, "unfit": unfit}
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        if not (folder / "meta.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    except OSError as error:
        if not (folder / "meta.json").is_file():
            raise UserError(f"{partial}: the records cannot be kept: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _nothing_left(source: FileSource, drops: DropReport) -> str:
    first = drops.unfit[0] if drops.unfit else None
    return f"{source.path}: the data set is empty" if first is None else f"{first.place}: {first.reason}"


def _survey(source: FileSource, made: Made) -> tuple[Layout, frozenset[str], list[str]]:
    """Layout of the file's columns, those of a CSV that hold whole numbers as floats, and all of them."""
    cells = source.path.suffix.lower() == ".csv"
    found: dict[str, None] = {}
    broken: set[str] = set()
    refused: UserError | None = None
    for _, row in file_rows(source.path):
        if isinstance(row, UserError):
            refused = refused or row
            continue
        found.update(dict.fromkeys(row))
        if cells:
            broken.update(column for column, cell in row.items() if cell and whole_float(cell) is None)
    if not found:
        raise refused or UserError(f"{source.path}: the data set is empty")
    layout = find_layout(list(found), source.columns, str(source.path), cells, made.labelled, objects=made.objects)
    return layout, frozenset(found.keys() - broken) if cells else frozenset(), list(found)


def _records(
    source: FileSource,
    layout: Layout,
    floats: frozenset[str],
    made: Made,
    drops: DropReport,
    passed_over: Counter[str],
) -> Iterator[Record]:
    for place, row in file_rows(source.path):
        try:
            if isinstance(row, UserError):
                raise row
            if floats:
                row = {key: whole_float(cell) or cell if key in floats else cell for key, cell in row.items()}
            yield made.asked(record_from_row(row, layout, place, passed_over))
        except UserError as error:
            drops.refuse(error, place, "" if isinstance(row, UserError) else question_of(row, layout))


def content_of(record: Record) -> int:
    """Hash of what is asked and said. 64 bits."""
    said = repr(saying(record)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")


def _note(columns: Mapping[str, Any], record: Record, made: Made, cell: int, offset: int, length: int) -> None:
    """One entry of the index."""
    own, seed = record.key, made.seed
    flags = CHOSEN * (record.chosen is not None and record.weight > 0) + REJECTED * (record.rejected is not None)
    flags += CONVERSATION * (len(record.taught) > 1)
    values = {
        "offset": offset,
        "length": length,
        "id": int(record.id, 16),
        "key": int(own, 16),
        "content": content_of(record),
        "draw": unit_hash("draw", seed, own),
        "split": unit_hash("split", seed, own),
        "held": unit_hash("validation", seed, own),
        "cell": cell,
        "flags": flags + GRADABLE * made.gradable(record),
    }
    for name, value in values.items():
        columns[name].append(value)


_PLAIN = {field.name: field.default for field in fields(Record)}


def _dumped(record: Record) -> bytes:
    """The record as a line of JSON, without what is as it is by default."""
    values = {name: getattr(record, name) for name in _PLAIN}
    kept = {name: value for name, value in values.items() if value != _PLAIN[name] and value not in ((), {})}
    return json.dumps(kept, default=_jsonable).encode() + b"\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Message | ToolCall):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(value) if isinstance(value, Mapping) else text_of(value) or str(value)


def _calls(found: Iterable[Mapping[str, str]]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(**one) for one in found)


def _loaded(line: bytes) -> Record:
    values: dict[str, Any] = {
        name: tuple(one) if isinstance(one, list) else one for name, one in json.loads(line).items()
    }
    values["calls"] = _calls(values.get("calls", ()))
    values["prompt"] = tuple(
        Message(**{**one, "tool_calls": _calls(one["tool_calls"])}) for one in values.get("prompt", ())
    )
    return Record(**values)
