"""Rows of local files: .jsonl, .json, .csv and .parquet, each with the place that messages name it by."""

from __future__ import annotations

import codecs
import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from os.path import isdir, isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibtrain.errors import UserError, printable

if TYPE_CHECKING:
    import pyarrow

Row = tuple[str, Mapping[str, Any] | UserError]
"""Its place ("file.jsonl:17") and its values by column, or why that one row cannot be read."""

LARGEST_CELL = 2**31 - 1  # Python's csv stops at 131,072 characters, a long document has more
PACKED = (".gz", ".zip", ".zst", ".bz2", ".xz")


def file_rows(path: Path) -> Iterator[Row]:
    """Rows of a file in its order. Raises UserError that names the file, and the line, where it cannot be read on."""
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    suffix = path.suffix.lower()
    if suffix in PACKED:
        raise UserError(f"{path}: a packed file; unpack it first")
    if suffix not in readers:
        raise UserError(f"{path}: unknown file type {path.suffix!r}; accepted are {', '.join(readers)}")
    if isdir(path):  # unlike Path's, these are False of what no file can be called
        raise UserError(f"{path}: a folder; name one file in it")
    if not isfile(path):
        raise UserError(
            f"{path}: no such file (a path in a YAML file counts from that file, on the command line from where you are)"
        )
    try:
        yield from readers[suffix](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decoded(path: Path) -> Iterator[str | UserError]:
    r"""Lines ended by "\n", decoded one by one, so that the one that is not UTF-8 can be named."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UserError(f"{path}: UTF-16, not UTF-8; save it as UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield UserError(f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file that is read as a whole."""
    for line in _decoded(path):
        if isinstance(line, UserError):
            raise line
        yield line


def _jsonl_rows(path: Path) -> Iterator[Row]:
    first = True
    for number, line in enumerate(_decoded(path), start=1):
        if isinstance(line, str) and not line.strip():
            continue
        place = f"{path}:{number}"
        row = line if isinstance(line, UserError) else jsonl_row(line, place, first=first)
        if first and isinstance(row, UserError) and isinstance(line, str) and line.lstrip().startswith("["):
            raise row  # no row of it is one
        first = False
        yield place, row


def jsonl_row(line: str, place: str, *, first: bool = False) -> Mapping[str, Any] | UserError:
    """The object that a line holds, or why it holds none."""
    listed = first and line.lstrip().startswith("[")
    advice = "a file that is one JSON list is named .json" if listed else "each line holds one whole object"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return UserError(f"{place}: not JSON: {error}; {advice}")
    return _object(row, place, advice)


def _json_rows(path: Path) -> Iterator[Row]:
    text = "".join(_lines(path))
    try:
        rows = json.loads(text or "[]")
    except json.JSONDecodeError as error:
        # Objects one a line are often named .json as well.
        if error.msg != "Extra data" or not text.lstrip().startswith("{"):
            raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
        yield from _jsonl_rows(path)
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        keys = f" with the keys {', '.join(printable(key) for key in list(rows)[:5])}" if isinstance(rows, dict) else ""
        raise UserError(
            f"{path}: a .json file holds one list of objects, alone or under the key `data`; this is "
            f"{type(rows).__name__}{keys} (for one object a line name it .jsonl; pandas: orient='records')"
        )
    for index, row in enumerate(rows):
        place = f"{path}[{index}]"
        yield place, _object(row, place)


def _csv_rows(path: Path) -> Iterator[Row]:
    limit = csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(_lines(path), strict=True)
    start = 1
    try:
        header = next((cells for cells in reader if cells), [])
        _check_header(header, path)
        start = reader.line_num + 1
        for cells in reader:
            # A quoted cell may hold line breaks: a row is named by its first line.
            place, start = f"{path}:{start}", reader.line_num + 1
            if len(cells) > len(header):
                yield place, UserError(f"{place}: more cells than the header has columns; quote cells that hold commas")
            elif cells and len(cells) < len(header):
                yield (
                    place,
                    UserError(
                        f"{place}: {len(cells)} cells, fewer than the header has columns ({len(header)}); "
                        "an empty cell needs its comma, and a cell with line breaks its quotes"
                    ),
                )
            elif cells:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{start}: not CSV: {error}; .jsonl has no such limits") from error
    finally:
        csv.field_size_limit(limit)


def _check_header(header: Sequence[str], path: Path) -> None:
    if len(header) == 1 and (other := next((mark for mark in "\t;|" if mark in header[0]), None)):
        raise UserError(f"{path}: columns are separated by {other!r}; save it with commas between them")
    _check_unique(header, path)


def _check_unique(names: Sequence[str], path: Path) -> None:
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise UserError(f"{path}: two columns are named {twice[0]!r}; rename one")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_unique(file.schema_arrow.names, path)
            narrow = narrow_floats(file.schema_arrow)
            index = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}[{index}]", as_written(row, narrow)
                    index += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {error}") from error


def narrow_floats(schema: pyarrow.Schema) -> dict[str, type[np.floating]]:
    """Columns of float16 or float32, or of lists of them: Python's float of their 0.1 is 0.10000000149011612."""
    kinds: dict[str, type[np.floating]] = {"halffloat": np.float16, "float": np.float32}
    found = {field.name: str(getattr(field.type, "value_type", field.type)) for field in schema}
    return {name: kinds[kind] for name, kind in found.items() if kind in kinds}


def as_written(row: Mapping[str, Any], narrow: Mapping[str, type[np.floating]]) -> Mapping[str, Any]:
    """The row with the `narrow` columns' values as the shortest decimals that mean them."""
    if not narrow:
        return row
    return {**row, **{name: _shortest(row[name], kind) for name, kind in narrow.items()}}


def _shortest(value: Any, kind: type[np.floating]) -> Any:
    if isinstance(value, list):
        return [_shortest(one, kind) for one in value]
    return None if value is None else float(str(kind(value)))


def _object(row: Any, place: str, advice: str = "") -> Mapping[str, Any] | UserError:
    if not isinstance(row, dict):
        return UserError(
            f"{place}: each row is an object with named columns, got {type(row).__name__}{advice and '; ' + advice}"
        )
    return row
