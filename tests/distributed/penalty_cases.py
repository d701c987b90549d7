"""Run by test_weight_penalty under torchrun: penalties on the shards of every ZeRO stage, against the whole matrices.

Usage: penalty_cases.py FOLDER. Does every FOLDER/*.yaml; rank 0 writes FOLDER/<name>-<ranks>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from calibtrain.config import RunConfig
from calibtrain.config_file import load_config
from calibtrain.distributed import World, barrier, leave_world, start_world
from calibtrain.losses.rotation_probes import Shard, run_together
from calibtrain.losses.rotation_step import DecoupledPenalty, DenseMatrix
from calibtrain.pipeline.train import build_model
from calibtrain.training.engine import start_engine
from calibtrain.training.matrices import gather
from calibtrain.training.weight_penalty import build_weight_penalties

DRIFT = 0.05


def measure(config: RunConfig, world: World) -> dict[str, Any]:
    """Move the masters away from the start; each penalty's gradient in one step, put together from all ranks."""
    torch.manual_seed(1)
    engine = start_engine(build_model(config), config, world)
    penalties = build_weight_penalties(config, engine, world)
    assert penalties is not None
    found: dict[str, Any] = {}
    for name, penalty in penalties.penalties.items():
        for one in penalty.matrices:
            held = [one.weight] if isinstance(one, DenseMatrix) else [one.a, one.b]
            before = [_whole(part, world) for part in held]
            for part in held:
                _move(part)
            moved = [_whole(part, world) for part in held]
            found[f"{name} {one.name}"] = {"before": before, "moved": moved, **_gradient(penalty, one, world)}
            for part, start in zip(held, before, strict=True):
                flat = part.read()
                flat.copy_(start.view(-1)[part.start : part.start + flat.numel()])
                part.write(flat)
    return found


def _whole(held: Any, world: World) -> torch.Tensor:
    flat = held.read()
    found = gather(held.shape, flat, held.start, held.replicated, world).clone()
    held.write(flat)
    return found


def _move(held: Any) -> None:
    """Add the same noise on every rank, each to its own elements."""
    flat = held.read()
    noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(7)).view(-1)
    flat.add_(DRIFT * noise[held.start : held.start + flat.numel()])
    held.write(flat)


def _gradient(penalty: DecoupledPenalty, one: Any, world: World) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    if isinstance(one, DenseMatrix):
        flat = one.weight.read()
        (estimate,) = run_together([penalty._sums(one, flat, generator)], penalty.reduce)
        own = Shard(one.weight.shape, one.weight.start, torch.zeros_like(flat))
        own.add_product(estimate.left, estimate.right, 1.0)
        own.flat.add_((flat - one.initial) * estimate.drift_factor)
        gradients = [gather(one.weight.shape, own.flat, one.weight.start, one.weight.replicated, world)]
        value = estimate.value
    else:
        from calibtrain.losses.rotation_lora import lora_sums

        parts = (held.part(penalty.rank, penalty.ranks) for held in (one.a, one.b))
        sums = lora_sums(penalty.penalty, *parts, one.reference, one.scaling, one.norm, penalty.budget)
        ((value, *gradients),) = run_together([sums], penalty.reduce)
    return {"value": value, "gradients": gradients}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = start_world()
    for path in sorted(folder.glob("*.yaml")):
        found = measure(load_config(path), world)
        if world.is_main:
            torch.save(found, folder / f"{path.stem}-{world.size}.pt")
        barrier()
    leave_world()
