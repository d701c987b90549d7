"""Weight penalties in a DeepSpeed run: where the fp32 masters of each matrix lie, and a step on them before the optimiser.

The masters are whole on every rank (ZeRO-0), contiguous pieces of each matrix (ZeRO-1 and 2) or its ZeRO-3 shards; nothing
is gathered while training. The step hangs on the optimiser that DeepSpeed wraps, which runs only when gradients were
finite and before it copies masters into weights: a skipped step skips the penalty, and the weights follow at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calibtrain.config import RunConfig, WeightPenaltyConfig
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.losses.rotation_probes import Shard, penalty_norm
from calibtrain.losses.rotation_step import DecoupledPenalty, DenseMatrix, Held, LoRAMatrix, share
from calibtrain.spectral.polar import polar_factor
from calibtrain.training.engine import Engine


class WeightPenalties:
    """All penalties of a run. `arm` before the engine's step, `values` after it."""

    def __init__(self, penalties: Mapping[str, DecoupledPenalty], optimizer: torch.optim.Optimizer) -> None:
        self.penalties = penalties
        self._armed: int | None = None
        self._values: dict[str, float] = {}
        optimizer.register_step_pre_hook(self._before_update)

    def arm(self, step: int) -> None:
        """Take the penalties' step number `step` in the coming update."""
        self._armed, self._values = step, {}

    def values(self) -> dict[str, float]:
        """Each penalty's estimate in the last update, the same on every rank; nothing when it was skipped."""
        self._armed = None
        return self._values

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._armed is None:  # ZeRO-3 calls the optimiser once for each of its groups
            return
        if all(one.grad is None for group in optimizer.param_groups for one in group["params"]):
            return  # ZeRO-0 has dropped gradients that were not finite
        step, self._armed = self._armed, None
        rate = float(optimizer.param_groups[0]["lr"])
        self._values = {name: float(one.step(step, rate)) for name, one in self.penalties.items()}


def build_weight_penalties(config: RunConfig, engine: Engine, world: World) -> WeightPenalties | None:
    """Penalties that hold the engine's weights near what they are now: call it before a checkpoint is loaded. Collective."""
    if not config.weight_penalties:
        return None
    layers = _lora_layers(engine.module) if config.model.lora is not None else _linear_layers(engine.module)
    penalties: dict[str, DecoupledPenalty] = {}
    for number, penalty in enumerate(config.weight_penalties):
        chosen = _targets(layers, penalty)
        matrices = [_matrix(name, layer, penalty.name, engine, world, i) for i, (name, layer) in enumerate(chosen)]
        penalties[penalty.name] = DecoupledPenalty(
            penalty.name,
            penalty.weight,
            matrices,
            probes=penalty.probes,
            layer_fraction=penalty.layer_fraction,
            scale=1.0 if penalty.scale == "fixed" else None,
            budget=penalty.budget,
            seed=config.seed + number,
            reduce=_Reduce(world) if world.size > 1 else None,
            rank=world.rank,
            ranks=world.size,
        )
    return WeightPenalties(penalties, engine.deepspeed.basic_optimizer)


class _Reduce:
    def __init__(self, world: World) -> None:
        self.device = world.device

    def __call__(self, flat: Tensor) -> None:
        moved = flat.to(self.device)  # NCCL adds on GPUs only; offloaded masters are on the CPU
        dist.all_reduce(moved)
        if moved is not flat:
            flat.copy_(moved)


def _linear_layers(module: Any) -> list[tuple[str, nn.Module]]:
    head = module.policy.causal_model.get_output_embeddings()
    return [
        (name, layer)
        for name, layer in module.policy.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and layer.weight.requires_grad
    ]


def _lora_layers(module: Any) -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in module.policy.named_modules() if hasattr(layer, "lora_A")]


def _targets(layers: Sequence[tuple[str, nn.Module]], penalty: WeightPenaltyConfig) -> list[tuple[str, nn.Module]]:
    wanted = penalty.target_modules
    chosen = [(name, one) for name, one in layers if wanted == "all-linear" or name.rpartition(".")[2] in wanted]
    known = {name.rpartition(".")[2] for name, _ in chosen}
    missing = [] if wanted == "all-linear" else [name for name in wanted if name not in known]
    if missing or not chosen:
        raise UserError(
            f"weight_penalties.{penalty.name}.target_modules: no trained linear layer is called "
            f"{', '.join(missing or [str(wanted)])}"
        )
    return chosen


