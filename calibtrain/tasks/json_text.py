"""JSON in untrusted text: found, parsed within bounds, and the characters of each of its values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

Path = tuple[str | int, ...]
"""Keys and array indices from the top to a value."""

LARGEST, DEEPEST, OPENINGS = 1 << 16, 32, 64
"""Characters and nesting of a JSON text, and how many brackets of a reply are tried as its beginning."""

_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SCALAR = re.compile(r"[^\s,\]}]+")
_PLAIN_KEY = re.compile(r"[^\W\d][\w-]*")


@dataclass(frozen=True, slots=True)
class Value:
    """A scalar, or an empty object or array: text[start:stop], quotes included."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Found:
    """An object or array in a text: text[start:stop]."""

    value: Any
    start: int
    stop: int


def parse(text: str) -> Any:
    """The object or array that `text` is. Raises ValueError for anything else, with the reason.

    Refused beside what is no JSON: a key twice in an object, NaN and infinities, numbers that no float holds, halves of
    characters, and more than LARGEST characters or DEEPEST levels.
    """
    if len(text) > LARGEST:
        raise ValueError(f"more than {LARGEST} characters")
    try:
        value = _DECODER.decode(text)
        _check(value)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    return value


def find(text: str, opening: str = "{") -> Found | None:
    """The JSON in a text: the whole of it, that of a ``` fence, else the first that is balanced from an `opening` on."""
    if len(text) > LARGEST:
        return None
    spans = [(0, len(text)), *(one.span(1) for one in _FENCE.finditer(text))]
    for start, stop in spans:
        start = _SPACE.match(text, start).end()  # type: ignore[union-attr]
        stop = start + len(text[start:stop].rstrip(" \t\r\n"))
        if (found := _parsed(text, start, stop)) is not None:
            return found
    for match in islice(re.finditer(re.escape(opening), text), OPENINGS):
        try:
            stop = _DECODER.raw_decode(text, match.start())[1]
        except (ValueError, RecursionError):
            stop = 0
        if stop and (found := _parsed(text, match.start(), stop)) is not None:
            return found
    return None


def values(text: str) -> Iterator[Value]:
    """Every scalar and empty object or array, in order, of a text that `parse` accepts."""
    return _values(text, _SPACE.match(text).end(), ())  # type: ignore[union-attr]


def at(value: Any, path: Path) -> Any:
    """The value at a path. Raises KeyError, IndexError or TypeError where there is none."""
    for key in path:
        value = value[key]
    return value


def name_of(path: Iterable[str | int]) -> str:
    """A path as people write it: address.lines[0]["odd key"]."""
    name = ""
    for key in path:
        if isinstance(key, int):
            name += f"[{key}]"
        elif _PLAIN_KEY.fullmatch(key):
            name += f".{key}" if name else key
        else:
            name += f"[{json.dumps(key, ensure_ascii=False)}]"
    return name


def _parsed(text: str, start: int, stop: int) -> Found | None:
    try:
        return Found(parse(text[start:stop]), start, stop)
    except ValueError:
        return None


def _values(text: str, place: int, path: Path) -> Generator[Value, None, int]:
    """The values of what begins at `place`; returns, to whom delegates, where it ends."""
    first = text[place]
    if first not in "{[":
        pattern = _STRING if first == '"' else _SCALAR
        stop = pattern.match(text, place).end()  # type: ignore[union-attr]
        yield Value(path, place, stop)
        return stop
    begin, index, place = place, 0, _space(text, place + 1)
    if text[place] in "}]":
        yield Value(path, begin, place + 1)
        return place + 1
    while True:
        key: str | int = index
        if first == "{":
            stop = _STRING.match(text, place).end()  # type: ignore[union-attr]
            key = json.loads(text[place:stop])
            place = _space(text, _space(text, stop) + 1)  # behind the colon
        place = _space(text, (yield from _values(text, place, (*path, key))))
        if text[place] != ",":
            return place + 1
        index, place = index + 1, _space(text, place + 1)


def _space(text: str, place: int) -> int:
    """Where the next character stands that is no whitespace."""
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is beyond what a float holds")
    return number


def _whole(digits: str) -> int:
    if len(digits) > 400:
        raise ValueError("a number of more than 400 digits")
    return int(digits)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole, strict=True
)


def _check(top: Any) -> None:
    """ValueError for a scalar alone, for what is nested too deep, and for half of a character."""
    if not isinstance(top, dict | list):
        raise ValueError("neither an object nor an array")
    level = [top]
    for _ in range(DEEPEST):
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)
                 if isinstance(inner, dict | list)]  # fmt: skip
        if not level:
            break
    else:
        raise ValueError(f"nested more than {DEEPEST} deep")
    try:
        json.dumps(top, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character (a lone surrogate)") from error
