"""Which hooks a run has."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace

import torch

from calibtrain.config import RunConfig
from calibtrain.hooks.base import Hook
from calibtrain.hooks.calibration import CalibrationHook
from calibtrain.hooks.jsonl import JsonlHook
from calibtrain.hooks.progress import ProgressHook
from calibtrain.hooks.training import TrainingHook
from calibtrain.hooks.wandb import WandbHook, resolve_mode
from calibtrain.losses import build_loss
from calibtrain.losses.terms import Batch


def default_hooks(config: RunConfig, rank: int) -> list[Hook]:
    """Hooks of this rank: the measuring ones on every rank, those that write or print on global rank 0 alone."""
    hooks: list[Hook] = [TrainingHook(term_names(config)), CalibrationHook()]
    if rank == 0:
        hooks += [JsonlHook(), ProgressHook()]
        if config.tracking.wandb and resolve_mode(config.tracking.mode) != "disabled":
            hooks.append(WandbHook(config.tracking, config.name))
    return hooks


def term_names(config: RunConfig) -> list[str]:
    """Names of all loss terms of the run: those that its losses count in a batch without tokens."""
    in_loss = [penalty for penalty in config.penalties if penalty.moves == "all"]
    empty = {field.name: torch.zeros(0, dtype=torch.int64) for field in fields(Batch) if field.default is MISSING}
    batch = replace(Batch(**empty), is_completion=torch.zeros(0, dtype=torch.bool), correct=torch.zeros(0))
    return sorted({name for part in (config.objective, *in_loss) for name in build_loss(part).counts(batch)})
