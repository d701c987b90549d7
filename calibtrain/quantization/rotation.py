"""The residual stream turned by an orthogonal matrix that is folded into the weights, which leaves no channel an outlier.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456) and SpinQuant (Liu et al. 2024, arXiv 2405.16406), as far as it costs
nothing when the model runs: what reads the stream is W diag(g) Q, what writes into it Q^T W, norms become 1, and values
are turned within each head. A model computes what it did, since the root mean square of a vector stays as it turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.quantization.folds import Fold, folds_of, head_dim_of, high, text_config_of, weight_in, writers_of


@dataclass(frozen=True, slots=True)
class Rotation:
    """Orthogonal matrices, float64: of the residual stream, and of the values of every head."""

    stream: Tensor  # (H, H)
    values: Tensor  # (head width, head width)


def rotation_of(model: Any, seed: int = 0) -> Rotation:
    """Rotations that fit a model."""
    config = text_config_of(model)
    return Rotation(spreading_matrix(config.hidden_size, seed), spreading_matrix(head_dim_of(config), seed + 1))


def why_not_rotated(model: Any) -> str | None:
    """Why a model's stream cannot be turned, in words for its user; None where it can."""
    kind = text_config_of(model).model_type
    if not writers_of(model):
        return f"the residual stream of the architecture {kind!r} is not known to turn freely: it is not rotated"
    return None


def spreading_matrix(width: int, seed: int) -> Tensor:
    """An orthogonal (width, width) float64 of entries at most sqrt(2 / width), so that no input stands out behind it.

    Random signs, then Hadamard's matrix of the largest power of two in width, times Hartley's of the odd rest: both spread
    an outlier over all outputs evenly, and any width has them.
    """
    odd = width
    while odd % 2 == 0:
        odd //= 2
    angles = 2 * math.pi / odd * torch.outer(torch.arange(odd), torch.arange(odd)).double()
    matrix = (angles.cos() + angles.sin()) / math.sqrt(odd)
    while len(matrix) < width:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2), matrix)
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return signs[:, None] * matrix


@torch.no_grad()
def rotate_block(model: Any, block: nn.Module, rotation: Rotation) -> None:
    """Turn what a block reads, writes and hands from values to outputs, in place, rounded once."""
    folds = folds_of(model, block)
    for norm in (fold for fold in folds if fold.form != "rows"):
        gain = _taken_gain(block.get_submodule(norm.source), plus_one=norm.form == "norm plus one")
        for name in norm.targets:
            weight = weight_in(block, name)
            weight.copy_((high(weight) * gain) @ _like(rotation.stream, weight))
    values = next((fold for fold in folds if fold.form == "rows" and fold.part.endswith("o_proj")), None)
    for name in writers_of(model, block):
        weight, bias = weight_in(block, name), _bias_in(block, name)
        turned = high(weight)
        if values is not None and name in values.targets:
            turned = _by_heads(turned, _like(rotation.values, weight))
        weight.copy_(_like(rotation.stream, weight).T @ turned)
        if bias is not None:
            bias.copy_(high(bias) @ _like(rotation.stream, bias))
    if values is not None:
        _rotate_values(model, block, values, rotation.values)


@torch.no_grad()
def rotate_outside(model: Any, rotation: Rotation) -> None:
    """Turn embeddings and head in place, rounded once. A head that is the embedding becomes a matrix of its own."""
    embedding, head, norm = model.get_input_embeddings(), model.get_output_embeddings(), final_norm_of(model)
    gain = _taken_gain(norm, plus_one=_plus_one(model))
    head.weight = nn.Parameter(
        ((high(head.weight) * gain) @ _like(rotation.stream, head.weight)).to(head.weight.dtype), requires_grad=False
    )
    embedding.weight.copy_(high(embedding.weight) @ _like(rotation.stream, embedding.weight))


def final_norm_of(model: Any) -> Any:
    """The norm between the last block and the head."""
    return model.base_model.norm


def _plus_one(model: Any) -> bool:
    from calibtrain.quantization.blocks import find_blocks

    return any(fold.form == "norm plus one" for fold in folds_of(model, find_blocks(model)[1][0]))


def _taken_gain(norm: Any, *, plus_one: bool) -> Tensor:
    """The gain (H,) of a norm, which becomes 1."""
    gain = high(norm.weight) + (1.0 if plus_one else 0.0)
    norm.weight.fill_(0.0 if plus_one else 1.0)
    return gain


def _rotate_values(model: Any, block: nn.Module, fold: Fold, turn: Tensor) -> None:
    config = text_config_of(model)
    rows = slice(fold.first_row, fold.first_row + config.num_key_value_heads * head_dim_of(config))
    weight, bias = weight_in(block, fold.source), _bias_in(block, fold.source)
    weight[rows] = _by_heads(high(weight[rows]).T, _like(turn, weight)).T.to(weight.dtype)
    if bias is not None:
        bias[rows] = _by_heads(high(bias[rows]), _like(turn, bias)).to(bias.dtype)


def _by_heads(x: Tensor, turn: Tensor) -> Tensor:
    """(..., heads * width) with the columns of each head turned."""
    return (x.unflatten(-1, (-1, len(turn))) @ turn).flatten(-2)


def _bias_in(block: nn.Module, name: str) -> Tensor | None:
    owner, _, last = name.rpartition(".")
    return getattr(getattr(block.get_submodule(owner), last), "bias", None)


def _like(matrix: Tensor, weight: Tensor) -> Tensor:
    """In the precision in which a weight is folded."""
    return matrix.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
