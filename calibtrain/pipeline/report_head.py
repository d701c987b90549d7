"""The report's section on the confidence head: what it buys beside the likelihood with its calibrator, at equal promises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibtrain.abstention.certificate import Certificate, Certification
from calibtrain.calibration.intervals import Interval, paired_bootstrap, sample_ids, wilson
from calibtrain.calibration.ranking import auroc
from calibtrain.calibration.state import CalibrationState
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import FittedHead
from calibtrain.confidence.scorer import HEAD
from calibtrain.errors import UserError
from calibtrain.pipeline.calibration_file import Calibrated, read_calibration, served_source, source_folder
from calibtrain.pipeline.evaluate import measured_metrics
from calibtrain.pipeline.measurement import Measurement


@dataclass(frozen=True, slots=True)
class HeadCell:
    """What one source answers under its certificate: of the certified questions, and counted on the test questions."""

    certificate: Certificate | None
    answered: int = 0
    wrong: int = 0
    low: float = 0.0  # 95% interval (Wilson) of the wrong among the answered
    high: float = 0.0

    @property
    def coverage(self) -> float:
        """Share of the certification questions that it answers."""
        return 0.0 if self.certificate is None else self.certificate.coverage


@dataclass(frozen=True, slots=True)
class HeadReport:
    """The section. `pairs`: of a right and a wrong answer taken at random, how often the right one is the surer (AUROC)."""

    serves: bool
    calibrated: Calibrated  # of the head
    confidence: NDArray[np.float64]  # (n,) the head's, calibrated, of the test answers
    graded: int  # answers that it was solved on
    n: int  # test questions
    risk: float  # the promise that is asked for
    asked: (
        tuple[HeadCell, HeadCell] | None
    )  # likelihood and head at that promise alone; None where they promise other things
    rows: tuple[tuple[float, HeadCell, HeadCell], ...]  # allowed risk, likelihood, head; ascending; () as `asked`
    pairs: tuple[float, float]  # likelihood, head
    gain: Interval  # of pairs, on the same questions


def head_report(
    output_dir: Path, test: Measurement, likelihood: Calibrated, confidence: NDArray[np.float64], replicates: int = 400
) -> tuple[HeadReport | None, str]:
    """The section, from what the head told of the test answers, and why it cannot be shown; (None, "") without a head.

    confidence: the calibrated likelihood of the test answers.
    """
    if not (source_folder(output_dir, HEAD) / "calibration.json").is_file():
        return None, ""
    try:
        by_head = read_calibration(output_dir, source=HEAD)
        fitted = by_head.calibrator
        head = FittedHead.load(output_dir, Fingerprint(fitted.weights_hash, fitted.template_hash))
    except UserError as error:
        return None, str(error)
    if (scores := test.told_of(head)) is None:
        return None, "the test answers were given without it: run `calibtrain evaluate` with --output again"
    told, correct = fitted.apply(scores), test.correct
    ids = sample_ids([one.question_id for one in test.answers])

    def order(state: CalibrationState) -> dict[str, float]:
        return {"auroc": auroc(state)}

    pair = paired_bootstrap(order, (confidence, correct), (told, correct), ids, replicates=replicates)["auroc"]
    before, after = (measured_metrics(one, correct)["auroc"] for one in (confidence, told))

    def cells(one: Certification, two: Certification) -> tuple[HeadCell, HeadCell]:
        return _cell(one.certificate, confidence, correct), _cell(two.certificate, told, correct)

    risks = sorted(likelihood.curve.keys() & by_head.curve.keys())
    rows = tuple((risk, *cells(likelihood.curve[risk], by_head.curve[risk])) for risk in risks)
    asked = cells(likelihood.certification, by_head.certification)
    main = [one.certification.certificate for one in (likelihood, by_head)]
    risk = next((one.target_risk for one in reversed(main) if one is not None), 0.0)
    same = _comparable(likelihood, by_head)
    serves = served_source(output_dir) == HEAD
    return HeadReport(
        serves,
        by_head,
        told,
        head.n,
        len(correct),
        risk,
        asked if same else None,
        rows if same else (),
        (before, after),
        pair,
    ), ""


def _comparable(one: Calibrated, two: Calibrated) -> bool:
    """Whether two calibrations promise the same by the same graded answers: either may stay where nothing is certified."""
    both = (one, two)
    graded = [(found.scope, (found.audit or {}).get("audited")) for found in both]
    made = [certificate for found in both if (certificate := found.certification.certificate)]
    promises = {(certificate.target_risk, certificate.delta) for certificate in made}
    deltas = {found.certificate.delta for side in both for found in side.curve.values() if found.certificate}
    return graded[0] == graded[1] and len(promises) <= 1 and len(deltas) <= 1


def _cell(certificate: Certificate | None, confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> HeadCell:
    if certificate is None:
        return HeadCell(None)
    kept = confidence >= certificate.threshold
    answered, wrong = int(kept.sum()), int((kept & ~correct).sum())
    return HeadCell(certificate, answered, wrong, *wilson(wrong, answered))
