"""Whether a model keeps the sequences of a row apart: asked of the model itself, once, with a few tokens.

Nothing in a model's config says so for certain: attention implementations, ALiBi and recurrent layers each have rules of
their own. So the first sequences of a row are changed, and the last one is watched: what the model makes of it must stay,
and be what it makes of it alone. Nothing of transformers is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.losses.terms import Batch

ROUNDING, ROUTING = 1e-5, 2e-3
"""What a change elsewhere may move, relative to the hidden states: nothing, but that experts in half precision multiply
other tokens beside these."""
PLACE, PLACE_HALF = 1e-3, 0.05
"""What another place in the row may move in float32 and in half precision: attention sums in another order there."""


def keeps_apart(
    states: Callable[[Batch], Tensor],
    alone: Batch,
    together: tuple[Batch, Batch],
    watched: Tensor,
    *,
    dtype: torch.dtype,
    experts: bool = False,
) -> bool:
    """Whether `states` (batch -> hidden states at its targets, (N, H), computed in `dtype`) are those of sequences alone.

    `alone`: the sequences one a row; `together`: in the layout in question, with the targets in the same order, and the same
    with other tokens in all sequences whose targets are not `watched` (N,) bool. `experts`: the model routes tokens to some.
    """
    first, found, other = (states(one).float() for one in (alone, *together))
    place = (PLACE_HALF if _half(dtype) else PLACE) * _norms(first).median()
    moved = _moved((found - other)[watched], first, dtype, experts=experts)
    return not moved and bool(_norms(found - first).median() <= place)


def leaks(
    states: Callable[[Tensor], Tensor], batch: Batch, vocabulary: int, *, dtype: torch.dtype, experts: bool = False
) -> bool:
    """Whether the first sequence of a row moves the hidden states of the others in `batch` itself.

    `states` gives those of all positions, (R, T, H), from the token ids (R, T). For layouts that only their maker knows.
    """
    segments = batch.segment_ids
    several = segments.amax(1, keepdim=True) > 1
    branches = torch.zeros_like(segments) if batch.branch_ids is None else batch.branch_ids
    first = torch.where(several, segments == 1, branches == 1)
    ids = torch.where(first, changed_tokens(batch.input_ids, vocabulary), batch.input_ids)
    before, after = states(batch.input_ids).float(), states(ids).float()
    others = (segments > 0) & ~first & (several | (branches > 1))
    return _moved((before - after)[others], before, dtype, experts=experts)


def has_experts(config: Any) -> bool:
    """Whether a model of this configuration routes tokens to experts."""
    return any("expert" in name for name in vars(config))


def changed_tokens(ids: Tensor, vocabulary: int) -> Tensor:
    """Other token ids everywhere."""
    return (ids + max(1, vocabulary // 2)) % vocabulary


@contextmanager
def quietly(modules: Any, device: torch.device) -> Iterator[None]:
    """A pass on the side: no gradients, no dropout, and nothing left behind in the random numbers or autocast's cache."""
    trained = [module for module in modules if module.training]
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type)
    devices = [device] if device.type == "cuda" else []
    try:
        for module in trained:
            module.training = False  # not eval(): adapters take it as the word to merge
        # Weights that autocast casts without a gradient may not be found again by the pass that wants one.
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            torch.autocast(device.type, dtype=dtype, enabled=autocast, cache_enabled=False),
        ):
            yield
    finally:
        for module in trained:
            module.training = True


@contextmanager
def head_forward(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`forward` in place of the head's own."""
    own = head.__dict__.get("forward")
    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own  # type: ignore[method-assign]


def _moved(change: Tensor, states: Tensor, dtype: torch.dtype, *, experts: bool) -> bool:
    if not change.numel():
        return False
    norms, size = _norms(change), _norms(states).median()
    if experts and _half(dtype):
        return not bool(norms.median() <= ROUTING * size)  # a token near two experts may go to the other one
    return not bool(norms.max() <= ROUNDING * size)  # NaN has moved


def _norms(states: Tensor) -> Tensor:
    return states.flatten(0, -2).norm(dim=-1)


def _half(dtype: torch.dtype) -> bool:
    return dtype not in (torch.float32, torch.float64)
