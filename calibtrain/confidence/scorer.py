"""One source of confidence as it is put to work: the same scores in service as those that its calibrator was fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibtrain.confidence.answered import Answered
from calibtrain.confidence.ensemble import Ensemble
from calibtrain.confidence.features import POSITIONS, Fingerprint, features_of
from calibtrain.confidence.head import FittedHead
from calibtrain.confidence.probe import Probe
from calibtrain.confidence.source import Asker, Cost, SourceScores
from calibtrain.confidence.sources import SOURCES, cost_of, score
from calibtrain.errors import UserError
from calibtrain.records import Record

PROBES = ("probe", "p_ik")
"""Sources that are probes: of any position, and of the question's last token alone, which knows no answer: P(IK)."""
HEAD = "head"
"""The confidence head of the run (`confidence_head:` in its config)."""
ENSEMBLE = "ensemble"
EVERY = (*SOURCES, *PROBES, HEAD)
"""Sources that an ensemble may have."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores answers by the source `name`: one of EVERY, or an ensemble. UserError for another, and a probe not given."""

    name: str
    fingerprint: Fingerprint
    probes: Mapping[str, Probe] = field(default_factory=dict)
    ensemble: Ensemble | None = None
    head: FittedHead | None = None

    def __post_init__(self) -> None:
        for name in self.members:
            if name not in EVERY:
                raise UserError(f"confidence source: {name!r} is none of {', '.join((*EVERY, ENSEMBLE))}")
            if name in PROBES and name not in self.probes:
                raise UserError(f"confidence source: {name} is not fitted; run `calibtrain probe` first")
            if name == HEAD and self.head is None:
                raise UserError("confidence source: the run has no head; train with a `confidence_head:` section")

    @property
    def members(self) -> tuple[str, ...]:
        """The sources that it reads."""
        return (self.name,) if self.ensemble is None else self.ensemble.sources

    @property
    def layers(self) -> tuple[int, ...]:
        """Whose states must come with the answers that it scores."""
        return self.head.layers if self.head is not None and HEAD in self.members else ()

    def score(self, asker: Asker, records: Sequence[Record], answered: Answered) -> SourceScores:
        """Scores of the answers to `records`, with all that they cost beside the answer."""
        found = member_scores(asker, records, answered, self.members, self.probes, self.fingerprint, self.head)
        if self.ensemble is None:
            return found[self.name]
        values = self.ensemble.score({name: one.values for name, one in found.items()})
        return SourceScores(values, cost_of(found), True)


def member_scores(
    asker: Asker,
    records: Sequence[Record],
    answered: Answered,
    names: Sequence[str],
    probes: Mapping[str, Probe],
    fingerprint: Fingerprint,
    head: FittedHead | None = None,
) -> dict[str, SourceScores]:
    """Scores by each source; all probes share one forward pass, and a head needs none."""
    plain = [name for name in names if name in SOURCES]
    found = score(asker, records, answered, plain) if plain else {}
    found |= {HEAD: head.score(answered)} if head is not None and HEAD in names else {}
    texts = [answer.said for answer in answered.answers]
    wanted = {name: probes[name] for name in names if name in PROBES}
    return {**found, **probe_scores(asker, records, texts, wanted, fingerprint)}


def probe_scores(
    asker: Asker, records: Sequence[Record], texts: Sequence[str], probes: Mapping[str, Probe], fingerprint: Fingerprint
) -> dict[str, SourceScores]:
    """Scores by each probe of the replies `texts`, from one forward pass without examples before the question."""
    if not probes:
        return {}
    features = features_of(
        asker.module,
        asker.template,
        records,
        texts,
        layers=tuple(sorted({probe.layer for probe in probes.values()})),
        fingerprint=fingerprint,
        device=asker.device,
        batch_size=asker.settings.batch_size,
    )
    cost = Cost(np.ones(len(texts)), features.tokens.astype(np.float64))
    return {name: SourceScores(probe.score(features), cost, True) for name, probe in probes.items()}


def before_answering(asker: Asker, records: Sequence[Record], probe: Probe, fingerprint: Fingerprint) -> SourceScores:
    """P(IK) of questions, by a probe of their last token, without any answer. UserError for a probe that reads one."""
    if probe.position != POSITIONS[0]:
        raise UserError(f"p_ik: the probe reads {probe.position}, which needs an answer; run `calibtrain probe` again")
    return probe_scores(asker, records, [""] * len(records), {"p_ik": probe}, fingerprint)["p_ik"]
