"""The contract of engines: prompts in, completions with log-probs out; greedy ones, or draws from a policy in training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of one prompt, up to and with its stop token."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural, of each token, under the model's own distribution
    finished: bool  # False: cut at max_new_tokens
    text: str = ""  # as the engine reads the tokens, without the stop token; untrusted
    version: int | None = None  # optimiser steps behind the weights that drew it; None: nobody counted


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


@dataclass(frozen=True, slots=True)
class Draws:
    """What a sampling engine is asked for: `samples` completions of each prompt, at temperature 1 and nothing else.

    prompts: token ids, none empty; seeds: one for each prompt, in [0, 2**31); goes_on: may keep a completion that came to a
    stop token from ending there.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    samples: int
    stop_ids: Collection[int]
    max_new_tokens: int
    goes_on: Callable[[Sequence[int]], bool] | None = None


class SamplingEngine(Protocol):
    """Whoever draws answers from the policy while it is trained. Each rank asks for its own share of prompts.

    A version is the number of optimiser steps behind the weights.
    """

    metrics: dict[str, float]
    """Of the last round: seconds, staleness, and how far the engine's log-probs were from the trainer's."""

    def push(self, version: int) -> None:
        """Let the policy's present weights, of this version, answer from here on. Collective."""
        ...

    def sample(self, draws: Draws, version: int) -> list[list[Completion]]:
        """The completions of each prompt, by the policy's present weights, which are pushed where they were not yet.

        What `start` began of the same draws is returned as it was drawn. Raises EngineFailure, on every rank, where one of
        them gets no replies. Collective.
        """
        ...

    def start(self, draws: Draws) -> None:
        """Begin to draw by the weights that were pushed last, while something else is done. Local."""
        ...

    def started(self) -> tuple[int, list[list[Completion]]] | None:
        """The version and the completions of what was started, once they are there; None without any. Local."""
        ...

    def restore(self, draws: Draws, version: int, groups: list[list[Completion]]) -> None:
        """Take what `started` gave in an earlier process for what a `start` of the same draws has given. Local."""
        ...

    def close(self) -> None:
        """End what was started for this run. Local; may be called again."""
        ...
