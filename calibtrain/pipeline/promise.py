"""What a finished run promises, and of which questions: levels to choose from, with the words that a reply begins with.

Whatever is not certified is not answered, unless whoever runs the model allows it (`uncertified`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from calibtrain.abstention.certificate import Certificate, Certification
from calibtrain.abstention.claims import ClaimsCertificate
from calibtrain.abstention.strata import GroupRisk
from calibtrain.errors import UserError
from calibtrain.pipeline.calibration_file import Calibrated
from calibtrain.pipeline.scope import Scope, at_least, at_most, plain

NAMED = 3  # groups that break a promise, named in a reply
ELSEWHERE = "It cannot tell other questions from these, and of others nothing is promised."
TOLD = "Of other questions nothing is promised; it notices those of another kind, but not all that sound like these."
UNLIKE = "This question is unlike those that were graded, so nothing is certified for it."


@dataclass(frozen=True, slots=True)
class Level:
    """One promise that can be chosen: answering from `threshold` on, at most `risk` of the answers are wrong.

    Without a certificate nothing is promised (risk None), and nothing is answered (threshold infinite) unless whoever runs
    the model allows it (threshold 0).
    """

    threshold: float
    risk: float | None
    coverage: float  # share of the certification questions that it answers
    certificate: Certificate | None
    promise: str  # what is certified, and of which questions
    limit: str  # what is not
    group: str | None = None  # of the question, where it was named
    exceptions: tuple[GroupRisk, ...] = ()  # groups of the graded questions that break the promise
    claims: ClaimsCertificate | None = None  # where `threshold` is that of single claims, and the others are withheld
    silent: bool = False  # a certificate says nothing of the question: see `Promises.silent`

    @property
    def certified(self) -> bool:
        """Whether anything is promised."""
        return not self.silent and (self.certificate is not None or self.claims is not None)

    @property
    def answers(self) -> bool:
        """Whether it answers anything."""
        return math.isfinite(self.threshold)

    @property
    def reservation(self) -> str:
        """After a sentence of how sure it is: the groups that it may not be said of; "" without any."""
        if self.silent:
            return ", as measured on other questions"
        if self.group is not None and self.certificate is None:
            return ", over all groups together; nothing is certified for this one"
        if not self.exceptions:
            return ""
        first, more = self.exceptions[0], len(self.exceptions) - 1
        rest = f" (nor in {more} more)" if more else ""
        return f", over all groups together but not where {first.key} is {plain(first.value)}{rest}"


class Promises:
    """The levels of a calibrated run."""

    def __init__(self, calibrated: Calibrated, *, uncertified: bool = False) -> None:
        self.calibrated = calibrated
        self.uncertified = uncertified
        main = calibrated.certification
        self.elsewhere = TOLD if calibrated.outside else ELSEWHERE
        if calibrated.claim is not None:
            self.default = self._claims(calibrated.claim)
        else:
            self.default = self._certified(main) if main.certificate else self._unpromised()

    def levels(self) -> list[Level]:
        """Ascending in risk: nothing answered (without a certificate), the certified ones, all answered (where allowed)."""
        if self.calibrated.claim is not None:
            made = [one.certificate for one in self.calibrated.claims.values() if one.certificate]
            levels = [self._claims(one) for one in sorted(made, key=lambda one: one.target_risk)]
            return [*levels, *([self._unpromised()] if self.uncertified else [])]
        default = self.calibrated.certification.certificate
        found = [
            self._certified(one)
            for one in self.calibrated.curve.values()
            if one.certificate and (default is None or one.certificate.target_risk != default.target_risk)
        ]
        found += [self.default] if default else []
        certified = sorted(found, key=lambda one: one.certificate.target_risk if one.certificate else 0.0)
        nothing = [] if default or self.uncertified else [self.default]
        return [*nothing, *certified, *([self._unpromised()] if self.uncertified else [])]

    def silent(self, level: Level, why: str, *, answers: bool) -> Level:
        """What is left of a level for a question that no certificate covers: nothing is promised, and `why` is said first.

        It is answered from the level's threshold on where `answers`, or where whoever runs the model allows it.
        """
        scope = self.calibrated.scope
        limit = f"The certificate is for questions like {scope}; how often it is wrong elsewhere is not known."
        return replace(
            level,
            threshold=level.threshold if answers or self.uncertified else math.inf,
            risk=None,
            certificate=None,
            promise=why if level.certified else f"{level.promise} {why}",
            limit=limit if level.answers else level.limit,
            exceptions=(),
            silent=True,
        )

    @property
    def groups(self) -> dict[str, Level]:
        """Levels of the groups that were graded, certified or not; {} where nothing is certified by group."""
        groups = self.calibrated.groups
        return {} if groups is None else {name: self._group(name) for name in groups.groups}

    def level(self, risk: float | None = None, group: str | None = None) -> Level:
        """The level of this certified risk (default: the run's own) or of this group of questions.

        A group that was not graded, or has no certificate, is not answered. Raises UserError for a risk that is not
        certified, and for a group where nothing is certified by group.
        """
        if group is not None:
            return self._group_at(risk, group)
        if risk is None:
            return self.default
        certified = {
            promised.target_risk: one
            for one in self.levels()
            if (promised := one.claims or one.certificate) is not None
        }
        for target, one in certified.items():
            if math.isclose(target, risk):
                return one
        known = ", ".join(f"{target:g}" for target in certified) or "none"
        raise UserError(f"risk {risk:g} is not certified; certified are: {known}")

    def _group_at(self, risk: float | None, group: str) -> Level:
        if self.calibrated.groups is None:
            raise UserError("group: nothing is certified by group; run `calibtrain certify OUT --by STRATUM` first")
        level = self._group(group)
        if risk is not None and level.certificate and not math.isclose(level.certificate.target_risk, risk):
            raise UserError(f"risk {risk:g} is not certified by group; {level.certificate.target_risk:g} is")
        return level

    def _group(self, group: str) -> Level:
        groups = self.calibrated.groups
        assert groups is not None
        kind = f"{groups.by} {plain(group)}"
        found = groups.groups.get(group)
        if found is not None and found.certificate is not None:
            own = Scope(self.calibrated.scope.source, found.certificate.n)
            promise = _promise(found.certificate, f"questions of {kind} like {own}")
            return _of(found.certificate, promise, self.elsewhere, group)
        known = ", ".join(map(plain, groups.groups))
        why = found.reason if found else f"none was graded (graded: {known})"
        return Level(
            math.inf,
            None,
            0.0,
            None,
            f"No certificate for questions of {kind}: {why}.",
            "It answers none of them.",
            group,
        )

    def _certified(self, found: Certification) -> Level:
        certificate, groups = found.certificate, self.calibrated.groups
        assert certificate is not None
        limit = [self.elsewhere]
        if found.exceptions:
            limit.append(f"It does not hold in every group: {_broken(found.exceptions)}.")
        if groups is not None:
            limit.append(f"The certificates by {groups.by} are not applied: this question's {groups.by} was not named.")
        promise = _promise(certificate, f"questions like {self.calibrated.scope}")
        return _of(certificate, promise, " ".join(limit), exceptions=found.exceptions)

    def _claims(self, one: ClaimsCertificate) -> Level:
        """Claims are withheld one by one; certificates of whole answers are not applied."""
        promise = (
            f"Certified for questions like {self.calibrated.scope}: at least {at_least(1 - one.target_risk)} of the replies "
            "hold no wrong claim, on average over the choice of these questions; claims in doubt are withheld."
        )
        limit = f"{self.elsewhere} A reply of which nothing is left counts as one without a wrong claim."
        return Level(one.threshold, one.target_risk, one.share, None, promise, limit, claims=one)

    def _unpromised(self) -> Level:
        """Everything without a promise where that is allowed, else nothing."""
        main = self.calibrated.certification
        why = f"No certificate: {main.reason}." if main.certificate is None else "No certificate is applied."
        if self.uncertified:
            limit = "It answers everything, and how often it is wrong is not known."
            return Level(0.0, None, 1.0, None, why, limit)
        limit = "It answers nothing, unless whoever runs it allows answers without a certificate (--uncertified)."
        return Level(math.inf, None, 0.0, None, why, limit)


def _of(
    certificate: Certificate,
    promise: str,
    limit: str,
    group: str | None = None,
    exceptions: tuple[GroupRisk, ...] = (),
) -> Level:
    threshold, risk, coverage = certificate.threshold, certificate.risk_bound, certificate.coverage
    return Level(threshold, risk, coverage, certificate, promise, limit, group, exceptions)


def _promise(certificate: Certificate, questions: str) -> str:
    return (
        f"Certified for {questions}: at most {at_most(certificate.risk_bound)} of the answers given are wrong "
        f"({at_least(1 - certificate.delta)} confidence)."
    )


def _broken(exceptions: Sequence[GroupRisk]) -> str:
    """The groups that break a promise, as counts with their intervals."""
    told = [
        f"{one.key} {plain(one.value)}, {one.n_wrong} of {one.n_answered} answers wrong ({one.low:.0%} to {one.high:.0%})"
        for one in exceptions[:NAMED]
    ]
    more = len(exceptions) - NAMED
    return "; ".join([*told, *([f"and {more} more"] if more > 0 else [])])
