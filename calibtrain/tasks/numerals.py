"""Numbers as people and models write them: where one stands in a text, and which it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

LONGEST = 60
"""Digits of a number, and size of its exponent, that are read: a stranger may write more than a machine can hold."""

_CURRENCY = "$€£¥₹₽₩₪₫₺₦฿¢"
_MARK = r"(?:,(?:\\!)?|\{,\}|\\[.,;: ]|[~\u00a0\u2009\u202f'])"  # between groups of three digits
_GROUPS = (
    rf"\d{{1,3}}(?:{_MARK}\d{{3}}(?!\d)){{1,20}}|[1-9]\d{{0,2}}(?: \d{{3}}(?!\d)){{1,20}}"
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"
)
_DIGITS = rf"(?:(?:{_GROUPS})(?:\.\d+)?|\d{{1,3}}(?:\.\d{{3}}){{2,}}(?!\d)|\d+(?:(?:\.|\{{\.\}})\d+)?|(?<![.\d])\.\d+)"
_COMMA = r"(?:,|\{,\})\d"
_UNCLEAR = rf"(?:{_GROUPS}|\d+(?:\.\d+)*){_COMMA}\d*(?:(?:[,.]|\{{,\}})\d+)*"  # 3,5 and 1.234,56 and (1,2)
_POWER = r"(?:\s?(?:\\times|\\cdot|[x×*·])\s?10\s?(?:\^|\*\*)\s?\{?[-+\u2212]?\d+\}?|[eE][-+]?\d+)"
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = rf"(?:\s|~|\\[ ,])?(?:\\(?:text|mathrm|mbox)\{{\s?)?(?P<scale>(?i:{'|'.join(_SCALES)}))s?\b\}}?"
_FRACTION = r"\\[dt]?frac\s?(?:\{\s?-?\d+\s?\}\s?\{\s?\d+\s?\}|\d{2}(?!\d))"
_SIGN = rf"(?<![\w.)\]}}])[-+\u2212\u2013](?=\\?[{_CURRENCY}.\d]|\\[dt]?frac)"
_HERE = r"(?<![A-Za-z0-9_^/])(?<!\^\{)(?<!\d\.)(?<!\d,)(?<!\{,\})"  # no digit of x2, 10^{2}, km^2, 2.0.1 or 3,5
_ENDS = rf"(?!\d|\.\d|{_COMMA}|\s?\^(?!\s?\{{?\s?\\circ))"
NUMBER = re.compile(
    rf"(?:{_SIGN})?(?:\\?[{_CURRENCY}]\s?)?(?:{_SIGN})?(?:(?:{_HERE}\d+\s?)?{_FRACTION}|"
    rf"{_HERE}(?:\d+[ ])?\d+\s?/\s?\d+(?![\d/.]|\s?/)|"
    rf"{_HERE}(?:(?=(?P<taken>{_DIGITS}))(?P=taken){_POWER}?|{_UNCLEAR}){_ENDS})(?:{_SCALE})?(?:\s?(?:\\?%|percent\b))?"
)
"""A number with its sign, currency and percent sign: 1,000 and 1e3, 3/4 and \\frac{3}{4}, 1 1/2, -$5, 50%, 1.5 million.

Also 3,5 as a whole, which has no value here: one number, or two."""

_PLAIN = re.compile(
    rf"(?P<digits>{_DIGITS})(?P<power>{_POWER})?|(?:(?P<whole>\d+)\s?)?(?:\\[dt]?frac\s?)?"
    r"(?:\{?\s?(?P<minus>-?)(?P<above>\d+)\s?(?:/|\}\s?\{)\s?(?P<below>\d+)\s?\}?|(?P<short>\d{2}))"
)


_SWAPPED = str.maketrans(",.", ".,")


def numbers_in(text: str, comma: bool = False) -> Iterator[tuple[int, int]]:
    """Characters [start, stop) of each number in a text, in order. `comma`: decimals stand behind one, as in 3,5."""
    for found in NUMBER.finditer(text.translate(_SWAPPED) if comma else text):
        written = found[0]
        start = found.start() + len(written) - len(written.lstrip())
        yield start, found.start() + len(written.rstrip())


def number_of(text: str, hundredth: bool = False, comma: bool = False) -> Fraction | None:
    """The number that a text is, exactly, whatever unit or currency stands around it; None for any other text.

    `hundredth`: 50% is 1/2, not 50. `comma`: as in `numbers_in`. Of several numbers none is meant.
    """
    spans = [*islice(numbers_in(text, comma), 2)]
    if len(spans) != 1:
        return None
    start, stop = spans[0]
    return value_of(text[start:stop], hundredth, comma)


def unclear(written: str, comma: bool = False) -> bool:
    """Whether what `numbers_in` found as `written` is 3,5 or the like, which may be one number or two; 3.5 with `comma`."""
    written = written.translate(_SWAPPED) if comma else written
    return bool(re.search(_COMMA, written)) and value_of(written) is None


def value_of(written: str, hundredth: bool = False, comma: bool = False) -> Fraction | None:
    """The number that `numbers_in` found as `written`; None for one that is unclear, too large to hold, or divides by 0."""
    written = written.translate(_SWAPPED) if comma else written
    percent = written.endswith(("%", "percent"))
    bare = written.removesuffix("percent").rstrip("%\\").strip()
    scale = re.search(rf"{_SCALE}$", bare)
    bare = bare if scale is None else bare[: scale.start()]
    negative = bool(re.search(rf"^\\?[{_CURRENCY}]?\s?[-\u2212\u2013]", bare))
    bare = re.sub(rf"^(?:[-+\u2212\u2013\s\\{_CURRENCY}])*(?=[\d.]|\\|frac|dfrac|tfrac)", "", bare)
    bare = re.sub(r"^(?=[dt]?frac)", r"\\", bare)
    if (found := _PLAIN.fullmatch(bare)) is None or sum(map(str.isdigit, bare)) > LONGEST:
        return None
    value = _positive(found)
    if value is None:
        return None
    value = (-value if negative else value) * (1 if scale is None else _SCALES[scale["scale"].lower()])
    return value / 100 if percent and hundredth else value


def _positive(found: re.Match[str]) -> Fraction | None:
    if (digits := found["digits"]) is not None:
        digits = re.sub(r"\\.|[^\d.]", "", digits)
        value = Fraction(digits if digits.count(".") < 2 else digits.replace(".", ""))
        if found["power"] is None:
            return value
        exponent = int(re.sub(r".*[\^*eE]|[{}\s]", "", found["power"].replace("\u2212", "-")))
        return None if abs(exponent) > LONGEST else value * Fraction(10) ** exponent
    short = found["short"]
    above, below = (int(short[0]), int(short[1])) if short else (int(found["above"]), int(found["below"]))
    if below == 0:
        return None
    part = Fraction(above, below)
    return (part + int(found["whole"] or 0)) * (-1 if found["minus"] else 1)
