"""A paragraph as its sentences, by what ends them in Latin, Cyrillic, Greek, Indic, Arabic and CJK writing.

Rules, no model: the same on every machine, and every sentence is a piece of the text. A full stop does not end a sentence
within a number or a name (3.5, U.S., example.org), after an abbreviation or an initial, nor where a small letter follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_END = re.compile(
    r"[.!?\u2026\u037e\u061f\u06d4\u0964\u0965]+[\"'\u2019\u201d\u00bb)\]]*(?=\s|\Z)"  # needs a space behind it
    r"|[\u3002\uff01\uff1f\uff0e\uff61]+[\"'\u2019\u201d\u300d\u300f\uff09)\]]*"  # CJK: none
    r"|\n\s*\n|\n(?=\s*(?:[-*\u2022]|\d+[.)])\s)"  # a blank line, and an item of a list
)
_MARKER = re.compile(r"(?:[-*\u2022]|\d+[.)])(?=\s)")
_TITLE = re.compile(  # a name or a number follows: these never end a sentence
    r"(?:mrs?|ms|dr|prof|st|mt|ft|gen|col|sgt|capt|lt|rev|hon|gov|sen|rep|pres|vs|cf|e\.g|i\.e|z\.b|d\.h|mme|mlle)",
    re.I,
)
_ABBREVIATION = re.compile(  # these may
    r"(?:sr|jr|etc|ca|approx|est|nos?|vol|figs?|eqs?|eds?|pp?|inc|ltd|co|corp|bros|dept|univ|assn|jan|feb|mar|apr|jun|jul"
    r"|aug|sept?|oct|nov|dec|mon|tue|wed|thu|fri|sat|sun|bzw|usw|evtl|nr|str|bsp|m|ph\.d|(?:[^\W\d_]\.)+[^\W\d_])",
    re.I,
)
_OPENER = re.compile(
    r"(?:The|An?|It|He|She|They|We|You|I|This|That|These|Those|In|On|At|But|And|However|Its|His|Her|There)\b"
)
_BETWEEN = re.compile(r"\s*[\"'\u2018\u201c\u00ab(\[]*")
_WORD_BEFORE = re.compile(r"[\w.]+\Z")


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans [start, stop) of the sentences of `text`, in order and without the space around them. None is empty."""
    found, start = [], 0
    for end in _ends(text):
        found += _trimmed(text, start, end)
        start = end
    return found + _trimmed(text, start, len(text))


def _ends(text: str) -> Iterator[int]:
    for match in _END.finditer(text):
        if match[0][0] == "." and not _stops(text, match):
            continue
        yield match.end()


def _stops(text: str, match: re.Match[str]) -> bool:
    """Whether full stops end a sentence here."""
    following = _BETWEEN.match(text, match.end()).end()  # type: ignore[union-attr]
    after = text[following : following + 1]
    if match[0].startswith("..."):
        return not after.islower()
    before = _WORD_BEFORE.search(text, max(0, match.start() - 30), match.start())
    word = before[0] if before else ""
    if not after:
        return True
    if after.islower():
        return False
    if _MARKER.match(text, match.start() - len(word)) and _at_line_start(text, match.start() - len(word)):
        return False  # 1. of a list
    if _TITLE.fullmatch(word) or (len(word) == 1 and word.isupper() and word != "I"):
        return False  # Dr. Smith, J. Smith
    if _ABBREVIATION.fullmatch(word):  # in the U.S. It is ..., in the U.S. Congress
        return _OPENER.match(text, following) is not None
    return True


def _at_line_start(text: str, place: int) -> bool:
    return not text[text.rfind("\n", 0, place) + 1 : place].strip()


def _trimmed(text: str, start: int, stop: int) -> list[tuple[int, int]]:
    piece = text[start:stop]
    begin = start + len(piece) - len(piece.lstrip())
    end = stop - (len(piece) - len(piece.rstrip()))
    if marker := _MARKER.match(text, begin, end):  # of a list
        inner = text[marker.end() : end]
        begin = marker.end() + len(inner) - len(inner.lstrip())
    return [(begin, end)] if any(one.isalnum() for one in text[begin:end]) else []
