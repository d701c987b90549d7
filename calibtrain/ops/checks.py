"""What the ops refuse. What only a tensor's values can tell is told at once on a CPU, and by the device itself on a GPU.

To read a value from a GPU, the host would wait for all work before it, in every forward pass. There a device-side
assertion does it, as in PyTorch's own cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calibtrain.errors import UserError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """Raise UserError where shapes, dtypes or devices of a head's inputs do not fit."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise UserError(f"hidden (N, H) and weight (V, H) do not fit: {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise UserError(f"targets must be ({hidden.shape[0]},) int64, got {tuple(targets.shape)} {targets.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in DTYPES):
        raise UserError(f"bias must be ({weight.shape[0]},) floating, got {tuple(bias.shape)} {bias.dtype}")
    if hidden.dtype not in DTYPES or hidden.dtype != weight.dtype:
        raise UserError(f"hidden and weight must share a floating dtype, got {hidden.dtype} and {weight.dtype}")
    if softcap is not None and not softcap > 0:
        raise UserError(f"softcap must be positive or None, got {softcap}")
    if len({tensor.device for tensor in (hidden, weight, targets, bias) if tensor is not None}) > 1:
        raise UserError("hidden, weight, targets and bias must be on one device")


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise UserError where a target is outside [0, vocabulary)."""

    def message() -> str:
        low, high = (int(bound) for bound in torch.aminmax(targets))
        return (
            f"targets must be token ids in [0, {vocabulary}), found {low if low < 0 else high}: leave padding and "
            "ignored positions out of targets, and check that the tokenizer belongs to the model"
        )

    _require((targets >= 0) & (targets < vocabulary), message, "a target is outside the vocabulary")


def check_token_set(token_set: Tensor, vocabulary: int) -> None:
    """Raise UserError where `token_set` is not (K,) int64 in [0, vocabulary)."""
    if token_set.ndim != 1 or token_set.dtype != torch.int64:
        raise UserError(f"token_set must be (K,) int64, got {tuple(token_set.shape)} {token_set.dtype}")
    _require(
        (token_set >= 0) & (token_set < vocabulary),
        lambda: f"token_set must be token ids in [0, {vocabulary}), got {token_set.tolist()}",
        "a token of the set is outside the vocabulary",
    )


def check_temperatures(temperatures: Tensor) -> None:
    """Raise UserError where `temperatures` are not (K,) positive and finite."""
    if temperatures.ndim != 1 or not temperatures.is_floating_point():
        raise UserError(f"temperatures must be (K,) floating, got {tuple(temperatures.shape)} {temperatures.dtype}")
    _require(
        (temperatures > 0) & temperatures.isfinite(),
        lambda: f"temperatures must be positive, got {temperatures.tolist()}",
        "a temperature is not positive",
    )


def _require(holds: Tensor, message: Callable[[], str], on_device: str) -> None:
    if _on_gpu(holds):
        torch._assert_async(holds.all(), on_device)
    elif not bool(holds.all()):
        raise UserError(message())


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
