"""Calibration of any training loop: what the callbacks for Hugging Face and Lightning share, and your own loop may use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from calibtrain.confidence.answering import Answerer, answer_metrics
from calibtrain.config import EvaluationConfig
from calibtrain.data.layout import find_layout
from calibtrain.data.rows import record_from_row
from calibtrain.data.templates import Template
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.hooks.base import HookList
from calibtrain.hooks.calibration import CalibrationHook
from calibtrain.hooks.records import MicroBatchRecord
from calibtrain.losses.terms import Batch
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.ops import TokenStats
from calibtrain.ops.reference import token_stats_of_logits
from calibtrain.records import Record

LOGITS_AT_ONCE = 2**24  # elements in float32, where the statistics come from a model's own logits


class CalibrationMeter:
    """Calibration of the micro-batches since the last `compute`: the keys and numbers of `CalibrationHook`."""

    def __init__(self) -> None:
        self._hooks = HookList([CalibrationHook()])
        self.micro_batches = 0

    @torch.no_grad()
    def update(self, stats: TokenStats, batch: Batch) -> None:
        """Take one micro-batch's statistics, detached; does not wait for the device."""
        self.micro_batches += 1
        self._hooks.dispatch("on_micro_batch", MicroBatchRecord.of(stats, batch, {}))

    def compute(self, step: int) -> dict[str, float]:
        """Metrics of all ranks' micro-batches, the same on every rank; the next interval starts. One all-reduce."""
        self.micro_batches = 0
        return self._hooks.reduce_and_log(step, step)


class AnswerMeter:
    """Calibration of the model's own answers to graded questions, under `calib/<split>/likelihood/*`.

    Args:
        questions: rows with `question` and `answers` (accepted ones), as in a data file, or Records.
        template: "plain" is "Question: ...", "Answer:"; "chat" is the tokenizer's chat template.
        chat_template_kwargs: given to the chat template, e.g. {"enable_thinking": False}.
        split: name in the keys.
        settings: how answers are generated and graded.

    Raises UserError for a row that is no graded question.
    """

    def __init__(
        self,
        questions: Sequence[Mapping[str, Any] | Record],
        *,
        template: Literal["plain", "chat"] = "plain",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        split: str = "calibration",
        settings: EvaluationConfig | None = None,
    ) -> None:
        self.records = [
            one if isinstance(one, Record) else _record(one, f"questions[{index}]")
            for index, one in enumerate(questions)
        ]
        for index, record in enumerate(self.records):
            if not record.accepted:
                raise UserError(f"questions[{index}]: `answers` is missing, so that no answer could be graded")
        self.template = template
        self.chat_template_kwargs = chat_template_kwargs
        self.prefix = f"calib/{split}/likelihood"
        self.settings = settings or EvaluationConfig()

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Let the model answer, each rank its share. Collective; the same metrics on every rank.

        `model` is the Hugging Face model itself. Raises UserError where its parameters are sharded (ZeRO-3, FSDP).
        """
        sharded = next((name for name, p in model.named_parameters() if hasattr(p, "ds_id") or _is_dtensor(p)), None)
        if sharded is not None:
            raise UserError(
                f"the model cannot answer questions while its parameters are sharded ({sharded}); leave `questions` out, "
                "or train with ZeRO-2 or DDP"
            )
        module = LossModel(Policy(model))
        module.train(model.training)
        template = Template(self.template, tokenizer, self.chat_template_kwargs)
        answered = Answerer(module, template, self.settings, _world(model))(self.records)
        return {f"{self.prefix}/{key}": value for key, value in answer_metrics(answered.answers).items()}


@torch.no_grad()
def stats_from_logits(logits: Tensor, batch: Batch) -> TokenStats:
    """Statistics of the batch's targets from the logits (R, T, V) that a model has made anyway. (N,) float32, no gradient.

    Raises UserError when the logits are not those of all positions.
    """
    if logits.shape[:2] != batch.input_ids.shape:
        raise UserError(f"logits {tuple(logits.shape)} do not belong to input_ids {tuple(batch.input_ids.shape)}")
    rows, size = logits.flatten(0, 1), max(1, LOGITS_AT_ONCE // logits.shape[-1])
    parts = [
        token_stats_of_logits(rows[positions].float(), targets)
        for positions, targets in zip(batch.target_positions.split(size), batch.targets.split(size), strict=True)
    ]
    return TokenStats(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _is_dtensor(parameter: Tensor) -> bool:
    return hasattr(parameter, "device_mesh")


def _world(model: Any) -> World:
    device = next(model.parameters()).device
    if not (dist.is_available() and dist.is_initialized()):
        return World(0, 1, 0, device)
    return World(dist.get_rank(), dist.get_world_size(), device.index or 0, device)


def _record(row: Mapping[str, Any], place: str) -> Record:
    return record_from_row(row, find_layout(list(row), {}, place), place)
