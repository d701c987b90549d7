"""What a step costs and where its time goes, told without waiting for the device; a profiler's trace on request."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibtrain.hooks.records import StepCost
from calibtrain.losses.terms import Batch
from calibtrain.models.cost import Work

logger = logging.getLogger(__name__)
SETTLED = 2
"""Steps of a launch before the first that is traced: they allocate, compile and warm up."""


@dataclass
class Meter:
    """Of the step that runs: tokens and operations of this rank, and seconds that it made batches and waited for others."""

    device: torch.device
    work: Work | None = None
    peak: float | None = None  # FLOP/s of the device
    tokens: int = 0
    flops: float = 0.0
    data_seconds: float = 0.0
    waiting_seconds: float | None = None

    def begin(self) -> None:
        """A new step."""
        self.tokens, self.flops, self.data_seconds, self.waiting_seconds = 0, 0.0, 0.0, None
        self._started = time.perf_counter()

    def see(self, batch: Batch) -> None:
        """Count a micro-batch, before it goes to the device."""
        held = batch.segment_ids > 0
        tokens = int(held.sum())
        self.tokens += tokens
        if self.work is not None:
            attended = float(((batch.position_ids + 1) * held).sum())  # each token sees those before it, and itself
            self.flops += self.work.step(tokens, batch.targets.numel(), attended)

    def batches_made(self) -> None:
        """All batches of the step are there; what follows is the first collective."""
        now = time.perf_counter()
        self.data_seconds, self._started = now - self._started, now

    def others_came(self) -> None:
        """Behind that collective. On a GPU it has only been queued, and nobody knows yet."""
        if self.device.type == "cpu":
            self.waiting_seconds = time.perf_counter() - self._started

    def cost(self) -> StepCost:
        """Of this step."""
        held = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return StepCost(self.flops, self.data_seconds, self.waiting_seconds, held, self.peak)


class Trace:
    """torch's profiler over `steps` steps of a launch, from the third on: one Chrome trace a rank in `folder`."""

    def __init__(self, steps: int | None, folder: Path, rank: int) -> None:
        self.steps, self.path = steps, folder / f"rank{rank}.json.gz"
        self._seen = 0
        self._profiler: Any = None

    def before_step(self) -> None:
        """Begin, where this step is the first to be traced."""
        if self.steps and self._seen == SETTLED:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        self._seen += 1

    def after_step(self) -> None:
        """Write the trace behind the last step that belongs to it."""
        if self._seen == SETTLED + (self.steps or 0):
            self.close()

    def close(self) -> None:
        """Write what has been traced, and tell where: a run that ends or is preempted in between keeps it.

        Where there is no room for it, that is told, and the run goes on.
        """
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:  # it must not stand in the place of what ends the run
            logger.warning("the profile cannot be written to %s: %s", self.path, error)
            return
        logger.info("profile: %s", self.path)
