"""Run by test_pooled on several ranks: losses that keep a memory or read a token set, for each ZeRO stage.

Usage: pooled_cases.py FOLDER. Rank 0 writes FOLDER/results-<ranks>.pt.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from calibtrain.config import RunConfig
from calibtrain.data.collate import collate
from calibtrain.data.encode import Encoded
from calibtrain.distributed import World, barrier, leave_world, on_main, start_world
from calibtrain.losses.brier import TokenizedBrierLoss
from calibtrain.losses.calibration_tuning import CorrectnessQueryLoss
from calibtrain.losses.pooled import MMCELoss, SoftBinnedECELoss
from calibtrain.losses.sft import SFTLoss
from calibtrain.losses.terms import ANSWER, CHOSEN, QUERY, global_counts
from calibtrain.models.loading import load_model
from calibtrain.models.loss_model import LossModel, TrainStep
from calibtrain.models.policy import Policy
from calibtrain.training.engine import Engine, start_engine
from calibtrain.training.engine_state import follow, module_state, state_of, take_up, take_up_module_state
from calibtrain.training.shards import Shards, write_shard
from tests.distributed.jobs import sharded

STEPS, MICRO_BATCHES, PAD = 3, 8, 2
NO, YES, SURE = 40, 41, 42
STAGES = (0, 1, 2, 3)


def micro_batch(step: int, number: int) -> list[Encoded]:
    """Sequences of one of the eight micro-batches of a step, of uneven kinds and lengths; one has no answers at all."""
    index = MICRO_BATCHES * step + number
    made = [Encoded((5, 6, 7 + index % 20, 1), 2, CHOSEN, index)]
    for k in range(index % 4):
        # One token, since two of a random model are next to impossible. The first two steps ask the same records.
        record = 4 * number + k + 100 * (step // 2)
        made.append(Encoded((8, 9 + k, 50 + record % 30), 2, ANSWER, record, correct=float((record + step) % 2)))
    for k in range(number % 3):
        choice = (NO, YES, SURE)[(index + k) % 3]
        made.append(Encoded((3,) * (1 + k) + (choice, 1), 1 + k, QUERY, index, correct=float(k % 2)))
    return made


def build(model: Path) -> LossModel:
    """A sharp model, so that the answers' likelihoods differ, with every loss that is not a plain sum over a batch."""
    torch.manual_seed(1)
    loaded = load_model(RunConfig.model_validate({"model": {"source": str(model), "dtype": "fp32"}}).model)
    with torch.no_grad():
        loaded.get_output_embeddings().weight.mul_(10.0)
        loaded.get_output_embeddings().weight[50:80] *= 3.0  # the tokens of the answers
    penalties = [
        MMCELoss(weight=5.0, bank_size=20),
        SoftBinnedECELoss(weight=5.0, bank_size=20),
        CorrectnessQueryLoss(token_set=(NO, YES)),
        TokenizedBrierLoss(token_set=(NO, SURE, YES)),
    ]
    return LossModel(Policy(loaded), SFTLoss(), penalties)


def start(folder: Path, stage: int, world: World) -> Engine:
    """An engine that cuts a step of eight micro-batches over the ranks."""
    config = RunConfig.model_validate(
        {
            "model": {"source": str(folder / "model"), "dtype": "fp32"},
            "training": {
                "micro_batch_size": 1,
                "global_batch_size": MICRO_BATCHES,
                "adam_epsilon": 1e-2,
                "max_grad_norm": 0.0,
                "zero_stage": stage,
                "deepspeed": sharded(folder) if stage == 3 else None,
            },
        }
    )
    engine = start_engine(build(folder / "model"), config, world)
    engine.set_learning_rate(0, STEPS, config.training.model_copy(update={"warmup_ratio": 0.0, "learning_rate": 1e-3}))
    engine.module.train()
    return engine


def run_step(engine: Engine, step: int, world: World) -> dict[str, Any]:
    """One optimiser step: its term sums over all ranks, full gradients and banks after it."""
    mine = range(world.rank, MICRO_BATCHES, world.size)
    batches = [collate(micro_batch(step, number), PAD) for number in mine]
    totals = global_counts(engine.module, batches)
    divisors = {name: (total.clamp(min=1) / world.size).float() for name, total in totals.items()}
    sums = {name: torch.zeros((), dtype=torch.float64) for name in totals}
    for batch in batches:
        loss, output = engine.deepspeed(TrainStep(batch, divisors))
        engine.backward(loss, last=batch is batches[-1])
        for name, term in output.terms.items():
            sums[name] += term.total
    gradients = {
        name: gradient.float().clone()
        for name, parameter in engine.module.policy.named_parameters()
        if (gradient := safe_get_full_grad(parameter)) is not None
    }
    skipped, _ = engine.step()
    assert not skipped
    engine.module.after_step()
    for total in sums.values():
        torch.distributed.all_reduce(total)
    return {
        "counts": {name: float(total) for name, total in totals.items()},
        "sums": {name: float(total) for name, total in sums.items()},
        "gradients": gradients,
        "banks": banks(engine),
    }


def banks(engine: Engine) -> list[torch.Tensor]:
    """Of the two pooled penalties."""
    return [penalty.bank.items.clone() for penalty in engine.module.penalties[:2]]


def same_banks(found: Sequence[torch.Tensor], world: World) -> bool:
    """Whether every rank holds what rank 0 holds."""
    if world.size == 1:
        return True
    shared = [one.clone() for one in found]
    for one in shared:
        torch.distributed.broadcast(one, 0)
    return all(torch.equal(*pair) for pair in zip(found, shared, strict=True))


def run_stage(folder: Path, stage: int, world: World) -> dict[str, Any]:
    """Three steps, and the last of them once more in a new engine that took up a checkpoint of the first two."""
    engine = start(folder, stage, world)
    steps = [run_step(engine, step, world) for step in range(STEPS - 1)]
    checkpoint = folder / f"checkpoint-{stage}-{world.size}"
    on_main(lambda: checkpoint.mkdir())
    pieces, wholes, facts = state_of(engine, world)
    write_shard(checkpoint, world.rank, world.size, pieces, wholes, facts)
    kept = copy.deepcopy(module_state(engine))
    barrier()
    steps.append(run_step(engine, STEPS - 1, world))
    agreed = same_banks(steps[-1]["banks"], world)
    engine.deepspeed.destroy()
    resumed = start(folder, stage, world)
    with Shards(checkpoint) as shards:
        take_up(resumed, shards)
    take_up_module_state(resumed, kept)
    follow(resumed)
    agreed = agreed and same_banks(banks(resumed), world)
    after = run_step(replace(resumed), STEPS - 1, world)
    resumed.deepspeed.destroy()
    return {"steps": steps, "resumed": after, "agreed": agreed}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = start_world()
    results = {}
    for stage in STAGES:
        results[stage] = run_stage(folder, stage, world)
        assert results[stage]["agreed"]
        barrier()
    if world.is_main:
        torch.save(results, folder / f"results-{world.size}.pt")
    barrier()
    leave_world()
