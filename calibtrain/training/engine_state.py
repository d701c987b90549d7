"""The engine's state by parameter: float32 weights and the optimiser's moments, wherever a ZeRO stage has put them.

Each stage keeps them in tensors of its own making (`Holder`). Cut by parameter they are the same for all stages and any
number of ranks, and go from one to another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.losses.rotation_step import share
from calibtrain.models.sharding import part_range
from calibtrain.training.engine import Engine
from calibtrain.training.shards import Piece, Shards, Whole

WEIGHT = "weight"
COUNT = "step"
"""The optimiser's count of updates: one number, also where a parameter has one element."""
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""Of DeepSpeed's engine, which its monitor and profiler read."""


@dataclass(frozen=True, slots=True)
class Part:
    """`size` elements of a parameter, from `start` on, that lie at `offset` of a holder."""

    name: str
    shape: tuple[int, ...]
    start: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Holder:
    """A float32 tensor that `optimizer` moves, and the parts of parameters it consists of."""

    master: Tensor
    optimizer: Any
    parts: list[Part]
    replicated: bool = False

    @property
    def flat(self) -> Tensor:
        """Its elements, (n,), to be read and written."""
        return self.master.detach().view(-1)

    @property
    def state(self) -> dict[str, Any]:
        """What the optimiser keeps of it."""
        return self.optimizer.state[self.master]  # type: ignore[no-any-return]

    @property
    def key(self) -> str:
        """Tells one layout from another."""
        return " ".join(f"{one.name}[{one.start}:{one.start + one.size}]@{one.offset}" for one in self.parts)


def holders(engine: Engine) -> list[Holder]:
    """Everything that this rank's optimiser moves."""
    optimizer, names = engine.deepspeed.optimizer, {one: name for name, one in engine.module.named_parameters()}
    if engine.stage == 3:
        return list(_sharded(optimizer, names))
    if engine.stage:
        return list(_partitioned(optimizer, names))
    return list(_replicated(optimizer, names))


def _replicated(optimizer: Any, names: dict[Any, str]) -> Iterator[Holder]:
    """ZeRO-0: each parameter for itself; in bf16 its float32 copy."""
    base = getattr(optimizer, "optimizer", optimizer)
    copies = getattr(optimizer, "fp32_groups", None)
    groups = [group["params"] for group in base.param_groups] if copies is None else optimizer.fp16_groups
    for group, masters in zip(groups, copies or groups, strict=True):
        for parameter, master in zip(group, masters, strict=True):
            part = Part(names[parameter], tuple(parameter.shape), 0, 0, parameter.numel())
            yield Holder(master, base, [part], replicated=True)


def _partitioned(optimizer: Any, names: dict[Any, str]) -> Iterator[Holder]:
    """ZeRO-1 and 2: a piece of each group's flattened parameters."""
    bf16 = hasattr(optimizer, "fp32_groups_flat_partition")  # DeepSpeed's own for ZeRO-1 with gradients in float32
    masters = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    for master, group in zip(masters, optimizer.bf16_groups if bf16 else optimizer.bit16_groups, strict=True):
        parts = []
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                parts.append(Part(names[parameter], tuple(parameter.shape), there.start, here.start, here.numel))
        yield Holder(master, optimizer.optimizer, parts)


def _sharded(optimizer: Any, names: dict[Any, str]) -> Iterator[Holder]:
    """ZeRO-3: a piece of each parameter, many of them in one flat tensor."""
    for number, (master, group) in enumerate(
        zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    ):
        parts, offset = [], 0
        for parameter in group:
            start, stop = part_range(parameter)
            if stop > start:
                parts.append(Part(names[parameter], tuple(parameter.ds_shape), start, offset, stop - start))
            offset += parameter.ds_tensor.ds_numel
        # Of optimiser states that are offloaded in part, those that stay have an optimiser of their own.
        stays = optimizer.offload_optimizer and optimizer.subgroup_to_device[number] != "cpu"
        yield Holder(master, optimizer.backup_optimizer if stays else optimizer.optimizer, parts)


def state_of(engine: Engine, world: World) -> tuple[list[Piece], list[Whole], dict[str, Any]]:
    """What this rank writes: (pieces, what cannot be cut, facts of the run). Views of the engine's own tensors. Local."""
    pieces: list[Piece] = []
    wholes: list[Whole] = []
    for number, holder in enumerate(holders(engine)):
        tensors, scalars, rest = _split(holder)
        pieces += _pieces(holder, tensors, scalars, world)
        mine = not holder.replicated or number % world.size == world.rank
        if rest is not None and mine:
            wholes.append(Whole(holder.key, tuple(part.name for part in holder.parts), *rest))
    facts = {
        "stage": engine.stage,
        "optimizer": _optimizer_of(engine),
        "counters": {name: int(getattr(engine.deepspeed, name)) for name in COUNTERS},
    }
    return pieces, wholes, facts


def _optimizer_of(engine: Engine) -> str:
    return type(engine.deepspeed.basic_optimizer).__name__


