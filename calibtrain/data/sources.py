"""Where records come from: geography, local files, the Hugging Face hub, or several. All get one shape and draw order."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from calibtrain.config_data import FileSource, GeographySource, HubSource, MixturePart, MixtureSource, Source
from calibtrain.data.drops import DropReport
from calibtrain.data.files import Row, as_written, file_rows, narrow_floats
from calibtrain.data.geography import load_geography
from calibtrain.data.layout import READABLE, Layout, find_layout
from calibtrain.data.mixtures import STRATUM, interleaved
from calibtrain.data.rows import record_from_row
from calibtrain.data.strata import check_strata
from calibtrain.data.values import plain
from calibtrain.errors import UserError
from calibtrain.records import Record, unit_hash

logger = logging.getLogger(__name__)

_WHOLE_FLOAT = re.compile(r"\s*(-?\d+)\.0\s*")


def load_records(
    source: Source,
    seed: int = 0,
    *,
    labelled: bool = False,
    bare: bool = False,
    objects: bool = False,
    drops: DropReport | None = None,
) -> list[Record]:
    """Every record of the source in draw order, which is a pure function of the seed and the records' questions.

    Files and hub data sets are shuffled, since many are sorted by topic; geography is drawn by population; a mixture is
    drawn by its weights, and its records have the stratum `source`. `labelled`: a column `label` says which answers are
    desirable; the others become `rejected`. `bare`: a question alone serves. `objects`: an object is an accepted
    answer, as its JSON. Rows that cannot serve go to `drops`; without one, the first raises UserError that names its file
    and line (or row index), as does a source that cannot be read.
    """
    drops = DropReport(strict=True) if drops is None else drops
    if isinstance(source, MixtureSource):
        mixed = [
            record for part in source.sources for record in _part_records(part, seed, labelled, bare, objects, drops)
        ]
        return interleaved(mixed, source, seed)
    if isinstance(source, GeographySource):
        return load_geography(source, seed)
    name = str(source.path) if isinstance(source, FileSource) else source.name
    cells = isinstance(source, FileSource) and source.path.suffix.lower() == ".csv"
    rows = file_rows(source.path) if isinstance(source, FileSource) else _hub_rows(source)
    mapped = [[named] if isinstance(named, str) else named for named in source.columns.values()]
    wanted = READABLE.union(*mapped)
    found: dict[str, None] = {}  # columns of the whole set in order: any row may lack one
    kept: list[tuple[str, Mapping[str, Any]]] = []
    refused: UserError | None = None
    for place, row in rows:
        if isinstance(row, UserError):
            drops.refuse(row, place)
            refused = refused or row
            continue
        found.update(dict.fromkeys(row))
        kept.append((place, {column: value for column, value in row.items() if column in wanted}))
    if not kept:
        raise refused or UserError(f"{name}: the data set is empty")
    layout = find_layout(list(found), source.columns, name, cells, labelled, bare, objects)
    records, passed_over = [], Counter[str]()
    for place, row in _whole(kept, layout, name) if cells else kept:
        try:
            records.append(record_from_row(row, layout, place, passed_over))
        except UserError as error:
            drops.refuse(error, place, question_of(row, layout))
    tell_unread(name, list(found), layout, passed_over, len(kept))
    check_strata(records, layout.strata, name)
    # The sort is stable: rows that ask the same stay in the source's order.
    return sorted(records, key=lambda record: (unit_hash("draw", seed, record.id), record.id))


def _part_records(
    part: MixturePart, seed: int, labelled: bool, bare: bool, objects: bool, drops: DropReport
) -> list[Record]:
    records = load_records(part.source, seed, labelled=labelled, bare=bare, objects=objects, drops=drops)
    if any(STRATUM in record.strata for record in records):
        raise UserError(
            f"{part.source.called}: columns.strata names {STRATUM!r}, which in a mixture is the name of each source"
        )
    return [replace(record, strata={**record.strata, STRATUM: part.stratum}) for record in records]


def tell_unread(name: str, found: Sequence[str], layout: Layout, passed_over: Mapping[str, int], rows: int) -> None:
    """Log the columns of `found` that are not read, and those that are not in the rows where another one comes first."""
    unread = [str(column) for column in found if column not in layout.read]
    for column, count in sorted(passed_over.items()):
        where = "another column of the same meaning comes first; data.source.columns says which is read"
        unread.append(f"{column} (in {count} of {rows} rows: {where})")
    if unread:
        logger.info("%s: columns not read: %s", name, ", ".join(unread))


def question_of(row: Mapping[str, Any], layout: Layout) -> str:
    """What a row that cannot serve seems to ask."""
    columns = (layout.columns.get(field, "") for field in ("prompt", "question", "messages"))
    return next((str(value) for column in columns if (value := plain(row.get(column)))), "")


def whole_float(cell: str) -> str | None:
    """1925 of 1925.0; None for what is not a whole number written so."""
    found = _WHOLE_FLOAT.fullmatch(cell)
    return found and found[1]


def _whole(rows: list[tuple[str, Mapping[str, Any]]], layout: Layout, name: str) -> list[tuple[str, Mapping[str, Any]]]:
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
