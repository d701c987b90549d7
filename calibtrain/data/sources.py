"""Where records come from: geography, local files, the Hugging Face hub. All get one shape and one draw order."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from calibtrain.config import FileSource, GeographySource, HubSource
from calibtrain.data.geography import load_geography
from calibtrain.data.records import Record, unit_hash
from calibtrain.data.rows import check_columns, record_from_row
from calibtrain.errors import UserError

Row = tuple[str, Mapping[str, Any]]
"""Its place ("file.jsonl:17") and its values by column."""


def load_records(source: GeographySource | FileSource | HubSource, seed: int = 0) -> list[Record]:
    """Every record of the source in draw order, which is a pure function of the seed and the records' questions.

    Files and hub data sets are shuffled, since many are sorted by topic; geography is drawn by population. Raises
    UserError that names the file and line (or row index) of whatever cannot be read.
    """
    if isinstance(source, GeographySource):
        return load_geography(source, seed)
    name = str(source.path) if isinstance(source, FileSource) else source.name
    rows = _file_rows(source.path) if isinstance(source, FileSource) else _hub_rows(source)
    records: list[Record] = []
    for place, row in rows:
        if not records:
            check_columns([str(column) for column in row], source.columns, name)
        records.append(record_from_row(row, source.columns, place))
    if not records:
        raise UserError(f"{name}: the data set is empty")
    # The sort is stable: rows that ask the same stay in the source's order.
    return sorted(records, key=lambda record: (unit_hash("draw", seed, record.id), record.id))


def _file_rows(path: Path) -> Iterator[Row]:
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: unknown file type {path.suffix!r}; accepted are {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file (data.source.path is taken from the working directory, {Path.cwd()})")
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{place}: not JSON: {error}") from error
                yield place, _object(row, place)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json file holds one list of objects; for one object a line name it .jsonl")
    for index, row in enumerate(rows):
        place = f"{path}[{index}]"
        yield place, _object(row, place)


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        previous = 0
        try:
            previous = reader.line_num if reader.fieldnames else 0
            for row in reader:
                # A quoted cell may hold line breaks: a row is named by its first line.
                place, previous = f"{path}:{previous + 1}", reader.line_num
                if None in row:
                    raise UserError(f"{place}: more cells than the header has columns; quote cells that hold commas")
                yield place, row
        except csv.Error as error:
            raise UserError(f"{path}:{previous + 1}: not CSV: {error}; .jsonl has no such limits") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}[{index}]", row
                    index += 1
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from error


def _hub_rows(source: HubSource) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
        # Rows of a streamed set are fetched here, so that this too can meet the network.
        for index, row in enumerate(islice(rows, source.limit)):
            yield f"{source.name}[{source.split}][{index}]", row
    except Exception as error:  # the hub, the network, the cache and the builders each raise their own kinds
        raise UserError(f"data.source.name {source.name!r}: {_hub_advice(error)} ({_first_line(error)})") from error


def _hub_advice(error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    text = str(error)
    if isinstance(error, DatasetNotFoundError):
        return "no such data set on the hub, or it is private and no token is set (`hf auth login`)"
    if isinstance(error, ValueError) and ("split" in text or "Config name" in text or "BuilderConfig" in text):
        return "the data set has no such subset or split"
    if isinstance(error, OSError) or "offline" in text.lower():
        return "the hub cannot be reached; use kind: file with a local copy, or try again online"
    return "the data set cannot be loaded"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _object(row: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{place}: each row is an object with named columns, got {type(row).__name__}")
    return row
