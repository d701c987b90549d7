"""Whether an answer is right: it matches one of the accepted answers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

Grading = Literal["normalized_match", "exact_match"]

_APOSTROPHES = re.compile("['\u2018\u2019\u02bb\u02bc\u02be\u02bf`\u00b4]")
_GROUPED_DIGITS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_LOOSE_PERIOD = re.compile(r"\.(?!\d)")  # 3.5 keeps its point, U.S. does not
_JOINING_HYPHEN = re.compile(r"(?<=\w)-|-(?!\d)")  # -5 keeps its sign, Guinea-Bissau does not
_PART_OF_MEANING = frozenset(".-%#")


def normalize(text: str) -> str:
    """Casefold, strip accents, punctuation, a leading "the" and extra spaces; numbers keep their sign and point."""
    # NFKD around casefold makes caseless matching of compatible characters stable (Unicode 3.13, D146).
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    text = "".join(c for c in text if not unicodedata.combining(c)).replace("&", " and ").replace("\u2212", "-")
    text = _GROUPED_DIGITS.sub("", _APOSTROPHES.sub("", text))
    text = _JOINING_HYPHEN.sub(" ", _LOOSE_PERIOD.sub("", text))
    text = "".join(" " if unicodedata.category(c)[0] == "P" and c not in _PART_OF_MEANING else c for c in text)
    words = text.split()
    return " ".join(words[1:] if words[:1] == ["the"] and len(words) > 1 else words)


def grade(text: str, accepted: Iterable[str], method: Grading = "normalized_match") -> bool:
    """Whether `text` is one of the accepted answers, as a whole. An empty answer is never right."""
    clean = normalize if method == "normalized_match" else str.strip
    answer = clean(text)
    return bool(answer) and any(answer == clean(one) for one in accepted)
