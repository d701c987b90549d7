"""What rewards remember of earlier rounds: running statistics, PPO-C's threshold, and how the reward and the grades went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

WATCHED = (8, 16, 32)
"""Rounds over which a rising reward is compared with falling grades: what comes fast shows in few, what creeps in many."""
CLEAR = 2.45
"""Student's t of a slope over the fewest of them that one in forty has by chance."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of the values so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_values(self, values: Tensor) -> Moments:
        """These and `values` (n,), of which NaN are left out (Chan, Golub, LeVeque 1979)."""
        kept = values[~values.isnan()].double()
        n = kept.numel()
        if not n:
            return self
        mean = float(kept.mean())
        squares, count, gap = float((kept - mean).square().sum()), self.count + n, mean - self.mean
        return Moments(count, self.mean + gap * n / count, self.squares + squares + gap * gap * self.count * n / count)

    @property
    def deviation(self) -> float:
        """Standard deviation of the values; 1 where all are alike."""
        return math.sqrt(self.squares / self.count) if self.count and self.squares > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Of all rounds before one, over all ranks. The same samples make the same memory on every rank."""

    moments: tuple[Moments, ...] = ()  # of each source that is normalised, by its place; () before the first round
    threshold: float | None = None  # PPO-C's
    proxy: tuple[float, ...] = ()  # means of the last rounds, as many as are watched at most
    correct: tuple[float, ...] = ()
    warned: bool = False  # that the one rises while the other falls

    def state_dict(self) -> dict[str, Any]:
        """JSON values; {} where there is nothing to remember."""
        return {} if self == NOTHING else asdict(self)

    @staticmethod
    def loaded(state: dict[str, Any]) -> Memory:
        """What `state_dict` gave."""
        if not state:
            return NOTHING
        return Memory(
            moments=tuple(Moments(**one) for one in state["moments"]),
            threshold=state["threshold"],
            proxy=tuple(state["proxy"]),
            correct=tuple(state["correct"]),
            warned=state["warned"],
        )

    @property
    def over_optimised(self) -> int:
        """Over how many of the last rounds the reward clearly rose and the share of right answers clearly fell; 0: none."""
        for rounds in WATCHED:
            proxy, correct = self.proxy[-rounds:], self.correct[-rounds:]
            if len(proxy) == rounds and slope_t(proxy) > CLEAR and slope_t(correct) < -CLEAR:
                return rounds
        return 0


NOTHING = Memory()
"""Before the first round."""


def slope_t(values: Sequence[float]) -> float:
    """Student's t of the slope of equally spaced values; 0 where all are alike."""
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    slope = float((x * y).sum() / x.square().sum())
    left = float((y - slope * x).square().sum()) / (len(y) - 2)
    if left <= 1e-18 * float(y.square().sum()):
        return math.copysign(math.inf, slope) if slope else 0.0
    return slope / math.sqrt(left / float(x.square().sum()))
