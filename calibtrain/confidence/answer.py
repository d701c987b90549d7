"""One graded answer with the likelihood the model gave it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one question; log-probs are natural, of the answer's tokens and its end token."""

    question_id: str
    question: str
    text: str
    token_logprobs: tuple[float, ...]
    correct: bool | None = None  # None: no accepted answers to grade by
    accepted: tuple[str, ...] = ()
    strata: Mapping[str, str] = field(default_factory=dict)
    finished: bool = True  # False: cut at max_new_tokens before the end token
    tokens: tuple[str, ...] = ()  # text of each token, joined the answer as generated; "" for the end token

    @property
    def logprob(self) -> float:
        """Log-probability of the whole answer."""
        return math.fsum(self.token_logprobs)

    @property
    def confidence(self) -> float:
        """Probability the model gave to exactly this answer, in [0, 1]."""
        return math.exp(min(0.0, self.logprob))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the confidence."""
        return {**asdict(self), "strata": dict(self.strata), "confidence": self.confidence}
