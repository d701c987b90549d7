"""The contract of an engine: prompts in, completions with log-probs out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Completion:
    """One greedy completion of one prompt, up to and with its stop token."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural, of each token, under the model's own distribution
    finished: bool  # False: cut at max_new_tokens
    text: str = ""  # as the engine reads the tokens, without the stop token; untrusted


class Engine(Protocol):
    """Whoever completes prompts."""

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        stop_ids: Collection[int],
        max_new_tokens: int,
        goes_on: Callable[[Sequence[int]], bool] | None = None,
        on_done: Callable[[int], None] = lambda prompts_done: None,
    ) -> list[Completion]:
        """Greedy completions in the order of the prompts (token ids). `goes_on` may keep one from ending at a stop token."""
        ...
