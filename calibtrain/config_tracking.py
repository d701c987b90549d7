"""Config of where a run's numbers go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from calibtrain.config_base import Amount, Positive, Section


class TrackingConfig(Section):
    """Where the run's numbers go beside metrics.jsonl."""

    wandb: bool = True
    """Log to Weights & Biases."""
    project: str = "calibtrain"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null is your default."""
    group: str | None = None
    """W&B group, to show several runs together."""
    tags: tuple[str, ...] = ()
    """W&B tags."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online with a W&B key, else offline."""
    peak_tflops: Positive | None = None
    """TFLOP/s of one device in `model.dtype`, for `train/mfu`; null: its maker's for common GPUs, and no MFU on others."""
    log_answers: bool = False
    """Also send questions, answers, grades and names of groups to W&B; without it numbers alone leave the machine."""
    spectra_every: Amount = 0
    """Optimiser steps between two readings of how far matrices have gone from where the run began; 0 reads none."""
    spectra_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["first-middle-last", "all-linear"] = (
        "first-middle-last"
    )
    """Which: trained linear layers of three blocks, all of them, or parts of their names: `q_proj`, `layers.0.mlp`."""
