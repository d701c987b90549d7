"""Run by test_weight_penalty on several ranks: penalties and spectra on the shards of every ZeRO stage, and whole matrices.

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
from calibtrain.training.spectra import build_spectra
from calibtrain.training.weight_penalty import build_weight_penalties

DRIFT = 0.05
SPECTRA_DRIFT = 0.002


def measure(config: RunConfig, world: World) -> dict[str, Any]:
    """Move the masters away from the start; each penalty's gradient in one step, put together from all ranks."""
    torch.manual_seed(1)
    engine = start_engine(build_model(config), config, world)
    penalties = build_weight_penalties(config, engine, world)
    assert penalties is not None
    found: dict[str, Any] = {"spectra": _spectra(config, engine, world)}
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


def _spectra(config: RunConfig, engine: Any, world: World) -> dict[str, Any]:
    """Readings before and after the masters are moved, and the whole masters after it."""
    spectra = build_spectra(config, engine, world)
    assert spectra is not None
    masters = [part for one in spectra.matrices for part in one.masters]
    before, start = [_whole(part, world) for part in masters], spectra.read()
    for part in masters:
        _move(part, SPECTRA_DRIFT)
    moved = [_whole(part, world) for part in masters]
    random = torch.get_rng_state()
    read = spectra.read()
    untouched = torch.equal(random, torch.get_rng_state()) and all(
        torch.equal(_whole(part, world), one) for part, one in zip(masters, moved, strict=True)
    )
    for part, one in zip(masters, before, strict=True):
        flat = part.read()
        flat.copy_(one.view(-1)[part.start : part.start + flat.numel()])
        part.write(flat)
    each = len(spectra.matrices[0].masters)
    whole = {one.name: moved[each * i : each * (i + 1)] for i, one in enumerate(spectra.matrices)}
    elements = sum(one.first.flat.numel() for one in spectra.matrices)
    return {"start": start, "read": read, "moved": whole, "untouched": untouched, "elements": elements}


def _move(held: Any, size: float = DRIFT) -> None:
    """Add the same noise on every rank, each to its own elements."""
    flat = held.read()
    noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(7)).view(-1)
    flat.add_(size * noise[held.start : held.start + flat.numel()])
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
