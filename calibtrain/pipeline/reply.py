"""What a finished run says to one question: the answer or that it is not known, how sure it is, and what is promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calibtrain.abstention.certificate import Certificate
from calibtrain.abstention.claims import ClaimsCertificate
from calibtrain.abstention.words import percent
from calibtrain.confidence.outside import ALPHA
from calibtrain.pipeline.calibration_file import LIKELIHOOD
from calibtrain.pipeline.scope import plain

REFUSAL = "I do not know."


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of an answer's text and the probability the model gave it, in [0, 1]. The end of the answer is ""."""

    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class ReplyPart:
    """A piece of an answer that is right or wrong by itself, a field of JSON or a claim: text[start:stop] of the reply."""

    name: str  # "address.city", "claim"
    text: str  # the value, which JSON may write otherwise ("Z\\u00fcrich")
    start: int
    stop: int
    probability: float  # calibrated chance that it is right
    word: str
    kept: bool = True  # False: withheld; `Reply.spoken` leaves it out


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. `text` is the model's best guess also where it abstains; show it then only as such."""

    question: str
    text: str
    probability: float  # calibrated chance that `text` is right
    word: str
    sentence: str  # word and number in the first person
    promise: str  # what is certified and of which questions: say it first
    limit: str  # what is not
    abstained: bool
    reason: str  # why it answered or abstained
    threshold: float | None  # None: no certificate
    risk: float | None  # certified share of wrong answers among the given ones
    certified: bool
    certificate: Certificate | None
    tokens: tuple[Token, ...]
    finished: bool  # False: cut at max_new_tokens
    prompt_tokens: int
    reservation: str = ""  # end of the sentence: the group that it is known not to hold for
    group: str | None = None  # of the question, where it was named
    source: str = LIKELIHOOD  # of the confidence
    forward_passes: float = 0.0  # that the confidence cost beside the answer's own
    tokens_read: float = 0.0  # by those passes
    prediction_set: tuple[str, ...] | None = (
        None  # options of which one is right, but for a certified share of questions
    )
    parts: tuple[ReplyPart, ...] = ()  # in order; () where an answer is right or wrong as a whole
    claims: ClaimsCertificate | None = None  # what `threshold` and `risk` are of, where claims are withheld one by one
    outside: float | None = None  # p-value of "the question is like the graded ones"; None: not looked at
    uncovered: str = ""  # why no certificate covers a question of this shape
    silence: str = ""  # why the certificate says nothing of this question; "" where it speaks
    found: bool = True  # False: the reply holds no answer, so that there is none to give
    said: str = ""  # the whole reply, where the answer is a part of it (a chain of thought) or written otherwise

    @property
    def unlike(self) -> bool:
        """Whether the question is told to be unlike those that were graded."""
        return self.outside is not None and self.outside < ALPHA

    @property
    def spoken(self) -> str:
        """What to show a person: the answer without what is withheld of it, or that it is not known."""
        if self.abstained:
            return REFUSAL
        return self.text if self.claims is None else _kept(self.text, self.parts)

    def told(self) -> str:
        """The reply for a terminal: what is promised, the answer or that it is not known, and what is not promised."""
        if not self.abstained:
            line = f"{plain(self.spoken, 2000)}  ({self.word}, {percent(self.probability)}{self.reservation})"
            if self.parts:
                line = "\n".join([plain(self.spoken, 2000) if self.claims else line, *map(_told, self.parts)])
            if self.prediction_set:
                named = ", ".join(plain(option, 200) for option in self.prediction_set)
                line += f"\nOne of these is right, but for a certified share of such questions: {named}"
        elif self.claims is not None:
            every = "its claim is" if len(self.parts) == 1 else f"all {len(self.parts)} claims are"
            line = f"{self.spoken} ({every} withheld)"
        elif self.threshold is None or self.probability >= self.threshold:
            line = self.spoken
        else:
            chance, threshold = percent(self.probability), percent(self.threshold)
            line = f"{self.spoken} (best guess at {chance}{self.reservation}, below the threshold {threshold})"
        return f"{self.promise}\n{line}\n{self.limit}"


def _kept(text: str, parts: Sequence[ReplyPart]) -> str:
    """The parts that are not withheld, each with what separates it from the part before, unless that says something."""
    begins = [0, *(part.stop for part in parts)]
    gaps = [text[begin : part.start] for begin, part in zip(begins, parts, strict=False)]
    said = [
        (" " if any(map(str.isalpha, gap)) else gap) + text[part.start : part.stop]
        for gap, part in zip(gaps, parts, strict=True)
        if part.kept
    ]
    return "".join(said).strip()


def _told(part: ReplyPart) -> str:
    """One part for a terminal; of one that is withheld, only that it is."""
    if not part.kept:
        return f"  [{plain(part.name)} withheld: {percent(part.probability)}]"
    return f"  {plain(part.name)}: {plain(part.text, 200)}  ({part.word}, {percent(part.probability)})"
