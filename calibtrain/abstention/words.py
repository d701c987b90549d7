"""Words for probabilities: partitions of [0, 1], applied to calibrated probabilities only, with an audit of each word.

Published scales leave gaps, overlap, or nest ("likely" includes "very likely"). Here each is a partition: a shared end
belongs to the band above it, a gap is split at its middle, a nested term gets what the stronger terms leave it, and
the outer bands reach to 0 and to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from calibtrain.calibration.calibrators import Calibrator
from calibtrain.calibration.intervals import clopper_pearson
from calibtrain.calibration.scores import Scores
from calibtrain.errors import UserError


@dataclass(frozen=True, slots=True)
class Word:
    """A term for the probabilities in [low, high), the last one in [low, 1]."""

    name: str
    low: float
    high: float


Scale = tuple[Word, ...]


def _scale(*bands: tuple[str, float]) -> Scale:
    """Words from (name, lower end), ascending."""
    ends = [low for _, low in bands[1:]] + [1.0]
    return tuple(Word(name, low, high) for (name, low), high in zip(bands, ends, strict=True))


WORDS = (
    Word("almost no chance", 0.0, 0.05),
    Word("very unlikely", 0.05, 0.20),
    Word("unlikely", 0.20, 0.45),
    Word("roughly even chance", 0.45, 0.55),
    Word("likely", 0.55, 0.80),
    Word("very likely", 0.80, 0.95),
    Word("almost certain", 0.95, 1.0),
)
"""ICD 203 (US Director of National Intelligence, 2015); "roughly even chance" alone holds 45 to 55 percent."""
SCALES: dict[str, Scale] = {
    "icd203": WORDS,
    # IPCC guidance note on uncertainties (Mastrandrea et al. 2010).
    "ipcc": _scale(
        ("exceptionally unlikely", 0.0),
        ("extremely unlikely", 0.01),
        ("very unlikely", 0.05),
        ("unlikely", 0.10),
        ("about as likely as not", 0.33),
        ("likely", 0.66),
        ("very likely", 0.90),
        ("extremely likely", 0.95),
        ("virtually certain", 0.99),
    ),
    # NATO AJP-2.1.
    "nato": _scale(
        ("highly unlikely", 0.0), ("unlikely", 0.10), ("even chance", 0.40), ("likely", 0.60), ("highly likely", 0.90)
    ),
    # The UK's Professional Head of Intelligence Assessment; its gaps (5 to 10 percent, ...) are split.
    "phia": _scale(
        ("remote chance", 0.0),
        ("highly unlikely", 0.075),
        ("unlikely", 0.225),
        ("realistic possibility", 0.375),
        ("likely", 0.525),
        ("highly likely", 0.775),
        ("almost certain", 0.925),
    ),
}
_SENTENCES = {
    "almost no chance": "I think there is almost no chance that this is right",
    "remote chance": "I think there is only a remote chance that this is right",
    "roughly even chance": "I think there is a roughly even chance that this is right",
    "even chance": "I think there is an even chance that this is right",
    "realistic possibility": "I think there is a realistic possibility that this is right",
    "about as likely as not": "I think this is about as likely as not to be right",
    "almost certain": "I am almost certain that this is right",
    "virtually certain": "I am virtually certain that this is right",
}


@dataclass(frozen=True, slots=True)
class Spoken:
    """How one calibrated probability is said: the word never without its number."""

    probability: float
    word: str
    percent: str
    sentence: str


@dataclass(frozen=True, slots=True)
class WordAudit:
    """How often answers under one word were right, against the band that the word promises."""

    word: str
    band_low: float
    band_high: float
    n: int
    right: int
    share: float  # NaN for n = 0
    low: float  # Clopper-Pearson interval of the share; all words' intervals hold together at the audit's level
    high: float
    holds: bool  # the interval reaches the band

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the share is None where the word was not used."""
        return {**asdict(self), "share": None if math.isnan(self.share) else self.share}


def scale_of(name: str) -> Scale:
    """The scale of this name; UserError for one that SCALES lacks."""
    if name not in SCALES:
        raise UserError(f"words: unknown scale {name!r}; known are {', '.join(SCALES)}")
    return SCALES[name]


