"""When two JSON values mean the same, as a whole and field by field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from calibtrain.tasks.json_text import Path, name_of


def field_of(path: Path) -> str:
    """Name of a field whatever its place in an array: address.city, stops[].name."""
    return name_of(tuple("[]" if isinstance(key, int) else key for key in path)).replace('["[]"]', "[]")


@dataclass(frozen=True)
class Comparison:
    """text: what of a string counts. fields: those that count, None for all. unordered: arrays without an order."""

    text: Callable[[str], str]
    fields: tuple[str, ...] | None = None
    unordered: tuple[str, ...] = ()

    def counts(self, path: Path) -> bool:
        """Whether the value at `path`, or something in it, counts."""
        if self.fields is None:
            return True
        name = field_of(path)
        return any(_within(name, one) or _within(one, name) for one in self.fields)

    def meaning(self, value: Any, path: Path = ()) -> Any:
        """What values are compared by: equal where they mean the same, hashable, and without the fields that do not count.

        12 means 12.0, and neither "12" nor true; whether an object has a field counts, its place in it does not.
        """
        if isinstance(value, bool) or value is None:
            return ("constant", str(value))
        if isinstance(value, int | float):
            return ("number", value)
        if isinstance(value, str):
            return ("text", self.text(value) or value.strip())
        if isinstance(value, Mapping):
            inner = {key: (*path, key) for key in sorted(value)}
            kept = {key: self.meaning(value[key], place) for key, place in inner.items() if self.counts(place)}
            return ("object", tuple(kept.items()))
        items = [self.meaning(one, (*path, i)) for i, one in enumerate(value)]
        return ("array", tuple(sorted(items, key=_order) if field_of(path) in self.unordered else items))

    def grades(self, value: Any, gold: Any, path: Path = ()) -> dict[Path, bool]:
        """Whether each scalar (and empty object or array) of `value` says what stands in its place in `gold`.

        Items of an unordered array stand where they fit: those that are wholly right first, then each of the others in the
        place, of those left, where most of it is right. A field that `gold` lacks is wrong.
        """
        if isinstance(value, list) and value and field_of(path) in self.unordered:
            return self._unordered(value, gold if isinstance(gold, list) else [], path)
        if isinstance(value, dict | list) and value:
            known = _items(gold) if isinstance(gold, type(value)) else {}
            return {
                place: right
                for key, one in _items(value).items()
                for place, right in self._inside(one, known, key, (*path, key)).items()
            }
        return {path: self.meaning(value, path) == self.meaning(gold, path)}

    def _inside(self, value: Any, known: Mapping[Any, Any], key: Any, path: Path) -> dict[Path, bool]:
        if key in known:
            return self.grades(value, known[key], path)
        return dict.fromkeys(leaves(value, path), False)

    def _unordered(self, value: list[Any], known: list[Any], path: Path) -> dict[Path, bool]:
        left, found = list(known), dict[int, dict[Path, bool]]()
        meanings = [self.meaning(one, (*path, 0)) for one in left]
        for i, one in enumerate(value):
            mine = self.meaning(one, (*path, 0))
            if mine in meanings:
                place = meanings.index(mine)
                del left[place], meanings[place]
                found[i] = dict.fromkeys(leaves(one, (*path, i)), True)
        for i, one in enumerate(value):
            if i in found:
                continue
            tried = [self.grades(one, other, (*path, i)) for other in left]
            best = max(range(len(tried)), key=lambda k: sum(tried[k].values()), default=None)
            if best is None:
                found[i] = dict.fromkeys(leaves(one, (*path, i)), False)
            else:
                found[i] = tried[best]
                del left[best]
        return {place: right for i in range(len(value)) for place, right in found[i].items()}


def leaves(value: Any, path: Path) -> list[Path]:
    """Paths of all scalars and empty objects and arrays."""
    if isinstance(value, dict | list) and value:
        return [inner for key, one in _items(value).items() for inner in leaves(one, (*path, key))]
    return [path]


def _items(value: dict[str, Any] | list[Any]) -> dict[Any, Any]:
    return value if isinstance(value, dict) else dict(enumerate(value))


def _within(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith((f"{outer}.", f"{outer}["))


def _order(meaning: Any) -> str:
    """Text to sort meanings by, the same for 1 and 1.0, which mean the same."""
    kind, value = meaning
    if kind == "number":
        return f"number {Fraction(value)}"
    if kind == "array":
        return f"array {[_order(one) for one in value]}"
    if kind == "object":
        return f"object {[(key, _order(one)) for key, one in value]}"
    return f"{kind} {value!r}"
