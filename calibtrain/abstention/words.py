"""Words for probabilities, by the seven terms of ICD 203 (US Director of National Intelligence, 2015).

The directive's bands run from 1 to 99 percent, share their ends (5, 20, ...) and overlap between 45 and 55 percent in
some printings. Here they are a partition of [0, 1]: a shared end belongs to the band above it, 45 to 55 percent is
"roughly even" alone, and the outer bands reach to 0 and to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from calibtrain.errors import UserError


@dataclass(frozen=True, slots=True)
class Word:
    """A term for the probabilities in [low, high), the last one in [low, 1]."""

    name: str
    low: float
    high: float


WORDS = (
    Word("almost no chance", 0.0, 0.05),
    Word("very unlikely", 0.05, 0.20),
    Word("unlikely", 0.20, 0.45),
    Word("roughly even chance", 0.45, 0.55),
    Word("likely", 0.55, 0.80),
    Word("very likely", 0.80, 0.95),
    Word("almost certain", 0.95, 1.0),
)


def word_for(probability: float) -> Word:
    """The word whose band holds a calibrated probability; UserError outside [0, 1]."""
    if math.isnan(probability) or not 0 <= probability <= 1:
        raise UserError(f"probability {probability} is not in [0, 1]")
    return next(word for word in reversed(WORDS) if probability >= word.low)


def percent(probability: float) -> str:
    """Whole percent, without ever claiming certainty: "87%", "less than 1%", "more than 99%"."""
    word_for(probability)
    if probability < 0.005:
        return "less than 1%"
    return "more than 99%" if probability >= 0.995 else f"{100 * probability:.0f}%"


def phrase(probability: float) -> str:
    """Word and number in the first person, e.g. "I think this is likely to be right (72%)"."""
    sentences = {
        "almost no chance": "I think there is almost no chance that this is right",
        "roughly even chance": "I think there is a roughly even chance that this is right",
        "almost certain": "I am almost certain that this is right",
    }
    name = word_for(probability).name
    return f"{sentences.get(name, f'I think this is {name} to be right')} ({percent(probability)})"
