"""Where the elements of a run's matrices lie under each ZeRO stage, and what is summed over the ranks that hold them.

fp32 masters are whole on every rank (ZeRO-0), contiguous pieces of each matrix (ZeRO-1 and 2) or its ZeRO-3 shards; nothing
is gathered while training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calibtrain.distributed import World
from calibtrain.losses.rotation_step import Held, share
from calibtrain.models.sharding import part_range
from calibtrain.spectral.polar import polar_factor
from calibtrain.training.engine import Engine


class Reduce:
    """Adds a flat tensor up over the ranks, in place, wherever it lies."""

    def __init__(self, world: World) -> None:
        self.device = world.device

    def __call__(self, flat: Tensor) -> None:
        """Sum `flat`. Collective."""
        moved = flat.to(self.device)  # NCCL adds on GPUs only; offloaded masters are on the CPU
        dist.all_reduce(moved)
        if moved is not flat:
            flat.copy_(moved)


@dataclass(frozen=True, slots=True)
class Beginning:
    """A matrix W0 as it is now: this rank's elements `own`, from `start` on, and all of it, `whole`, in fp32.

    `masters` are what trains it: W itself, or the adapter's A and B.
    """

    shape: tuple[int, int]
    dtype: torch.dtype  # in the model, as the run began
    masters: list[Held]
    own: Tensor
    start: int
    whole: Tensor

    @property
    def device(self) -> torch.device:
        """Where the masters are; a frozen W0 may lie elsewhere when one of them is offloaded."""
        return self.masters[0].read().device

    def polar_piece(self, number: int, world: World) -> Tensor:
        """This rank's elements of polar(W0) in fp32; rank `number` modulo their count computes it for all. Collective."""
        owner = number % world.size
        factor = polar_factor(self.whole) if owner == world.rank else torch.empty_like(self.whole)
        if world.size > 1:
            moved = factor.to(world.device)
            dist.broadcast(moved, owner)
            factor = moved.to(factor.device)
        return factor.reshape(-1)[self.start : self.start + self.own.numel()].clone()


def begin(layer: Any, engine: Engine, world: World) -> Beginning:
    """How the weight of a trained linear layer, or of one with LoRA, stands now. Collective; it gathers the matrix."""
    base = getattr(layer, "base_layer", layer).weight
    shape = _shape(base)
    if base.requires_grad:
        masters = [held_master(base, engine, world)]
        own, start, replicated = masters[0].read(), masters[0].start, masters[0].replicated
    else:
        masters = [held_master(one, engine, world) for one in _adapter(layer)]
        (own, start), replicated = _frozen_piece(base, world), False
    return Beginning(shape, base.dtype, masters, own, start, gather(shape, own, start, replicated, world))


def trained_layers(causal_model: Any) -> list[tuple[str, Any]]:
    """(name, layer) of the layers whose LoRA is trained or, without LoRA, of the trained linear layers but the head."""
    named, head = list(causal_model.named_modules()), causal_model.get_output_embeddings()
    if adapted := [(name, one) for name, one in named if hasattr(one, "lora_A")]:
        linear = [(name, one) for name, one in adapted if isinstance(one.base_layer, nn.Linear)]
        return [(name, one) for name, one in linear if all(part.requires_grad for part in _adapter(one))]
    linear = [(name, one) for name, one in named if isinstance(one, nn.Linear) and one is not head]
    return [(name, one) for name, one in linear if one.weight.requires_grad]


def _adapter(layer: Any) -> list[nn.Parameter]:
    return [getattr(layer, key)["default"].weight for key in ("lora_A", "lora_B")]


def gather(shape: tuple[int, int], own: Tensor, start: int, replicated: bool, world: World) -> Tensor:
    """The whole matrix in fp32, once at the start, one at a time."""
    if replicated or world.size == 1:
        return own.float().view(shape)
    whole = torch.zeros(shape[0] * shape[1], dtype=torch.float32, device=own.device)
    whole[start : start + own.numel()] = own
    Reduce(world)(whole)
    return whole.view(shape)


def held_master(parameter: nn.Parameter, engine: Engine, world: World) -> Held:
    """This rank's fp32 elements of a trained matrix under the engine's ZeRO stage."""
    shape = _shape(parameter)
    if engine.stage == 0:
        return Held.parameter(parameter)
    if engine.stage == 3:
        return _sharded_master(parameter, shape)
    # Where the other matrices' elements lie: in host memory when they are offloaded.
    empty = torch.zeros(0, device=getattr(engine.deepspeed.optimizer, "device", world.device))

    def read() -> Tensor:
        # Looked up at each step: DeepSpeed links its fragments anew when it loads a checkpoint.
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return empty if mapping is None else mapping.get_hp_fragment().detach().view(-1)

    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return Held(shape, 0 if mapping is None else int(mapping.lp_fragment_address.start), read)


def _sharded_master(parameter: Any, shape: tuple[int, int]) -> Held:
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    start, stop = part_range(parameter)
    size = stop - start

    def read() -> Tensor:
        return safe_get_local_fp32_param(parameter).detach().view(-1)[:size]  # the last shard may end in padding

    def write(flat: Tensor) -> None:
        padding = parameter.ds_tensor.ds_numel - size
        safe_set_local_fp32_param(parameter, nn.functional.pad(flat, (0, padding)) if padding else flat)

    return Held(shape, start, read, write)


def _frozen_piece(parameter: Any, world: World) -> tuple[Tensor, int]:
    """This rank's part of a frozen matrix: its ZeRO-3 shard, or a share of what every rank holds whole."""
    if hasattr(parameter, "ds_tensor"):
        start, stop = part_range(parameter)
        return parameter.ds_tensor.detach().view(-1)[: stop - start], start
    begin, end = share(parameter.numel(), world.rank, world.size)
    return parameter.detach().view(-1)[begin:end], begin


def _shape(parameter: Any) -> tuple[int, int]:
    rows, columns = getattr(parameter, "ds_shape", parameter.shape)
    return int(rows), int(columns)
