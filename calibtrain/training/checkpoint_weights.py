"""Weights of a checkpoint, whole and in float32: the masters that training moves, which no export shows unrounded."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from calibtrain.errors import UserError

PREFIX = "policy."


def checkpoint_weights(path: Path) -> dict[str, Tensor]:
    """Float32 weights of the policy by name, of a step-N directory of any ZeRO stage, as `gathered_weights` names them.

    DeepSpeed reads the optimizer's shards as pickles: only of directories that your own runs wrote. Holds the whole model in
    memory. Raises UserError where the shards are not whole.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = path / "engine"
    try:
        found: dict[str, Tensor] = {}
        whole = engine / "mp_rank_00_model_states.pt"  # ZeRO-0 to 2; under 1 it alone holds what is frozen
        if whole.is_file():
            found |= torch.load(whole, map_location="cpu", weights_only=True)["module"]
        if any(engine.glob("*_optim_states.pt")):
            found |= get_fp32_state_dict_from_zero_checkpoint(str(path), tag="engine")
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: the checkpoint's weights cannot be read ({error}); take another step's") from error
    if not found:
        raise UserError(f"{path}: the checkpoint holds no weights; take another step's")
    return {name.removeprefix(PREFIX): weight.float() for name, weight in found.items() if name.startswith(PREFIX)}
