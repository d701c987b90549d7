"""Which keys of a config shape a run: those that a run may not change when it is gone on with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from calibtrain.config import RunConfig
from calibtrain.models.arithmetic import settled

ENGINE_KEYS = ("address", "launch", "python", "arguments", "environment", "host", "directory", "wait", "tolerance")
"""Where and how the engine of rollouts runs, not who it is and when it samples."""
FREE_TO_CHANGE = (
    "name",
    "output_dir",
    "tracking",
    "abstention",
    "model.gradient_checkpointing",
    *(f"rollouts.engine.{key}" for key in ENGINE_KEYS),
    "rollouts.measure_reward_model",
    "data.strict",
    "data.examples",  # they are in the hash of the data
    "data.max_dropped",
    "training.resume",
    "training.new_trajectory",
    "training.log_every",
    "training.keep_checkpoints",
    "training.checkpoint_every",
    "training.checkpoint_in_background",
    "training.evaluate_every",
    "training.evaluate_questions",
    "training.evaluate_loss_every",
    "training.max_skipped_steps",
    "training.profile_steps",
)
"""Config keys that may differ on resume; every other one shapes the trajectory."""
RESHAPING = (
    "training.learning_rate",
    "training.schedule",
    "training.warmup_ratio",
    "training.max_steps",
    "training.epochs",
)
"""Of these, what training.new_trajectory lets differ: the loop reads them anew. Optimizer and data go on as they were."""

REARRANGING = (
    "training.micro_batch_size",
    "training.sequence_parallel_size",
    "training.zero_stage",
    "training.offload_optimizer",
    "training.offload_parameters",
    "training.deepspeed",
)
"""Keys that may differ as the number of ranks may: what is computed is the same, in sums of another order."""


def refused(old: Mapping[str, Any], config: RunConfig) -> list[str]:
    """The differences from an earlier run's config that keep this one from going on with it."""
    found = changed_keys(old, config)
    if not config.training.new_trajectory:
        hint = " (training.new_trajectory=true goes on with the new one)"
        return [one + hint if one.partition(" ")[0] in RESHAPING else one for one in found]
    return [one for one in found if one.partition(" ")[0] not in RESHAPING]


def changed_keys(old: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Where an earlier run's resolved config makes another run; keys that it did not know yet have their defaults."""
    with contextlib.suppress(ValueError):  # of a version that knew keys which are gone
        old = RunConfig.model_validate(old).resolved()
    return differences(old, settled(config).resolved())


def rearranged(old: Mapping[str, Any], config: RunConfig, ranks_then: int, ranks_now: int) -> list[str]:
    """How the same run is laid out otherwise than it was, a phrase a key."""
    new = settled(config).resolved()["training"]
    found = [] if ranks_then == ranks_now else [f"{ranks_then} process(es) before, {ranks_now} now"]
    for key in (one.removeprefix("training.") for one in REARRANGING):
        then = old["training"].get(key, new[key])
        if then != new[key]:
            found.append(f"training.{key} was {then!r}, is {new[key]!r}")
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two resolved configs make different runs, a phrase a key; FREE_TO_CHANGE and REARRANGING are left out."""
    found = []
    for key in sorted({*old, *new}):
        dotted = f"{prefix}{key}"
        if dotted in FREE_TO_CHANGE or dotted in REARRANGING:
            continue
        left, right = old.get(key), new.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{dotted}.")
        elif left != right:
            found.append(f"{dotted} was {left!r}, is {right!r}")
    return found
