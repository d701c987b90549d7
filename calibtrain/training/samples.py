"""One answer that the policy sampled: what the loop keeps of it until it has learnt from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled answer; its tokens end with the stop token, unless it was cut."""

    question: int  # index in the training questions
    tokens: tuple[int, ...]
    correct: float
    confidence: float  # NaN: it should have stated one and did not
    abstained: bool = False
    answer_start: int = 0  # tokens of reasoning before the answer
    answer_stop: int | None = None  # where tokens behind the answer begin; None: there are none
    finished: bool = True  # False: cut at max_new_tokens
    sampled_logprobs: tuple[float, ...] = ()  # as whoever sampled gave them; the trainer's own may differ a little
    stated: tuple[bool, ...] = ()  # which tokens state the confidence, where it is stated
    logprobs: tuple[float, ...] = ()  # under the policy that sampled, where a later step or the KL needs them
    reference: tuple[float, ...] = ()  # under the starting model, where the KL needs them
    values: tuple[float, ...] = ()  # of PPO's value head
    last_value: float = 0.0  # of the state after the last token, where values are known
    rewards: tuple[float, ...] = ()  # of each source that is asked, as it gave it; NaN: nothing
    version: int | None = None  # optimiser steps behind the weights that drew it


def loaded_sample(saved: dict[str, Any]) -> Sample:
    """A sample from JSON, which knows no tuples."""
    fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in saved.items()}
    return Sample(**fields)
