"""Values of a column as text, the way people write them."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

LARGEST_WHOLE = 2**53
"""Floats beyond it are no longer whole numbers that someone meant."""


def text_of(value: Any) -> str | None:
    """Text of a scalar; None for what has no text of its own (bool, bytes, infinities, lists, ...).

    A whole number is written without ".0": columns of whole numbers become floats wherever one value is missing.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() and abs(value) < LARGEST_WHOLE else repr(value)
    if isinstance(value, Decimal):
        if not value.is_finite():
            return None
        return str(int(value)) if value == value.to_integral_value() else format(value, "f")
    if isinstance(value, datetime.datetime):
        midnight = value.time() == datetime.time() and value.tzinfo is None
        return value.date().isoformat() if midnight else value.isoformat(" ")
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else None


def plain(value: Any) -> Any:
    """The value with numpy's arrays and scalars as Python's own, also within lists and objects."""
    if isinstance(value, np.ndarray) and value.ndim:
        return [plain(one) for one in value]
    if isinstance(value, np.generic | np.ndarray):
        # float32's 0.1 is 0.10000000149011612 as Python's float, but nobody wrote that.
        return float(str(value)) if value.dtype in (np.float16, np.float32) else value.item()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def json_text(value: Any) -> str | None:
    """JSON text of an object; None for what is none, and for one that JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False) if isinstance(value, dict) else None
    except (TypeError, ValueError):
        return None


def missing(value: Any) -> bool:
    """None, NaN (which pandas writes for it), an empty string or an empty list."""
    if isinstance(value, str | Sequence):
        return len(value) == 0
    return value is None or (not isinstance(value, dict) and value != value)


def unreadable(text: str) -> str | None:
    """The first character that cannot be written as UTF-8 (half of a surrogate pair), escaped; None without any."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None
