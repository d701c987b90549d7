"""A sequence whose items are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar, overload

T = TypeVar("T")


class Lazy(Sequence[T]):
    """`length` items by `make(place)`, of which the last `kept` asked for stay in memory. A slice is a list."""

    def __init__(self, length: int, make: Callable[[int], T], kept: int = 1) -> None:
        self._length = length
        self._item = lru_cache(maxsize=kept)(make)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self._item(one) for one in range(*place.indices(self._length))]
        if not -self._length <= place < self._length:
            raise IndexError(place)
        return self._item(place % self._length)