def word_for(probability: float, scale: Scale = WORDS) -> Word:
    """The word whose band holds a calibrated probability; UserError outside [0, 1]."""
    if math.isnan(probability) or not 0 <= probability <= 1:
        raise UserError(f"probability {probability} is not in [0, 1]")
    return next(word for word in reversed(scale) if probability >= word.low)


def steady_word(probability: float, previous: Word | None, margin: float = 0.02, scale: Scale = WORDS) -> Word:
    """`word_for`, but the previous word stays while the probability is within `margin` of its band.

    For a display that is updated: a probability that wavers about an edge does not make the word flicker. An audit of
    words chosen so takes the same margin.
    """
    word = word_for(probability, scale)
    if not 0 <= margin < min(one.high - one.low for one in scale):
        raise UserError(f"words: a margin of {margin} is not between 0 and the narrowest band")
    if previous in scale and previous.low - margin <= probability < previous.high + margin:
        return previous
    return word


def percent(probability: float) -> str:
    """Whole percent, without ever claiming certainty: "87%", "less than 1%", "more than 99%"."""
    word_for(probability)
    if probability < 0.005:
        return "less than 1%"
    return "more than 99%" if probability >= 0.995 else f"{100 * probability:.0f}%"


def phrase(probability: float, scale: Scale = WORDS, word: Word | None = None) -> str:
    """Word and number in the first person, e.g. "I think this is likely to be right (72%)".

    `word` is the one to say where `steady_word` chose it.
    """
    name = (word or word_for(probability, scale)).name
    return f"{_SENTENCES.get(name, f'I think this is {name} to be right')} ({percent(probability)})"


def speak(calibrator: Calibrator, scores: Scores | ArrayLike, scale: Scale = WORDS) -> list[Spoken]:
    """Words of answers, from their raw scores through the calibrator, so that no raw confidence is ever put in words."""
    return [Spoken(q, word_for(q, scale).name, percent(q), phrase(q, scale)) for q in calibrator.apply(scores).tolist()]


def audit_words(
    probability: ArrayLike,
    correct: ArrayLike,
    scale: Scale = WORDS,
    *,
    words: Sequence[str] | None = None,
    level: float = 0.95,
    margin: float = 0.0,
) -> list[WordAudit]:
    """Whether each word kept its promise on graded answers.

    probability (N,) calibrated, correct (N,) bool or 0/1: answers used for nothing else. words (N,): those shown, where
    they were logged or chosen by `steady_word` with this margin; by default `word_for`'s. A calibrated system fails at
    one word or more with probability at most 1 - level (Bonferroni over the words used; a band's accuracy lies within it).
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if p.shape != y.shape or p.ndim != 1 or not np.isin(y, (0, 1)).all():
        raise UserError(f"word audit: {p.size} probabilities and {y.size} grades; give one grade, 0 or 1, per answer")
    names = np.array([word_for(q, scale).name for q in p.tolist()] if words is None else list(words), dtype=str)
    unknown = set(names.tolist()) - {word.name for word in scale}
    if names.shape != p.shape or unknown:
        raise UserError(f"word audit: {names.size} words for {p.size} answers, unknown: {sorted(unknown)}")
    used = len(np.unique(names))
    rows = []
    for word in scale:
        mine = names == word.name
        n, right = int(mine.sum()), int(y[mine].sum())
        low, high = clopper_pearson(right, n, 1 - (1 - level) / max(used, 1))
        holds = low <= word.high + margin and high >= word.low - margin
        rows.append(WordAudit(word.name, word.low, word.high, n, right, right / n if n else math.nan, low, high, holds))
    return rows


def check_words(audit: Sequence[WordAudit]) -> None:
    """Fail when a word's band is missed: UserError that names the words and what was found."""
    missed = [
        f'"{one.word}" promises {one.band_low:.0%} to {one.band_high:.0%}, but {one.right} of {one.n} were right '
        f"({one.low:.0%} to {one.high:.0%})"
        for one in audit
        if not one.holds
    ]
    if missed:
        raise UserError("words: " + "; ".join(missed) + "; fit the calibrator again before showing words")
