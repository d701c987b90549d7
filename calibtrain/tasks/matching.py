"""Whether an answer is right: it matches one of the accepted answers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

Grading = Literal["normalized_match", "exact_match"]

_APOSTROPHES = re.compile("['\u2018\u2019\u02bb\u02bc\u02be\u02bf`\u00b4]")
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff]")
_POWER = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u207f\u2071]+")  # NFKD would make x2 of x²
_MIXED_FRACTION = re.compile("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e\u2189])")
_INTERVAL = re.compile(r"\s*([\[(])[^\[\](),;]+[,;][^\[\](),;]+([\])])[\s.]*")
_MINUS = re.compile("\u2212|(?<![^\\s(])[\u2010-\u2013](?=[\\d.])")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)'(?=\d)(?!\d{3}(?!\d))")  # 6'2 is not 62, 1'000 is 1000
_GROUPED_DIGITS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_LOOSE_PERIOD = re.compile(r"\.(?!\d)")  # 3.5 keeps its point, U.S. does not
# -5 keeps its sign and so does O- (a blood group, a grade); Guinea-Bissau does not.
_JOINING_HYPHEN = re.compile(r"(?<=\w)-(?=\w)|(?<=\w\w\w)-(?!\w)|(?<!\w)(?<!\^)-(?![\d.])")
_OPERATOR = re.compile(r"(?<=\d)\s*([/:])\s*(?=\d)|(?<=\w)([*])(?=\w)")  # 1/2, 3:1, a*b
_SPACED_OPERATOR = re.compile(r"(?<=\d)\s*([/:])\s*(?=\d)")
_PART_OF_MEANING = frozenset(".-%#\u2030\u2031\u00a7")
_STROKES = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe"})
_STRESS = frozenset("\u0300\u0301")
_CYRILLIC_VOWELS = frozenset("аеиоуыэюяіє")


THINK_START, THINK_END = "<think>", "</think>"


def thinking_ends(text: str, *, opened: bool = False) -> int | None:
    """How many `</think>` stand before the answer: those of blocks, and stray ones, that the text opens with; None where
    a block does not end. `opened`: the prompt has begun a block.
    """
    ends = 0
    while opened or text.lstrip().startswith((THINK_START, THINK_END)):
        if THINK_END not in text:
            return None
        text, ends, opened = text.partition(THINK_END)[2], ends + 1, False
    return ends


def without_thinking(text: str) -> str:
    """The text behind the blocks of thinking that it opens with; "" where one does not end."""
    ends = thinking_ends(text)
    return "" if ends is None else text.split(THINK_END, ends)[ends]


def normalize(text: str, *, strokes: bool = True) -> str:
    """Casefold, strip accents, punctuation, a leading "the" and extra spaces; numbers keep sign, point and powers.

    Marks are accents in Latin and Greek, and in Cyrillic where they show the stress or make ё of е. Elsewhere they make
    another letter (パリ is not バリ, мой is not мои) and stay. `strokes` also makes l of ł, o of ø and their like.
    """
    interval = _INTERVAL.fullmatch(text)
    closed = interval is not None and (interval[1] == "[" or interval[2] == "]")
    ends = [f"{interval[1]}{interval[2]}"] if interval is not None and closed else []  # [0, 1) is not [0, 1]
    text = _INVISIBLE.sub("", _APOSTROPHES.sub("'", text))
    text = _MIXED_FRACTION.sub(" ", _POWER.sub(lambda found: "^" + unicodedata.normalize("NFKD", found[0]), text))
    # NFKD around casefold makes caseless matching of compatible characters stable (Unicode 3.13, D146).
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    text = _without_accents(_MINUS.sub("-", text))
    text = (text.translate(_STROKES) if strokes else text).replace("&", " and ").replace("\u2044", "/")
    text = _APOSTROPHES.sub("", _BETWEEN_DIGITS.sub(" ", text))
    text = _JOINING_HYPHEN.sub(" ", _LOOSE_PERIOD.sub("", _GROUPED_DIGITS.sub("", text)))
    kept = {found.start(found.lastindex or 0) for found in _OPERATOR.finditer(text)}
    text = "".join(
        " " if unicodedata.category(c)[0] == "P" and c not in _PART_OF_MEANING and place not in kept else c
        for place, c in enumerate(text)
    )
    words = _without_accents(_SPACED_OPERATOR.sub(r"\1", text)).split()  # again: a mark may have lost its letter
    return " ".join([*(words[1:] if words[:1] == ["the"] and len(words) > 1 else words), *ends])


def _without_accents(text: str) -> str:
    """NFKD `text` without the marks that are accents."""
    kept, base = [], " "
    for c in text:
        if not unicodedata.combining(c):
            base = c
            kept.append(c)
        elif not _is_accent(base, c):
            kept.append(c)
    return "".join(kept)


@lru_cache(maxsize=4096)
def _is_accent(base: str, mark: str) -> bool:
    name = unicodedata.name(base, "")
    if name.startswith("CYRILLIC"):
        return (mark in _STRESS and base in _CYRILLIC_VOWELS) or (base == "е" and mark == "\u0308")
    return unicodedata.category(base)[0] in "ZCP" or name.startswith(("LATIN", "GREEK"))


def grade(text: str, accepted: Iterable[str], method: Grading = "normalized_match") -> bool:
    """Whether `text` is one of the accepted answers, as a whole; thinking before it does not count.

    An empty answer is never right.
    """
    clean = normalize if method == "normalized_match" else str.strip
    answer = clean(without_thinking(text))
    return bool(answer) and any(answer == clean(without_thinking(one)) for one in accepted)
