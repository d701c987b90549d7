"""A cache of keys and values that does not copy what it holds with every token.

transformers' own appends by torch.cat: n tokens copy n^2 / 2. Here a layer has room ahead and is copied once in STEP tokens.
A StaticCache would need the length beforehand, attend over all of it at every step, and cannot drop rows that are done.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

STEP = 256
"""Tokens of room that are made at once."""


class GrowingLayer(DynamicLayer):
    """A DynamicLayer whose `keys` and `values` are the filled part of tensors with room behind it."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.dtype, self.device = layer.dtype, layer.device
        self.keys, self.values = layer.keys, layer.values
        self.is_initialized = True
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, heads, T, D) behind the old ones; returns all."""
        assert self.keys is not None
        assert self.values is not None
        held, total = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        # Rows that were chosen or repeated are other tensors than the room's.
        if self._room is None or self.keys.data_ptr() != self._room[0].data_ptr() or total > self._room[0].shape[-2]:
            self._room = (_with_room(self.keys, total + STEP), _with_room(self.values, total + STEP))
        keys, values = self._room
        keys[..., held:total, :] = key_states
        values[..., held:total, :] = value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        return self.keys, self.values


def _with_room(states: Tensor, length: int) -> Tensor:
    room = states.new_empty((*states.shape[:-2], length, states.shape[-1]))
    room[..., : states.shape[-2], :] = states
    return room


def growing(cache: Any) -> Any:
    """The cache with room in those layers that grow by one token a step; sliding windows and other kinds stay."""
    layers = getattr(cache, "layers", None)
    if isinstance(layers, list):
        cache.layers = [
            GrowingLayer(one) if type(one) is DynamicLayer and one.is_initialized else one for one in layers
        ]
    return cache
