"""CalibrationCallback for the Hugging Face Trainer and what is built on it, TRL's trainers among them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from calibtrain.config import EvaluationConfig
from calibtrain.errors import UserError
from calibtrain.hooks.callback import AnswerMeter, CalibrationMeter, stats_from_logits
from calibtrain.losses.label_batch import batch_from_labels
from calibtrain.losses.terms import Batch
from calibtrain.ops import TokenStats
from calibtrain.records import Record

logger = logging.getLogger(__name__)


class CalibrationCallback(TrainerCallback):
    """Adds `calib/*` and `train/token/*` to every row of training metrics, and the answers' calibration to evaluations.

    `CalibrationCallback().attach(trainer)` before `trainer.train()`. The numbers join the row that the Trainer logs, so
    every `report_to` and `trainer.state.log_history` has them, once a log interval and merged over ranks.

    A plain Trainer's statistics are read from the logits that its model returns. A `compute_loss` of your own that has
    TokenStats gives them with `update(stats, batch)`, which costs nothing; TRL's trainers, whose models return no logits,
    need it.

    Args:
        questions: graded questions that the model answers at each evaluation; see `AnswerMeter`. Their metrics may be
            named by `metric_for_best_model`.
        template, split, settings: see `AnswerMeter`.
        tokenizer: where the Trainer has no `processing_class`.
    """

    def __init__(
        self,
        questions: Sequence[Mapping[str, Any] | Record] = (),
        *,
        template: Literal["plain", "chat"] = "plain",
        split: str = "calibration",
        settings: EvaluationConfig | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._meter = CalibrationMeter()
        self._answers = AnswerMeter(questions, template=template, split=split, settings=settings) if questions else None
        self._tokenizer = tokenizer
        self._answered: tuple[int, dict[str, float]] = (-1, {})
        self._attached = self._warned = self._unread = False
        self._handle: Any = None

    def attach(self, trainer: Trainer) -> CalibrationCallback:
        """Join the trainer, before the callbacks that write its metrics. Returns itself."""
        trainer.callback_handler.callbacks.insert(0, self)
        self._attached = True
        return self

    def update(self, stats: TokenStats, batch: Batch) -> None:
        """Take the statistics of a training micro-batch."""
        self._meter.update(stats, batch)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Listen to the model's forward pass."""
        if not self._attached:
            raise UserError(
                "CalibrationCallback: a callback given to Trainer(callbacks=...) comes after those that write its metrics; "
                "call CalibrationCallback().attach(trainer) instead"
            )
        self._handle = model.register_forward_hook(self._read, with_kwargs=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the row of metrics that is about to be written. Collective, as the Trainer logs on every rank."""
        if logs is None:
            return
        found: dict[str, float] = {}
        if "loss" in logs:  # a training row; evaluations have eval_loss, the last row train_loss
            if not self._meter.micro_batches and not self._warned:
                self._warned = True
                logger.warning(
                    "CalibrationCallback: no logits with labels came by; call update(stats, batch) in compute_loss"
                )
            found = self._meter.compute(state.global_step)
        elif self._answers is not None and any(key.startswith("eval_") for key in logs):
            found = self._answer(state.global_step, kwargs["model"], kwargs.get("processing_class"))
        logs.update(found)
        state.log_history[-1].update(found)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Let metric_for_best_model find the answers' metrics; the Trainer puts eval_ before its name."""
        if metrics is not None and self._answered[0] == state.global_step:
            metrics.update({f"eval_{key}": value for key, value in self._answered[1].items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _answer(self, step: int, model: Any, processing_class: Any) -> dict[str, float]:
        """Metrics of the answers at this step: once, however many data sets are evaluated."""
        assert self._answers is not None
        if self._answered[0] == step:
            return {}
        tokenizer = self._tokenizer or processing_class
        if tokenizer is None:
            raise UserError("CalibrationCallback: to ask questions it needs Trainer(processing_class=tokenizer)")
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._answered = (step, self._answers(inner, getattr(tokenizer, "tokenizer", tokenizer)))
        return self._answered[1]

    def _read(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """After a training forward pass with labels and logits: take their statistics."""
        ids, labels, logits = kwargs.get("input_ids"), kwargs.get("labels"), getattr(output, "logits", None)
        if not module.training or ids is None or labels is None or logits is None or logits.shape[:2] != labels.shape:
            return
        try:
            batch = batch_from_labels(ids, labels, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        except UserError as error:  # it only looks on: the training goes on without it
            if not self._unread:
                logger.warning("CalibrationCallback cannot read this batch: %s", error)
            self._unread = True
            return
        self._meter.update(stats_from_logits(logits, batch), batch)
