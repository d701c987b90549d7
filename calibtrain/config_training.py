"""Which of a run's weights are exported, where it is not the last ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from calibtrain.config_base import Count, Section

if TYPE_CHECKING:
    from calibtrain.config import RunConfig


class BestConfig(Section):
    """Export the weights that an evaluation in training found best; they are kept as a checkpoint until then.

    What chooses is not what certifies: evaluations in training ask the calibration split, or measure the validation split.
    """

    metric: str = "eval/loss"
    """What an evaluation logs: `eval/loss`, `eval/loss/TERM`, or of the answers `calib/calibration/likelihood/brier` and its
    like."""
    goal: Literal["lowest", "highest"] = "lowest"
    """Which value of it is best."""
    patience: Count | None = None
    """Evaluations behind the best one after which training ends; null goes on to the last step."""


MEASURED = {
    "eval/": ("evaluate_loss_every", "loss on held-out records"),
    "calib/calibration/": ("evaluate_every", "answers to questions"),
}
"""How a metric's name begins, with what has it measured."""


HIGHER = ("acc", "auroc", "brier_skill", "res", "cov@0.05", "cov@0.1", "cov@0.2")
"""Metrics of answers of which more is better: by the lowest the worst weights would be exported."""


def unfit_best(config: RunConfig) -> str | None:
    """What keeps `training.best` from being found."""
    training = config.training
    if training.best is None:
        return None
    metric, found = (
        training.best.metric,
        [one for start, one in MEASURED.items() if training.best.metric.startswith(start)],
    )
    if not found:
        starts = " or ".join(f"{start}..." for start in MEASURED)
        return f"training.best.metric: {metric} is no metric of an evaluation in training: take one of {starts}"
    if training.best.goal == "lowest" and metric.rpartition("/")[2] in HIGHER:
        return f"training.best.goal: of {metric} the highest is best, and lowest is asked for: set goal: highest"
    key, told = found[0]
    if getattr(training, key) is None:
        return f"training.best.metric: {metric} is measured by {told}: set training.{key}"
    if training.average_last:
        return "training.best and training.average_last each say which weights are exported: set one of them"
    return None
