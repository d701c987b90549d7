"""The run's confidence head beside its likelihood: calibrated and certified on the same answers, and chosen between them.

What it told of each answer stands in the answers' files, so that nothing is answered for it again. Which of the two serves
where no source is named is decided on the questions that the head was solved on, by cross-validation: neither the answers
that certify nor the test questions have a part in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibtrain.calibration.calibrators import fit_calibrator
from calibtrain.calibration.intervals import sample_ids
from calibtrain.confidence.head import FOLDER, OUTSIDE, STEM, FittedHead
from calibtrain.confidence.scorer import HEAD
from calibtrain.confidence.source import Cost
from calibtrain.config import RunConfig
from calibtrain.pipeline.answer_parts import fit_answer_parts
from calibtrain.pipeline.audit import Audit
from calibtrain.pipeline.calibrate import certified_claims, keeps_earlier, show
from calibtrain.pipeline.calibration_file import (
    LIKELIHOOD,
    Calibrated,
    parts_hashes,
    source_folder,
    write_calibration,
)
from calibtrain.pipeline.measurement import Measurement

CLEARLY = 2.0
"""Standard errors by which a head must be better to serve where no source is named."""
FILES = (f"{FOLDER}/{STEM}.json", f"{FOLDER}/{STEM}.safetensors", f"{FOLDER}/{OUTSIDE}")
"""Of the run, what a head's calibration rests on."""


def serving(config: RunConfig, head: FittedHead | None) -> str:
    """The source of a run's confidence where none is named.

    The head, if the config lets it and cross-validation on its own questions found it clearly better than the likelihood.
    """
    section = config.confidence_head
    chosen = head is not None and head.gain > CLEARLY and section is not None and section.serves == "auto"
    return HEAD if chosen else LIKELIHOOD


def calibrate_head(
    config: RunConfig,
    output_dir: Path,
    head: FittedHead,
    measured: Mapping[str, Measurement],
    target_risk: float,
    delta: float,
    data_hashes: dict[str, str],
    facts: Mapping[str, Any],
    audit: Audit | None = None,
) -> Calibrated | None:
    """Fit Platt's map to what the head told and certify it; writes OUT/sources/head/calibration.json.

    measured: answers of `temperature` and `certification`, those of the latter marked where they are outside. facts: what
    calibration.json says of the detector and of the questions' shape. None where an answer has nothing told of it.
    """
    fit, held_out = measured["temperature"], measured["certification"]
    if fit.told is None or held_out.told is None:
        return None
    ids = sample_ids([one.question_id for one in fit.answers])
    calibrator = fit_calibrator("platt", fit.told, fit.correct, ids=ids, **asdict(head.fingerprint))
    found = certified_claims(
        config,
        calibrator,
        calibrator.apply(held_out.told),
        held_out.answers,
        target_risk,
        delta,
        parts=fit_answer_parts(fit.answers, **asdict(head.fingerprint)),
        audit=audit,
    )
    stays = keeps_earlier(output_dir, found, template_hash=head.fingerprint.template_hash, source=HEAD)
    path = source_folder(output_dir, HEAD) / "calibration.json"
    if not stays:
        parts = parts_hashes(output_dir, FILES) | facts.get("parts", {})
        cost = Cost.none(len(held_out.answers)).mean()
        told = {"source": HEAD, "members": [HEAD], "cost": cost, "parts": parts}
        write_calibration(path, found, config, data_hashes, {**facts, **told})
    serves = " It serves where no source is named." if facts.get("serves") == HEAD else ""
    show(found, path, written=not stays, note=f"so far by the confidence head.{serves}")
    return found
