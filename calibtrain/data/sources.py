"""Where records come from: geography, local files, the Hugging Face hub. All get one shape and one draw order."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from calibtrain.config import FileSource, GeographySource, HubSource
from calibtrain.data.files import Row, as_written, file_rows, narrow_floats
from calibtrain.data.geography import load_geography
from calibtrain.data.layout import READABLE, Layout, find_layout
from calibtrain.data.rows import record_from_row
from calibtrain.data.strata import check_strata
from calibtrain.errors import UserError
from calibtrain.records import Record, unit_hash

logger = logging.getLogger(__name__)

_WHOLE_FLOAT = re.compile(r"\s*(-?\d+)\.0\s*")


def load_records(
    source: GeographySource | FileSource | HubSource, seed: int = 0, *, labelled: bool = False
) -> list[Record]:
    """Every record of the source in draw order, which is a pure function of the seed and the records' questions.

    Files and hub data sets are shuffled, since many are sorted by topic; geography is drawn by population. `labelled`:
    a column `label` says which answers are desirable; the others become `rejected`. Raises UserError that names the file
    and line (or row index) of whatever cannot be read.
    """
    if isinstance(source, GeographySource):
        return load_geography(source, seed)
    name = str(source.path) if isinstance(source, FileSource) else source.name
    cells = isinstance(source, FileSource) and source.path.suffix.lower() == ".csv"
    rows = file_rows(source.path) if isinstance(source, FileSource) else _hub_rows(source)
    mapped = [[named] if isinstance(named, str) else named for named in source.columns.values()]
    wanted = READABLE.union(*mapped)
    found: dict[str, None] = {}  # columns of the whole set in order: any row may lack one
    kept: list[Row] = []
    for place, row in rows:
        found.update(dict.fromkeys(row))
        kept.append((place, {column: value for column, value in row.items() if column in wanted}))
    if not kept:
        raise UserError(f"{name}: the data set is empty")
    layout = find_layout(list(found), source.columns, name, cells, labelled)
    unread = [column for column in found if column not in layout.read]
    if unread:
        logger.info("%s: columns not read: %s", name, ", ".join(map(str, unread)))
    records = [record_from_row(row, layout, place) for place, row in (_whole(kept, layout, name) if cells else kept)]
    check_strata(records, layout.strata, name)
    # The sort is stable: rows that ask the same stay in the source's order.
    return sorted(records, key=lambda record: (unit_hash("draw", seed, record.id), record.id))


def _whole(rows: list[Row], layout: Layout, name: str) -> list[Row]:
    """CSV rows with 1925 for 1925.0 in columns that hold nothing else: whole numbers that pandas made floats."""
    floats = []
    for column in dict.fromkeys(layout.read):
        filled = [cell for _, row in rows if (cell := row.get(column))]
        if filled and all(_WHOLE_FLOAT.fullmatch(cell) for cell in filled):
            logger.info("%s: column %r holds whole numbers as floats; %s is read without .0", name, column, filled[0])
            floats.append(column)
    if not floats:
        return rows
    return [
        (place, {key: _WHOLE_FLOAT.sub(r"\1", cell) if key in floats and cell else cell for key, cell in row.items()})
        for place, row in rows
    ]


def _hub_rows(source: HubSource) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
        features: Any = getattr(rows, "features", None)  # a streamed set may not know them
        narrow = narrow_floats(features.arrow_schema) if features else {}
        # Rows of a streamed set are fetched here, so that this too can meet the network.
        for index, row in enumerate(islice(rows, source.limit)):
            yield f"{source.name}[{source.split}][{index}]", as_written(row, narrow)
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
