"""CalibrationCallback for Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as lightning

from calibtrain.config import EvaluationConfig
from calibtrain.errors import UserError
from calibtrain.hooks.callback import AnswerMeter, CalibrationMeter
from calibtrain.losses.terms import Batch
from calibtrain.ops import TokenStats
from calibtrain.records import Record


class CalibrationCallback(lightning.Callback):
    """Writes `calib/*` and `train/token/*` to every logger, and the answers' calibration at each validation.

    The module's `training_step` gives its statistics with `update(stats, batch)`. Once every `log_every_n_steps`, merged
    over ranks, at the steps of Lightning's own metrics. The answers' metrics are logged as the module's, so that
    ModelCheckpoint and EarlyStopping may monitor them.

    Args:
        questions: graded questions that `pl_module.model` answers after each validation; see `AnswerMeter`.
        tokenizer: of that model; needed with questions.
        template, split, settings: see `AnswerMeter`.
    """

    def __init__(
        self,
        questions: Sequence[Mapping[str, Any] | Record] = (),
        *,
        tokenizer: Any = None,
        template: Literal["plain", "chat"] = "plain",
        split: str = "calibration",
        settings: EvaluationConfig | None = None,
    ) -> None:
        if questions and tokenizer is None:
            raise UserError("CalibrationCallback: to ask questions it needs the model's tokenizer")
        self._meter = CalibrationMeter()
        self._answers = AnswerMeter(questions, template=template, split=split, settings=settings) if questions else None
        self._tokenizer = tokenizer
        self._logged = 0

    def update(self, stats: TokenStats, batch: Batch) -> None:
        """Take the statistics of a training micro-batch."""
        self._meter.update(stats, batch)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """A resumed run goes on from its step."""
        self._logged = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log when a log interval ends. Collective."""
        step = trainer.global_step
        if step == self._logged or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return  # also between the micro-batches of one step
        self._logged = step
        metrics = self._meter.compute(step)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step - 1)  # Lightning counts from 0

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Ask the questions. Collective."""
        if self._answers is not None and not trainer.sanity_checking:
            metrics = self._answers(pl_module.model, self._tokenizer)
            pl_module.log_dict(metrics, sync_dist=True)  # equal on all ranks, but Lightning cannot know
