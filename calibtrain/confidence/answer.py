"""One graded answer with the likelihood the model gave it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from calibtrain.tasks.matching import normalize


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """A piece of an answer that is right or wrong by itself: a field of JSON, a claim."""

    name: str
    text: str
    logprob: float  # of its tokens
    correct: bool | None = None
    start: int = 0  # the answer's text[start:stop] says it
    stop: int = 0

    @property
    def confidence(self) -> float:
        """Probability the model gave to exactly these tokens, given what stands before them, in [0, 1]."""
        return math.exp(min(0.0, self.logprob))


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one question; log-probs are natural, of the answer's tokens and its end token.

    Where the task reads the likelihood of some of these alone (JSON: of the values), they are the tokens of these.
    """

    question_id: str
    question: str
    text: str
    token_logprobs: tuple[float, ...]
    correct: bool | None = None  # None: no accepted answers to grade by
    accepted: tuple[str, ...] = ()
    strata: Mapping[str, str] = field(default_factory=dict)
    finished: bool = True  # False: cut at max_new_tokens before the end token
    tokens: tuple[str, ...] = ()  # text of each token, joined the answer as generated; "" for the end token
    key: str = ""  # answers to one question mean the same where it is equal
    reply: str = ""  # all that was said, where the answer is a part of it or written otherwise
    reply_logprob: float | None = None  # of the whole reply with its thinking, where the answer is a part of it
    reply_length: int | None = None  # tokens of the whole reply, likewise
    found: bool = True  # False: the reply holds nothing that could be an answer
    parts: tuple[AnswerPart, ...] = ()  # pieces that are right or wrong by themselves
    options: tuple[str, ...] = ()  # replies that it could be
    option_logprobs: tuple[float, ...] = ()  # of each, their probabilities summing to 1; the answer is the likeliest
    asked: str = ""  # `Record.key` of the question: what was asked, whatever stood around it
    outside: float | None = None  # p-value of "it is like the graded ones", where that was asked

    @property
    def logprob(self) -> float:
        """Log-probability of the whole answer; of one that was chosen by likelihood, among its options."""
        return max(self.option_logprobs) if self.option_logprobs else math.fsum(self.token_logprobs)

    @property
    def confidence(self) -> float:
        """Probability the model gave to exactly this answer (among its options), in [0, 1]."""
        return math.exp(min(0.0, self.logprob))

    @property
    def choice(self) -> int | None:
        """Place of the answer among its options; None where it is none of them."""
        if self.option_logprobs:
            return self.option_logprobs.index(max(self.option_logprobs))
        return self.options.index(self.text) if self.found and self.text in self.options else None

    @property
    def right_options(self) -> tuple[bool, ...]:
        """Which of its options are accepted answers."""
        return tuple(option in self.accepted for option in self.options)

    def rescored(self, logprob: float) -> Answer:
        """The same answer with another log-prob, as one number."""
        return replace(self, token_logprobs=(logprob,), options=(), option_logprobs=())

    @property
    def chain_logprob(self) -> float:
        """Log-probability of the whole reply, with the reasoning before the answer."""
        return self.logprob if self.reply_logprob is None else self.reply_logprob

    @property
    def chain_length(self) -> int:
        """Tokens of the whole reply."""
        return len(self.token_logprobs) if self.reply_length is None else self.reply_length

    @property
    def meaning(self) -> str:
        """What answers to one question are compared by."""
        return self.key or normalize(self.text)

    @property
    def said(self) -> str:
        """The whole reply, which is what the model would say again."""
        return self.reply or self.text

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the confidence."""
        return {**asdict(self), "strata": dict(self.strata), "confidence": self.confidence}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Answer:
        """From JSON, which knows no tuples; `confidence` is not read. Raises TypeError, ValueError or KeyError."""
        row: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        row.pop("confidence", None)
        row["parts"] = tuple(AnswerPart(**one) for one in row.get("parts", ()))
        return cls(**row)
