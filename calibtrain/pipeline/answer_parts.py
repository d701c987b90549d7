"""Answers made of parts: a calibrated chance for each, and what is promised of a reply whose doubtful parts are withheld."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibtrain.abstention.claims import ClaimsCertification, certify_claims
from calibtrain.calibration.intervals import sample_ids
from calibtrain.calibration.parts import PartCalibrators, fit_parts
from calibtrain.calibration.scores import Scores, scores_of
from calibtrain.confidence.answer import Answer, AnswerPart
from calibtrain.config import RunConfig
from calibtrain.pipeline.scope import at_least, plain
from calibtrain.tasks.kinds import task_of


def fit_answer_parts(answers: Sequence[Answer], template_hash: str, weights_hash: str) -> PartCalibrators | None:
    """Calibrators of the graded parts of answers that were used for nothing else; None where there are none."""
    graded = [(one.question_id, part) for one in answers for part in one.parts if part.correct is not None]
    if not graded:
        return None
    return fit_parts(
        [part.name for _, part in graded],
        _likelihood([part for _, part in graded]),
        [bool(part.correct) for _, part in graded],
        sample_ids(question for question, _ in graded),
        template_hash=template_hash,
        weights_hash=weights_hash,
    )


def part_probabilities(calibrators: PartCalibrators, answers: Sequence[Answer]) -> list[NDArray[np.float64]]:
    """Calibrated chances of each answer's parts, all at once."""
    parts = [part for one in answers for part in one.parts]
    flat = calibrators.apply([part.name for part in parts], _likelihood(parts))
    return np.split(flat, np.cumsum([len(one.parts) for one in answers])[:-1]) if answers else []


def _likelihood(parts: Sequence[AnswerPart]) -> Scores:
    return scores_of(logprob=[part.logprob for part in parts])


def certify_parts(
    config: RunConfig, calibrators: PartCalibrators | None, answers: Sequence[Answer], target_risk: float, delta: float
) -> dict[float, ClaimsCertification]:
    """By risk, the asked one first, what is promised where claims are withheld; {} for answers that cannot do without parts.

    answers: used for nothing else. A claim whose grade is not known counts as wrong. Each promise holds by itself.
    """
    if not task_of(config.task).drops_parts:
        return {}
    if calibrators is None:
        return {target_risk: ClaimsCertification(None, "no claim was graded to calibrate by")}
    probability = part_probabilities(calibrators, answers)
    right = [[part.correct is True for part in one.parts] for one in answers]
    risks = dict.fromkeys((target_risk, *config.abstention.report_risks))
    return {risk: certify_claims(probability, right, risk, delta) for risk in risks}


def told(calibrators: PartCalibrators | None, claims: dict[float, ClaimsCertification]) -> list[str]:
    """What was fitted and promised, in lines for a terminal."""
    lines = []
    if calibrators is not None:
        own = "".join(f"; {plain(name)} n={one.n}" for name, one in calibrators.fields.items())
        lines.append(f"parts: one calibrator for all, n={calibrators.pooled.n}{own}")
    for risk, found in list(claims.items())[:1]:
        one, sure = found.certificate, found.confident
        if one is None:
            lines.append(f"claims: nothing is promised: {found.reason}")
            continue
        lines.append(
            f"claims: keeping those at {one.threshold:.2f} and above, at least {at_least(1 - risk)} of replies hold no "
            f"wrong claim, on average over draws of the {one.n} graded ones; it keeps {one.share:.0%} of the claims"
        )
        if sure is not None and sure.delta is not None:
            lines.append(
                f"claims: keeping those at {sure.threshold:.2f} and above, the same holds with "
                f"{at_least(1 - sure.delta)} confidence; it keeps {sure.share:.0%} of the claims"
            )
    return lines
