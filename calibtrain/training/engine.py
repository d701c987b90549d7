"""The DeepSpeed engine around a LossModel: optimiser groups, learning rates, and what its stages report differently."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from calibtrain.config import RunConfig, TrainingConfig
from calibtrain.distributed import World
from calibtrain.models.arithmetic import settled
from calibtrain.models.loss_model import LossModel
from calibtrain.models.sharding import full_shape
from calibtrain.training.deepspeed_config import deepspeed_dict
from calibtrain.training.eight_bit import eight_bit_adamw, in_eight_bits, is_eight_bit
from calibtrain.training.gradient_passes import leave_out_passes, squared_norm


def optimizer_groups(model: LossModel, config: RunConfig) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices, with weight decay, and vectors (norms, biases), without.

    A value model of its own and a confidence head may have their own rates: `rate_scale` times the others'. A head's weights
    do not decay. `bits`: what the moments take.
    """
    rate, decay = config.training.learning_rate, config.training.weight_decay
    head = set() if model.confidence_head is None else set(model.confidence_head.parameters())
    short = in_eight_bits(model) if is_eight_bit(config.training) else set()
    parts: dict[tuple[float, float, bool, int], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = _own_rate(name, parameter in head, config)
            matrix = len(full_shape(parameter)) >= 2
            shrinks = matrix and parameter not in head
            bits, scale = 8 if parameter in short else 32, 1.0 if own is None else own / rate
            parts.setdefault((scale, decay * shrinks, matrix, bits), []).append(parameter)
    return [
        {"params": part, "weight_decay": shrinking, "rate_scale": scale, "lr": rate * scale, "bits": bits}
        for (scale, shrinking, _, bits), part in parts.items()
    ]


def _own_rate(name: str, of_head: bool, config: RunConfig) -> float | None:
    if of_head and config.confidence_head is not None:
        return config.confidence_head.learning_rate
    return getattr(config.objective, "value_learning_rate", None) if name.startswith("value.") else None


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
    stage: int
    full_gradients: bool  # fp32 below ZeRO-1: gradients are whole on every rank and nothing else checks them

    @property
    def module(self) -> LossModel:
        """The LossModel; calling it runs DeepSpeed's module hooks."""
        return self.deepspeed.module

    def set_learning_rate(self, step: int, total_steps: int, training: TrainingConfig) -> float:
        """Set and return the policy's rate of the coming step, a pure function of the step."""
        rate = training.learning_rate * schedule_factor(step, total_steps, training)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_scale", 1.0)
        return rate

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Run backward on one micro-batch. The loss is globally normalised and scaled by the number of ranks."""
        # Times one, because DeepSpeed divides by the accumulation steps all the same when it is handed the very tensor
        # that forward returned and no optimiser of its own scales it first (ZeRO-0).
        self.deepspeed.backward(loss * 1.0, scale_wrt_gas=False)
        if not last:
            self.deepspeed.step()  # not at the boundary: only counts the micro-batch

    def step(self) -> tuple[bool, float | None]:
        """Update the weights unless a gradient is not finite. Returns (skipped, gradient norm), the same on all ranks."""
        norm: float | None = None
        if self.full_gradients:
            norm = _clip_or_drop_gradients(self.module, self.deepspeed.gradient_clipping())
        self.deepspeed.step()
        if norm is None:
            found = self.deepspeed.get_global_grad_norm()
            norm = None if found is None else float(found)
        skipped = bool(getattr(self.deepspeed.optimizer, "overflow", False)) or (
            norm is not None and not math.isfinite(norm)
        )
        return skipped, None if skipped else norm


def _clip_or_drop_gradients(module: torch.nn.Module, max_norm: float) -> float:
    """Clip whole gradients in place, or drop them where one is not finite. Returns their norm before."""
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    total = squared_norm([one.grad for one in parameters if one.grad is not None]).sqrt().float()
    norm = float(total)
    if not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None  # AdamW leaves such parameters as they are
    elif max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return norm


def _optimizer(groups: list[dict[str, Any]], training: TrainingConfig, world: World) -> torch.optim.Optimizer:
    if is_eight_bit(training):
        return eight_bit_adamw(groups, training, world.size if training.zero_stage else 1)
    return torch.optim.AdamW(groups, betas=training.adam_betas, eps=training.adam_epsilon, fused=True)


def start_engine(model: LossModel, config: RunConfig, world: World) -> Engine:
    """Wrap `model` with deepspeed.initialize. Collective."""
    import deepspeed

    config, training = settled(config), config.training
    optimizer = _optimizer(optimizer_groups(model, config), training, world)
    hidden_size = getattr(model.policy.causal_model.config, "hidden_size", None)
    settings = deepspeed_dict(config, world.size, hidden_size=hidden_size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    stage = int(engine.zero_optimization_stage())
    full_gradients = stage == 0 and config.model.dtype == "fp32"
    if full_gradients:
        engine.clip_fp32_gradients = lambda: None  # done in Engine.step: DeepSpeed's fails where none is left
    if stage in (1, 2):
        leave_out_passes(engine.optimizer, world.size)
    if stage == 3:
        reader = model.policy.reader
        for parameter in reader.parameters_read():
            deepspeed.zero.register_external_parameter(reader, parameter)
        model.release = engine.empty_partition_cache
    return Engine(engine, stage, full_gradients)