def _matrix(name: str, layer: Any, penalty: str, engine: Engine, world: World, number: int) -> DenseMatrix | LoRAMatrix:
    base = getattr(layer, "base_layer", layer).weight
    if base.requires_grad:
        held = held_master(base, engine.stage, world)
        own, start = held.read(), held.start
    else:
        held, (own, start) = None, _frozen_piece(base, world)
    shape = _shape(base)
    whole = _gather(shape, own, start, held is not None and held.replicated, world)
    norm, squared_norm = penalty_norm(penalty, whole), float(whole.square().sum())
    # In the model's dtype, in which the run began: exact, and half the memory of fp32.
    initial, polar = own.to(base.dtype, copy=True), None
    if penalty == "polar_drift":
        factor = polar_factor(whole) if number % world.size == world.rank else torch.empty_like(whole)
        if world.size > 1:
            moved = factor.to(world.device)
            dist.broadcast(moved, number % world.size)
            factor = moved.to(factor.device)
        polar = factor.reshape(-1)[start : start + own.numel()].clone()
    if held is not None:
        return DenseMatrix(name, held, initial, norm, squared_norm, polar)
    adapters = [getattr(layer, key)["default"].weight for key in ("lora_A", "lora_B")]
    a, b = (held_master(one, engine.stage, world) for one in adapters)
    reference = Shard(shape, start, initial if polar is None else polar)
    return LoRAMatrix(name, a, b, reference, layer.scaling["default"], norm, squared_norm)


def _gather(shape: tuple[int, int], own: Tensor, start: int, replicated: bool, world: World) -> Tensor:
    """The whole matrix in fp32, once at the start, one at a time."""
    if replicated or world.size == 1:
        return own.float().view(shape)
    whole = torch.zeros(shape[0] * shape[1], dtype=torch.float32, device=own.device)
    whole[start : start + own.numel()] = own
    _Reduce(world)(whole)
    return whole.view(shape)


def held_master(parameter: nn.Parameter, stage: int, world: World) -> Held:
    """This rank's fp32 elements of a trained matrix under ZeRO `stage`."""
    shape = _shape(parameter)
    if stage == 0:
        return Held.parameter(parameter)
    if stage == 3:
        return _sharded_master(parameter, shape)
    empty = torch.zeros(0, device=world.device)

    def read() -> Tensor:
        # Looked up at each step: DeepSpeed links its fragments anew when it loads a checkpoint.
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return empty if mapping is None else mapping.get_hp_fragment().detach().view(-1)

    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return Held(shape, 0 if mapping is None else int(mapping.lp_fragment_address.start), read)


def _sharded_master(parameter: Any, shape: tuple[int, int]) -> Held:
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    start, size = _zero3_range(parameter)
    padded: list[Tensor] = []

    def read() -> Tensor:
        padded[:] = [safe_get_local_fp32_param(parameter).detach().view(-1)]  # the last shard may end in padding
        return padded[0][:size]

    def write(flat: Tensor) -> None:
        safe_set_local_fp32_param(parameter, padded.pop())  # no copy of the masters, unless they are offloaded

    return Held(shape, start, read, write)


def _zero3_range(parameter: Any) -> tuple[int, int]:
    """(start, size) of this rank's ZeRO-3 shard in the row-major flat parameter, without its padding."""
    each = int(parameter.ds_tensor.ds_numel)
    start = min(parameter.ds_numel, each * dist.get_rank(group=parameter.ds_process_group))
    return start, min(each, parameter.ds_numel - start)


def _frozen_piece(parameter: Any, world: World) -> tuple[Tensor, int]:
    """This rank's part of a frozen matrix: its ZeRO-3 shard, or a share of what every rank holds whole."""
    if hasattr(parameter, "ds_tensor"):
        start, size = _zero3_range(parameter)
        return parameter.ds_tensor.detach().view(-1)[:size], start
    begin, end = share(parameter.numel(), world.rank, world.size)
    return parameter.detach().view(-1)[begin:end], begin


def _shape(parameter: Any) -> tuple[int, int]:
    rows, columns = getattr(parameter, "ds_shape", parameter.shape)
    return int(rows), int(columns)
