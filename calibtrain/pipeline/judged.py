"""What is certified, and what is told, where a judge graded: nothing is promised by its word alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibtrain.abstention.certificate import Certification
from calibtrain.abstention.judged import certify_judged
from calibtrain.calibration.calibrators import Calibrator
from calibtrain.calibration.prediction_powered import agreement, corrected, ppi_mean
from calibtrain.confidence.answer import Answer
from calibtrain.config import RunConfig
from calibtrain.pipeline.audit import FILE, Audit, matched, read_audit
from calibtrain.pipeline.calibration_file import Calibrated
from calibtrain.pipeline.measurement import Measurement, read_measurement
from calibtrain.pipeline.scope import scope_of


def judged_claims(
    config: RunConfig,
    calibrator: Calibrator,
    confidence: NDArray[np.float64],
    answers: Sequence[Answer],
    target_risk: float,
    delta: float,
    file: str | None,
    audit: Audit,
) -> Calibrated:
    """What the config asks to certify, on answers that a judge graded and a person audited in part.

    An unread verdict counts as wrong. Hallucination rates and groups are not certified: failures say so.
    """
    judged = np.array([bool(answer.correct) for answer in answers])

    def certified(risk: float, share: float) -> Certification:
        if audit.problem:
            return Certification(None, audit.problem)
        return certify_judged(confidence, judged, audit.grades, risk, share)

    main, risks = certified(target_risk, delta), config.abstention.report_risks
    failures = [f"no certificate: {main.reason}"] if main.certificate is None else []
    if config.abstention.target_hallucination is not None:
        failures.append("no hallucination certificate: the grades are a judge's, and it would rest on these alone")
    if config.abstention.groups is not None:
        failures.append(
            f"no certificate by {config.abstention.groups}: the grades are a judge's, audited over all groups"
        )
    return Calibrated(
        calibrator,
        main,
        {risk: certified(risk, delta / len(risks)) for risk in risks},
        scope_of(config, answers, file),
        failures=tuple(failures),
        audit=audit_facts(confidence, answers, audit, None if main.certificate is None else main.certificate.threshold),
    )


def audit_facts(
    confidence: NDArray[np.float64], answers: Sequence[Answer], audit: Audit, threshold: float | None = None
) -> dict[str, Any]:
    """Agreement of judge and person, and what the audit makes of the judge's means, for calibration.json and the report."""
    judged, has = np.array([bool(answer.correct) for answer in answers]), ~np.isnan(audit.grades)
    return {
        "answers": len(answers),
        "audited": int(has.sum()),
        "unread": sum(answer.correct is None for answer in answers),
        "problem": audit.problem,
        "digest": audit.digest,
        "agreement": agreement(audit.grades[has], judged[has]).as_dict(),
        "corrected": corrected(confidence, judged, audit.grades, threshold),
    }


def audit_lines(facts: Mapping[str, Any]) -> list[str]:
    """The same in plain words, a line each."""
    unread = f", {facts['unread']} of them without a verdict" if facts["unread"] else ""
    lines = [f"graded by a judge: {facts['answers']} answers{unread}; {facts['audited']} of them audited by a person"]
    if not facts["audited"]:
        return lines
    found, means = facts["agreement"], facts["corrected"]
    kappa = "" if found["kappa"] is None else f", kappa {found['kappa']:.2f}"
    lines += [
        f"judge and person agree on {_told(found['accuracy'])} of these{kappa}",
        f"the judge calls {_told(found['sensitivity'])} of the right answers right, and {_told(found['specificity'])} of "
        "the wrong ones wrong",
        f"right are {means['judged_accuracy']:.0%} by the judge, {_told(means['accuracy'])} corrected by the audit",
    ]
    if "risk" in means:
        lines.append(f"wrong among the answered: {_told(means['risk'])} corrected by the audit")
    return lines


def _told(one: Mapping[str, float | None]) -> str:
    """A share with its interval."""
    if one["estimate"] is None:
        return "an unknown share"
    return f"{one['estimate']:.0%} ({one['low']:.0%} to {one['high']:.0%})"


def corrected_line(measurement: Measurement, model: Path | None) -> str:
    """What an audit of the run that `model` is of makes of the judge's grades of other answers by the same model."""
    plain = "graded by a judge, who may be wrong"
    if model is None or not (model.parent / FILE).is_file():
        return f"{plain}; nothing measures how often"
    held_out = read_measurement(model.parent / "answers" / "certification.jsonl")
    audit = matched(read_audit(model.parent / FILE), held_out.answers, model.parent)
    if audit.problem or held_out.made_by is None or held_out.made_by != measurement.made_by:
        return f"{plain}; {audit.problem or 'its audit is of another model'}"
    has, judged = ~np.isnan(audit.grades), held_out.correct
    found = ppi_mean(audit.grades[has], judged[has], measurement.correct, careful=True)
    low, high = max(found.low, 0.0), min(found.high, 1.0)
    return f"{plain}; accuracy corrected by {has.sum()} audited answers: {found.estimate:.1%} ({low:.1%} to {high:.1%})"
