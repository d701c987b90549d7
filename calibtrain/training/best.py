"""Which evaluation of a run was best so far, and whether training still gets better."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from calibtrain.calibration.metrics import summary
from calibtrain.calibration.state import state_of
from calibtrain.config_training import BestConfig
from calibtrain.errors import UserError

OF_ANSWERS = "calib/calibration/"
"""How the metrics of answers in training begin."""


@dataclass(frozen=True, slots=True)
class Best:
    """The best value so far and the step behind which it was measured."""

    value: float
    step: int
    behind: int = 0  # evaluations since


def judged(best: Best | None, config: BestConfig, metrics: Mapping[str, float], step: int) -> Best | None:
    """What is best now that `metrics` were measured behind `step`; those that lack the metric change nothing.

    A value that is no number is never best, and the first of equal ones stays.
    """
    if config.metric not in metrics:
        return best
    value = float(metrics[config.metric])
    sign = 1.0 if config.goal == "lowest" else -1.0
    if math.isfinite(value) and (best is None or sign * value < sign * best.value):
        return Best(value, step)
    return best and replace(best, behind=best.behind + 1)


def is_over(best: Best | None, config: BestConfig) -> bool:
    """Whether training has been without a better evaluation for as long as it should wait."""
    return config.patience is not None and best is not None and best.behind >= config.patience


def check_metric(config: BestConfig, losses: Collection[str]) -> None:
    """Raise UserError unless an evaluation measures the metric; `losses` are the names of those on held-out records."""
    empty = state_of(torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([True, False]))
    answers = [f"{OF_ANSWERS}likelihood/{name}" for name in summary(empty)]
    known = sorted(losses) if config.metric.startswith("eval/") else answers
    if config.metric not in known:
        raise UserError(f"training.best.metric: {config.metric} is not measured; there are {', '.join(known)}")
