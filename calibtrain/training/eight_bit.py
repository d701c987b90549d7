"""AdamW with moments of eight bits, of which 256 share a scale (Dettmers et al. 2021, arXiv 2110.02861): bitsandbytes'.

ZeRO hands an optimiser flat parts of a group of parameters, in which it cannot tell one from another. So what keeps 32 bits
has groups of its own, and the library's own choice, by the size of what it is handed, is turned off.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from torch import nn

from calibtrain.config import TrainingConfig
from calibtrain.errors import UserError
from calibtrain.models.sharding import full_shape

BLOCK = 256
"""Elements that share a scale, of 4 bytes."""
MOMENT_BYTES = 2 * (1 + 4 / BLOCK)
"""Of both moments, for an element in eight bits."""
SMALLEST = 4096
"""Elements of the smallest matrix in eight bits: as the library has it."""
LONGEST = 2**30
"""Most elements of a group of parameters: its kernels count those of a flat part in 32 bits."""
COUNTED = 2**31 - 1
FIRST = (0, 50)
"""The first version of bitsandbytes that has these optimisers on CPUs too."""


def is_eight_bit(training: TrainingConfig) -> bool:
    """Whether the optimiser's moments take eight bits."""
    return training.optimizer == "adamw_8bit"


def require_eight_bit(training: TrainingConfig) -> None:
    """Raise UserError where bitsandbytes is asked for and not installed, or too old. It is not imported."""
    if not is_eight_bit(training):
        return
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        found = ""
    if not found or tuple(int(part) for part in found.split(".")[:2]) < FIRST:
        wanted = ".".join(map(str, FIRST))
        raise UserError(
            f"training.optimizer: adamw_8bit needs bitsandbytes {wanted} or newer"
            f'{f", and {found} is installed" if found else ""}: run `pip install "calibtrain[adamw_8bit]"`, or take adamw'
        )


def in_eight_bits(model: nn.Module) -> set[nn.Parameter]:
    """The trained parameters whose moments take eight bits: matrices of `SMALLEST` elements or more.

    Not embeddings, whose rows have gradients of very different sizes (section 2.3 of the paper), nor a head tied to them;
    not a confidence head, nor one of a single output.
    """
    left_out = {one for module in model.modules() if isinstance(module, nn.Embedding) for one in module.parameters()}
    if (head := getattr(model, "confidence_head", None)) is not None:
        left_out |= set(head.parameters())
    return {one for one in model.parameters() if one.requires_grad and one not in left_out and _is_large(one)}


def _is_large(parameter: nn.Parameter) -> bool:
    shape = full_shape(parameter)
    return len(shape) >= 2 and min(shape) > 1 and shape.numel() >= SMALLEST


def in_short_groups(groups: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """The groups, cut where one has more than LONGEST elements, so that no rank's flat part of one is too long.

    `ranks`: those that share each parameter. Raises UserError for a parameter that is too long by itself.
    """
    found = []
    for group in groups:
        held: list[nn.Parameter] = []
        count = 0
        for parameter in group["params"]:
            size = full_shape(parameter).numel()
            if size // ranks >= COUNTED:
                raise UserError(
                    f"training.optimizer: adamw_8bit counts at most {COUNTED:,} elements, and a parameter has {size:,} on "
                    f"{ranks} rank(s) that share it: take adamw, or more processes and zero_stage 1, 2 or 3"
                )
            if held and count + size > LONGEST:
                found.append({**group, "params": held})
                held, count = [], 0
            held.append(parameter)
            count += size
        found.append({**group, "params": held})
    return found


def eight_bit_adamw(groups: list[dict[str, Any]], training: TrainingConfig, ranks: int) -> torch.optim.Optimizer:
    """AdamW over groups, of which each says by `bits` (8 or 32) what its moments take; `ranks` share each parameter.

    Raises UserError without bitsandbytes, and for a parameter that is too long.
    """
    require_eight_bit(training)
    from bitsandbytes import optim

    class AdamW8bit(optim.AdamW8bit):
        """The library's, with bits by group: it knows single parameters, and ZeRO has others in their place."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            return {**super().get_config(gindex, pindex, group), "optim_bits": group["bits"]}

    short = in_short_groups(groups, ranks)
    return AdamW8bit(short, betas=training.adam_betas, eps=training.adam_epsilon, min_8bit_size=0)
