"""An adapter that learns what post-training is said to do to a matrix, and nothing else (He, Cao 2025, arXiv 2509.17866).

W = a U0 Q S0 Q^T V0^T: both singular bases of W0 = U0 S0 V0^T turn by one shared rotation Q, and all singular values grow by
one factor a. Q turns the r largest singular directions among themselves and leaves the others: with M = Q S_r Q^T - S_r,

    y = a (W0 x + U_r M V_r^T x)

which starts at the base model exactly, costs as much as LoRA of the same rank, and for r = min(out, in) reaches the whole
set. Q = (I + K)^-1 (I - K) with K skew (Cayley): exactly orthogonal, never a reflection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.spectral.polar import top_singular


class SharedRotationLinear(nn.Module):
    """A frozen linear layer W0 that turns and scales as told above; trained are `skew` (r (r - 1) / 2,) and `log_scale`.

    The singular bases are frozen parameters, so ZeRO-3 shards them and checkpoints keep them.
    """

    def __init__(self, base: nn.Linear, rank: int, *, find_bases: bool = True) -> None:
        super().__init__()
        rank = min(rank, *base.weight.shape)
        weight = base.weight
        self.base = base.requires_grad_(False)
        if find_bases:
            left, values, right = (one.to(weight.dtype) for one in top_singular(weight, rank))
        else:  # a checkpoint brings them
            shapes = (weight.shape[0], rank), (rank,), (weight.shape[1], rank)
            left, values, right = (weight.new_zeros(shape) for shape in shapes)
        self.left = nn.Parameter(left.contiguous(), requires_grad=False)
        self.values = nn.Parameter(values, requires_grad=False)
        self.right = nn.Parameter(right.contiguous(), requires_grad=False)
        self.skew = nn.Parameter(weight.new_zeros(rank * (rank - 1) // 2))
        self.log_scale = nn.Parameter(weight.new_zeros(1))
        rows, columns = torch.tril_indices(rank, rank, -1).unbind()
        self.rows: Tensor
        self.columns: Tensor
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in) to (..., out), in its dtype; rotations are computed in float32."""
        change = ((x @ self.right) @ self._change().to(x.dtype).mT) @ self.left.mT
        scale = self.log_scale.float().exp().to(x.dtype)
        output = (self.base(x) + change) * scale
        return output if self.base.bias is None else output + (1.0 - scale) * self.base.bias

    def rotation(self) -> Tensor:
        """Q (r, r) in float32 or better."""
        dtype = torch.promote_types(self.skew.dtype, torch.float32)
        rank = self.values.shape[0]
        eye = torch.eye(rank, dtype=dtype, device=self.skew.device)
        lower = torch.zeros_like(eye).index_put((self.rows, self.columns), self.skew.to(dtype))
        skew = lower - lower.mT
        # I + K is never singular (its eigenvalues are 1 + i b). `solve` would look, and make the host wait for a GPU.
        return torch.linalg.solve_ex(eye + skew, eye - skew).result

    def merged_weight(self) -> Tensor:
        """W (out, in) in float32 or better."""
        change = self._change()
        left, right = self.left.to(change.dtype), self.right.to(change.dtype)
        weight = self.base.weight.to(change.dtype) + left @ change @ right.mT
        return weight * self.log_scale.to(change.dtype).exp()

    def _change(self) -> Tensor:
        rotation = self.rotation()
        values = self.values.to(rotation.dtype)
        return (rotation * values) @ rotation.mT - torch.diag(values)


def add_shared_rotations(
    model: Any,
    rank: int,
    target_modules: Sequence[str] | str,
    *,
    find_bases: bool = True,
    whole: Callable[[nn.Linear], AbstractContextManager[None]] = lambda layer: nullcontext(),
) -> Any:
    """Replace the linear layers that `target_modules` names (or "all-linear" but the head) and freeze all the rest.

    Within `whole(layer)` a layer's weight, which may lie in parts elsewhere, is there. Raises UserError when nothing is
    named by `target_modules`.
    """
    model.requires_grad_(False)
    for parent, name, layer in _linear_layers(model, target_modules):
        with whole(layer):
            setattr(parent, name, SharedRotationLinear(layer, rank, find_bases=find_bases))
    return model


@torch.no_grad()
def merge_shared_rotations(model: Any) -> Any:
    """Put plain linear layers with the turned weights back in place."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, SharedRotationLinear):
                layer.base.weight.copy_(layer.merged_weight())
                setattr(parent, name, layer.base)
    return model


def _linear_layers(model: Any, target_modules: Sequence[str] | str) -> list[tuple[nn.Module, str, nn.Linear]]:
    head, names = model.get_output_embeddings(), {layer: name for name, layer in model.named_modules()}
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear) and layer is not head
        if target_modules == "all-linear" or any(f".{names[layer]}".endswith(f".{one}") for one in target_modules)
    ]
    if not found:
        raise UserError(f"model.adapter.target_modules: no linear layer is called {', '.join(target_modules)}")
    return found
