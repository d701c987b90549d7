"""Weights of a checkpoint, whole and in float32: the masters that training moves, which no export shows unrounded."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from calibtrain.errors import UserError
from calibtrain.training.engine_state import WEIGHT
from calibtrain.training.shards import Shards

PREFIX = "policy."


def checkpoint_weights(path: Path) -> dict[str, Tensor]:
    """Float32 weights of the policy by name, of a step-N directory of any ZeRO stage, as `gathered_weights` names them.

    Holds the whole model in memory. Raises UserError where the shards are not whole.
    """
    try:
        with Shards(path / "engine") as shards:
            names = [name for name in shards.shapes if name.startswith(PREFIX)]
            found = {name.removeprefix(PREFIX): shards.full(name, WEIGHT) for name in names}
    except UserError as error:
        raise UserError(f"{path}: the checkpoint's weights cannot be read ({error}); take another step's") from error
    if not found:
        raise UserError(f"{path}: the checkpoint holds no weights; take another step's")
    return found
