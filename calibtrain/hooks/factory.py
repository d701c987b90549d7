"""Which hooks a run has."""

from __future__ import annotations

from collections.abc import Sequence

from calibtrain.config import RunConfig
from calibtrain.hooks.base import Hook
from calibtrain.hooks.calibration import CalibrationHook
from calibtrain.hooks.jsonl import JsonlHook
from calibtrain.hooks.progress import ProgressHook
from calibtrain.hooks.training import TrainingHook
from calibtrain.hooks.wandb import WandbHook, resolve_mode


def default_hooks(
    config: RunConfig, rank: int, term_names: Sequence[str], measure_names: Sequence[str] = ()
) -> list[Hook]:
    """Hooks of this rank: the measuring ones on every rank, those that write or print on global rank 0 alone.

    `term_names` are those of the run's loss terms, `measure_names` of what its losses tell beside them.
    """
    hooks: list[Hook] = [TrainingHook(term_names, measure_names), CalibrationHook()]
    if rank == 0:
        hooks += [JsonlHook(), ProgressHook()]
        if config.tracking.wandb and resolve_mode(config.tracking.mode) != "disabled":
            hooks.append(WandbHook(config.tracking, config.name))
    return hooks
