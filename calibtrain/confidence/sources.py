"""Every source by name; those of one family share their work. A probe and an ensemble are fitted first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calibtrain.confidence.answered import Answered
from calibtrain.confidence.asked import p_true, second_pass, stated
from calibtrain.confidence.chain import chains
from calibtrain.confidence.sampling import sampled
from calibtrain.confidence.source import Asker, Cost, Family, SourceScores
from calibtrain.confidence.spread import likelihoods
from calibtrain.errors import UserError
from calibtrain.records import Record

FAMILIES: dict[tuple[str, ...], Family] = {
    (
        "likelihood",
        "likelihood_mean",
        "likelihood_min",
        "likelihood_margin",
        "likelihood_entropy",
    ): likelihoods,
    ("likelihood_chain", "likelihood_chain_mean"): chains,
    ("p_true",): p_true,
    ("stated_number", "stated_word"): stated,
    ("second_pass", "second_pass_bare"): second_pass,
    ("self_consistency", "semantic_entropy", "semantic_entropy_counts"): sampled,
}
"""Names of the sources -> the function that scores them all. A new family is one line here."""

APART = {"stated_number", "stated_word", "second_pass", "second_pass_bare", "head"}
"""Of their families, those that are asked on their own: they share code, not work. A confidence head costs nothing."""

SOURCES = tuple(name for names in FAMILIES for name in names)


def families_of(names: Sequence[str]) -> dict[tuple[str, ...], Family]:
    """The families that give these sources; UserError for an unknown one."""
    for name in names:
        if name not in SOURCES:
            raise UserError(f"confidence source: {name!r} is none of {', '.join(SOURCES)}")
    return {members: family for members, family in FAMILIES.items() if set(members) & set(names)}


def score(
    asker: Asker, records: Sequence[Record], answered: Answered, names: Sequence[str] = SOURCES
) -> dict[str, SourceScores]:
    """Scores of the answers to `records` by these sources, in their order."""
    found: dict[str, SourceScores] = {}
    for family in families_of(names).values():
        found.update(family(asker, records, answered))
    return {name: found[name] for name in names}


def cost_of(scores: Mapping[str, SourceScores]) -> Cost:
    """Cost of several sources together: those of one family share their work, and all probes one forward pass."""
    total = Cost.none(len(next(iter(scores.values())).values))
    shared: set[tuple[str, ...]] = set()
    for name, one in scores.items():
        members = (name,) if name in APART else next((own for own in FAMILIES if name in own), ("probe",))
        if members not in shared:
            shared.add(members)
            total = total.plus(one.cost)
    return total
