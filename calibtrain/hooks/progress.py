"""What a person at the console sees: a bar on a terminal, one plain line a log elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from calibtrain.hooks.base import Hook
from calibtrain.hooks.records import CheckpointRecord, EndRecord, EvaluationRecord, LogRecord, RunRecord, StepRecord

TRAINING_KEYS = {"calib/train/token/ece15": "token ECE", "calib/train/answer/ece15": "answer ECE", "train/lr": "lr"}
"""Metric keys worth a place on the line, beside every loss term, and what they are called there."""
EVALUATION_KEYS = {"acc": "accuracy", "mean_conf": "confidence", "ece15": "ECE", "auroc": "AUROC", "loss": "loss"}
"""Last parts of evaluation keys, and what they are called."""


class ProgressHook(Hook):
    """Loss terms, token ECE, learning rate and time left, on rank 0."""

    name = "progress"

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._silent = True
        self._first_step, self._step, self._started = 0, 0, 0.0

    def on_start(self, record: RunRecord) -> None:
        """Begin the bar, or say what begins."""
        self._silent = record.rank != 0
        if self._silent:
            return
        self._first_step, self._step, self._started = record.first_step, record.first_step, time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", style="dim"),
                console=self._console,
            )
            self._bar.start()
            self._bar.add_task("", total=record.total_steps, completed=record.first_step)
        else:
            begin = f"from step {record.first_step} " if record.first_step else ""
            self._say(f"training {begin}to step {record.total_steps} on {record.world_size} rank(s)")

    def on_step(self, record: StepRecord) -> None:
        """Move the bar; a skipped step is said at once."""
        self._step = record.step
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=record.step)
        if record.skipped:
            self._say(f"step {record.step}: skipped, gradients were not finite")

    def on_log(self, record: LogRecord) -> None:
        """The numbers of the interval."""
        losses = {key: key.removeprefix("train/loss/") for key in record.metrics if key.startswith("train/loss/")}
        numbers = _words(record.metrics, losses | TRAINING_KEYS)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=numbers)
        else:
            self._say(f"step {record.step}/{record.total_steps}  {numbers}  eta {self._eta(record)}")

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """One line an evaluation."""
        keys = {
            key: EVALUATION_KEYS[key.rsplit("/", 1)[-1]]
            for key in record.metrics
            if key.rsplit("/", 1)[-1] in EVALUATION_KEYS
        }
        asked = " questions" if record.split != "validation" else ""
        self._say(f"step {record.step}: {record.split}{asked}  {_words(record.metrics, keys)}")

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        """Where the checkpoint is."""
        self._say(f"step {record.step}: checkpoint {record.path}")

    def on_end(self, record: EndRecord) -> None:
        """Close the bar; on failure say the cause."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        spent = timedelta(seconds=round(time.monotonic() - self._started))
        self._say(
            f"training failed at step {record.step}: {record.error}" if record.error else f"training done in {spent}"
        )

    def _eta(self, record: LogRecord) -> str:
        done = record.step - self._first_step
        if done <= 0:
            return "unknown"
        left = (time.monotonic() - self._started) / done * (record.total_steps - record.step)
        return str(timedelta(seconds=round(left)))

    def _say(self, line: str) -> None:
        if not self._silent:
            self._console.print(line, markup=False)  # an answer or a path may hold square brackets


def _words(metrics: Mapping[str, float], keys: Mapping[str, str]) -> str:
    return "  ".join(f"{name} {metrics[key]:.4g}" for key, name in keys.items() if key in metrics)
