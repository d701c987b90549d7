"""Strata of the user's own: columns whose values group the questions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from calibtrain.data.values import missing, plain, text_of
from calibtrain.errors import UserError, short
from calibtrain.records import Record

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
"""Stratum of a row that has no value in the column."""
MANY = 20
"""Up to so many values a column is never called an id."""
SMALL = 10
"""Questions of a stratum below which little can be said about it."""


def strata_of(row: Mapping[str, Any], columns: Sequence[str], place: str) -> dict[str, str]:
    """The row's stratum by each column; `unknown` where it has none. Raises UserError for what is no single value."""
    return {column: _stratum(plain(row.get(column)), column, place) for column in columns}


def _stratum(value: Any, column: str, place: str) -> str:
    if missing(value):
        return UNKNOWN
    if isinstance(value, bool):
        return str(value).lower()
    text = text_of(value)
    if text is None:
        raise UserError(f"{place}: column {column!r} holds {short(value)}; a stratum is text or a number")
    return text.strip() or UNKNOWN


def check_strata(records: Sequence[Record], columns: Sequence[str], name: str) -> None:
    """Raise UserError for a column with a value of its own for most records; warn where strata are small."""
    for column in columns:
        values = len(Counter(record.strata[column] for record in records))
        told = f"{name}: columns.strata names {column!r}, which has {values} values in {len(records)} rows"
        if values > MANY and 2 * values > len(records):
            raise UserError(f"{told}; a stratum groups questions, so name a column with few values")
        if values > MANY and values * SMALL > len(records):
            logger.warning("%s: too few questions each for a temperature or a certificate of its own", told)


def check_named(records: Sequence[Record], named: Mapping[str, str | None]) -> None:
    """Raise UserError where a config key (`named`: key -> stratum) names a stratum that no record has."""
    found = sorted({key for record in records for key in record.strata})
    for key, stratum in named.items():
        if stratum is not None and stratum not in found:
            raise UserError(
                f"{key}: no record has the stratum {stratum!r}; the strata found are {', '.join(found) or 'none'} "
                "(columns: {strata: [...]} of the source of the graded questions names them)"
            )
