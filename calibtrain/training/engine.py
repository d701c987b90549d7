"""The DeepSpeed engine around a LossModel: optimiser groups, learning rates, and what its stages report differently."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from calibtrain.config import RunConfig, TrainingConfig
from calibtrain.models.loss_model import LossModel
from calibtrain.training.deepspeed_config import deepspeed_dict
from calibtrain.training.distributed import World


@dataclass(frozen=True, slots=True)
class GroupSchedule:
    """Peak learning rate of an optimiser group, and whether the task's warmup and decay apply to it."""

    name: str
    learning_rate: float
    scheduled: bool


def optimizer_groups(model: LossModel, config: RunConfig) -> tuple[list[dict[str, Any]], list[GroupSchedule]]:
    """Parameter groups for AdamW: matrices (with weight decay), vectors (without) and the calibrated logit scale."""
    scale = model.policy.log_scale
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter is not scale]
    training = config.training
    groups = [
        ("matrices", [p for p in trained if p.ndim >= 2], training.weight_decay, training.learning_rate, True),
        ("vectors", [p for p in trained if p.ndim < 2], 0.0, training.learning_rate, True),
    ]
    if scale is not None:
        rate = next(penalty.learning_rate for penalty in config.penalties if penalty.moves == "scale")
        groups.append(("logit_scale", [scale], 0.0, rate, False))
    groups = [group for group in groups if group[1]]
    parameters = [{"params": params, "weight_decay": decay, "lr": rate} for _, params, decay, rate, _ in groups]
    return parameters, [GroupSchedule(name, rate, scheduled) for name, _, _, rate, scheduled in groups]


def schedule_factor(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Multiplier of the peak learning rate for the step after `step` finished ones: linear warmup, then the decay."""
    warmup = round(training.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if training.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 1.0 - progress if training.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass
class Engine:
    """DeepSpeed's engine with the few things of it that the loop uses; `module` is the wrapped LossModel."""

    deepspeed: Any
    schedules: list[GroupSchedule]
    stage: int
    full_gradients: bool  # fp32 below ZeRO-1: gradients are whole on every rank and nothing else checks them

    @property
    def module(self) -> LossModel:
        """The LossModel; calling it runs DeepSpeed's module hooks."""
        return self.deepspeed.module

    def set_learning_rates(self, step: int, total_steps: int, training: TrainingConfig) -> float:
        """Set every group's rate for the coming step, a pure function of the step, and return the task's."""
        factor = schedule_factor(step, total_steps, training)
        for group, schedule in zip(self.deepspeed.optimizer.param_groups, self.schedules, strict=True):
            group["lr"] = schedule.learning_rate * (factor if schedule.scheduled else 1.0)
        return training.learning_rate * factor

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Run backward on one micro-batch. The loss is globally normalised and scaled by the number of ranks."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if not last:
            self.deepspeed.step()  # not at the boundary: only counts the micro-batch

    def step(self) -> tuple[bool, float | None]:
        """Update the weights unless a gradient is not finite. Returns (skipped, gradient norm), the same on all ranks."""
        norm: float | None = None
        if self.full_gradients:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
            if not math.isfinite(norm):
                for parameter in self.module.parameters():
                    parameter.grad = None  # AdamW leaves such parameters as they are
        self.deepspeed.step()
        if norm is None:
            found = self.deepspeed.get_global_grad_norm()
            norm = None if found is None else float(found)
        skipped = bool(getattr(self.deepspeed.optimizer, "overflow", False)) or (
            norm is not None and not math.isfinite(norm)
        )
        return skipped, None if skipped else norm


def start_engine(model: LossModel, config: RunConfig, world: World) -> Engine:
    """Wrap `model` with deepspeed.initialize. Collective."""
    import deepspeed

    groups, schedules = optimizer_groups(model, config)
    training = config.training
    optimizer = torch.optim.AdamW(groups, betas=training.adam_betas, eps=training.adam_epsilon, fused=True)
    hidden_size = getattr(model.policy.causal_model.config, "hidden_size", None)
    settings = deepspeed_dict(config, world.size, hidden_size=hidden_size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    stage = int(engine.zero_optimization_stage())
    return Engine(engine, schedules, stage, full_gradients=stage == 0 and config.model.dtype == "fp32")
