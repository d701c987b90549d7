"""Records of several sources in given proportions: in every prefix of the draw, and again in every split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count

from calibtrain.config_data import MixtureSource
from calibtrain.errors import UserError
from calibtrain.records import Record, unit_hash

STRATUM = "source"
"""Stratum of every record of a mixture: the name of the source that it is from."""


def turns(weights: Mapping[str, float], seed: int) -> Iterator[str]:
    """Whose record comes at each position, from 0 and without end: a pure function of weights, seed and position.

    Each position goes to the source that is furthest behind its share, so that after n draws none is more than the number
    of sources away from n times its share (two sources: less than one). Ties go by the seed.
    """
    total = sum(weights.values())
    order = sorted(weights, key=lambda name: unit_hash("mixture", seed, name))
    taken = dict.fromkeys(order, 0)
    for position in count(1):
        name = max(order, key=lambda one: weights[one] / total * position - taken[one])
        taken[name] += 1
        yield name


def interleaved(records: Sequence[Record], mixture: MixtureSource, seed: int) -> list[Record]:
    """All of the records, each once, by the mixture's weights; where a source is used up the others go on by theirs."""
    groups = _by_source(records)
    weights = {part.stratum: part.weight for part in mixture.sources if groups.get(part.stratum)}
    places = dict.fromkeys(weights, 0)
    found: list[Record] = []
    while weights:
        for name in turns(weights, seed):
            if places[name] == len(groups[name]):
                del weights[name]
                break
            found.append(groups[name][places[name]])
            places[name] += 1
    return found


def drawn(
    records: Sequence[Record], mixture: MixtureSource, seed: int, size: int | None = None, *, repeat: bool | None = None
) -> list[Record]:
    """At most `size` records by the mixture's weights, each source's in the order of `records`.

    Where a source has no record left when its turn comes, the draw stops, or with `repeat` (by default the mixture's own)
    it begins anew, until every source was drawn whole. Raises UserError for a source without any record.
    """
    repeat = mixture.exhausted == "repeat" if repeat is None else repeat
    groups = _by_source(records)
    for part in mixture.sources:
        if not groups.get(part.stratum):
            raise UserError(f"data.source: the mixture's source {part.stratum!r} has no record that can be drawn")
    taken: Counter[str] = Counter()
    found: list[Record] = []
    for name in turns({part.stratum: part.weight for part in mixture.sources}, seed):
        if size is not None and len(found) == size:
            break
        if not repeat and taken[name] == len(groups[name]):
            break
        if repeat and size is None and all(taken[one] >= len(group) for one, group in groups.items()):
            break
        found.append(groups[name][taken[name] % len(groups[name])])
        taken[name] += 1
    return found


def mixture_lines(pool: Sequence[Record], used: Sequence[Record], mixture: MixtureSource) -> list[str]:
    """A line for each source: its share of the records that are `used`, and how often each is, of those in the `pool`."""
    there, taken = (Counter(record.strata[STRATUM] for record in some) for some in (pool, used))
    lines = []
    for part in mixture.sources:
        held, count = there[part.stratum], taken[part.stratum]
        times = f"each {count / held:.3g} times" if count > held else f"of {held}"
        lines.append(f"train, {part.stratum}: {count} records ({count / max(len(used), 1):.1%}), {times}")
    ends = [part.stratum for part in mixture.sources if taken[part.stratum] >= there[part.stratum]]
    if ends and mixture.exhausted == "stop":
        lines.append(f"train ends where {' and '.join(ends)} is used up (exhausted: repeat goes on)")
    return lines


def _by_source(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.strata.get(STRATUM, ""), []).append(record)
    return groups
