"""What every source of confidence takes and gives: a family of sources maps answered questions to scores with their cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibtrain.confidence.answered import Answered
from calibtrain.config import EvaluationConfig
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.records import Record

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Asker:
    """A model in eval mode with all it takes to ask it: `module` is a LossModel, `shots` stand before every question."""

    module: Callable[..., Any]
    template: Template
    settings: EvaluationConfig
    shots: tuple[Record, ...] = ()
    device: torch.device | str = "cpu"
    seed: int = 0  # of sampled answers


@dataclass(frozen=True, slots=True)
class Cost:
    """What a score costs beside the answer itself, for each of N answers (N,) float64.

    Sharing between answers (batches, a common prefix) lowers the time, not these counts.
    """

    forward_passes: Array
    tokens: Array  # read by those passes; what a cache keeps is read once

    @classmethod
    def none(cls, n: int) -> Cost:
        """No extra work: the score comes along with the answer."""
        return cls(np.zeros(n), np.zeros(n))

    def plus(self, other: Cost) -> Cost:
        """Cost of both."""
        return Cost(self.forward_passes + other.forward_passes, self.tokens + other.tokens)

    def mean(self) -> dict[str, float]:
        """Mean of an answer, by name."""
        return {"forward_passes": float(self.forward_passes.mean()), "tokens": float(self.tokens.mean())}


@dataclass(frozen=True, slots=True)
class SourceScores:
    """Scores of N answers by one source. Raises UserError for a value outside [0, 1] or not as many costs."""

    values: Array  # (N,) in [0, 1], higher is surer
    cost: Cost
    probability: bool  # True: meant as the chance to be right; False: only the order means something
    failed: NDArray[np.bool_] | None = None  # (N,) where the model's reply could not be read; the value is then 0.5
    by_likelihood: NDArray[np.bool_] | None = None  # (N,) where a confidence head left it to the likelihood

    def __post_init__(self) -> None:
        n = len(self.values)
        if not ((self.values >= 0) & (self.values <= 1)).all():
            raise UserError("confidence source: a score is not in [0, 1]")
        if len(self.cost.forward_passes) != n or len(self.cost.tokens) != n:
            raise UserError(f"confidence source: {n} scores, {len(self.cost.tokens)} costs; they must be equally many")

    @property
    def num_failed(self) -> int:
        """Replies that could not be read."""
        return 0 if self.failed is None else int(self.failed.sum())


Family = Callable[[Asker, Sequence[Record], Answered], Mapping[str, SourceScores]]
"""Sources that share their work: (asker, the questions, their answers) -> scores of each source by name."""