def _split(
    holder: Holder,
) -> tuple[dict[str, Tensor], dict[str, float], tuple[dict[str, Tensor], dict[str, float]] | None]:
    """(flat tensors of an element for each of the holder's, numbers, what is neither) of a holder and its optimiser."""
    tensors, scalars, rest = {WEIGHT: holder.flat}, {}, {}
    for key, value in holder.state.items():
        if not isinstance(value, Tensor):
            scalars[key] = value
        elif key == COUNT:
            scalars[key] = float(value)
        elif value.shape == holder.master.shape and value.is_floating_point():
            tensors[key] = value.detach().view(-1)
        else:
            rest[key] = value
    if not rest:
        return tensors, scalars, None
    # Blocks that share a scale (8-bit moments): a cut through one of them would not be what it was.
    rest |= {key: one for key, one in tensors.items() if key != WEIGHT}
    return {WEIGHT: holder.flat}, {}, (rest, scalars)


def _pieces(holder: Holder, tensors: dict[str, Tensor], scalars: dict[str, float], world: World) -> Iterator[Piece]:
    for part in holder.parts:
        first, last = (0, part.size)
        if holder.replicated:  # each rank writes its share of what all have
            first, last = share(part.size, world.rank, world.size)
        if last > first:
            own = {key: flat[part.offset + first : part.offset + last] for key, flat in tensors.items()}
            yield Piece(part.name, part.shape, part.start + first, own, scalars)


def take_up(engine: Engine, shards: Shards) -> None:
    """Put this rank's part of a checkpoint into the float32 weights and the optimiser. Local; `follow` comes next.

    Raises UserError where the checkpoint is not one of this model and optimiser, or cannot be cut anew.
    """
    written_by = shards.facts.get("optimizer")
    if written_by != _optimizer_of(engine):
        raise UserError(
            f"{shards.directory} was written by the optimiser {written_by}, and this run has {_optimizer_of(engine)}, which "
            "cannot go on with its moments; begin anew from the exported weights with model.source"
        )
    for holder in holders(engine):
        _check_parts(holder.parts, shards)
        for part in holder.parts:
            shards.read(part.name, WEIGHT, part.start, _cut(holder.flat, part))
        _take_up_state(holder, shards)
    for name, value in shards.facts["counters"].items():
        setattr(engine.deepspeed, name, value)


def _check_parts(parts: Iterable[Part], shards: Shards) -> None:
    for part in parts:
        there = shards.shapes.get(part.name)
        if there != part.shape:
            raise UserError(
                f"{shards.directory} holds {part.name} "
                + (f"of shape {list(there)}, and it is {list(part.shape)} here" if there else "not at all")
                + ": it is of another model"
            )


def _take_up_state(holder: Holder, shards: Shards) -> None:
    if (found := shards.whole(holder.key)) is not None:
        tensors, scalars = found
        holder.state.update({key: one.to(holder.master.device) for key, one in tensors.items()})
        holder.state.update(scalars)
        return
    scalars = {key: value for part in holder.parts for key, value in shards.scalars[part.name].items()}
    if any(part.name in shards.uncut for part in holder.parts):
        raise UserError(
            f"{shards.directory} holds moments of {shards.facts['optimizer']} that cannot be cut anew for other ranks: "
            f"go on with as many processes as wrote it, and at training.zero_stage: {shards.facts['stage']}"
        )
    for key in sorted({key for part in holder.parts for key in shards.keys[part.name]} - {WEIGHT}):
        if key not in holder.state:
            holder.state[key] = torch.zeros_like(holder.master, requires_grad=False)
        for part in holder.parts:
            own = _cut(holder.state[key].detach().view(-1), part)
            if key in shards.keys[part.name]:
                shards.read(part.name, key, part.start, own)
            else:  # it had no gradient yet
                own.zero_()
    for key, value in scalars.items():
        holder.state[key] = _number(value, holder)


def _number(value: float, holder: Holder) -> Any:
    """A count as torch's optimisers keep it, and as it was where it is no tensor."""
    if not isinstance(value, float):
        return value
    settings = holder.optimizer.defaults
    beside = settings.get("fused") or settings.get("capturable")
    return torch.tensor(value, dtype=torch.float32, device=holder.master.device if beside else "cpu")


def _cut(flat: Tensor, part: Part) -> Tensor:
    return flat[part.offset : part.offset + part.size]


def follow(engine: Engine) -> None:
    """Make the model's weights those of the float32 ones. Collective."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 0:
        for parameters, masters in zip(
            getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True
        ):
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.data.copy_(master.data)
    elif engine.stage < 3:
        optimizer.update_lp_params()
    else:
        optimizer.checkpoint_event_prologue()  # small weights, kept whole, are put into parts
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()


def module_state(engine: Engine) -> dict[str, Any]:
    """What modules keep beside their parameters: persistent buffers and extra states. The same on every rank."""
    found: dict[str, Any] = {}
    for path, module in engine.module.named_modules():
        extra = {"extra_state": module.get_extra_state()} if _has_extra_state(module) else {}
        buffers = {
            name: one
            for name, one in module._buffers.items()
            if one is not None and name not in module._non_persistent_buffers_set
        }
        if extra or buffers:
            found[path] = {"buffers": buffers, **extra}
    return found


def take_up_module_state(engine: Engine, state: dict[str, Any]) -> None:
    """Take up what `module_state` gave."""
    for path, module in engine.module.named_modules():
        told = state.get(path, {})
        if "extra_state" in told:
            module.set_extra_state(told["extra_state"])
        for name, value in told.get("buffers", {}).items():
            if module._buffers.get(name) is not None:
                module._buffers[name].copy_(value)  # type: ignore[union-attr]


def _has_extra_state(module: torch.nn.Module) -> bool:
    return type(module).get_extra_state is not torch.nn.Module.get_extra_state
