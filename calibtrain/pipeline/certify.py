"""Certificates of a finished run refitted: another risk, other groups, or newly graded answers; the model is not run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import FittedHead
from calibtrain.config import RunConfig
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import outside
from calibtrain.pipeline.audit import audit_of
from calibtrain.pipeline.calibrate import certified_claims, show
from calibtrain.pipeline.calibration_file import (
    LIKELIHOOD,
    Calibrated,
    claims,
    file_hash,
    made_by,
    read_calibration,
    served_source,
    source_folder,
    write_json,
)
from calibtrain.pipeline.evaluate import Measurement, read_measurement
from calibtrain.pipeline.prepare import prepare


def run(
    output_dir: Path,
    *,
    risk: float | None = None,
    delta: float | None = None,
    by: str | None = None,
    hallucination: float | None = None,
    answers: Path | None = None,
) -> Calibrated:
    """Certify anew and put the outcome into calibration.json, whose other entries stay as they are.

    Where the run's confidence head serves, it is that which is certified.

    Nothing is written where something that was asked for cannot be certified; `failures` of what is returned says so.
    Defaults are the config's. Groups that were certified before are certified anew with the same risk, so that no group
    keeps an easier promise; a hallucination rate that is not asked for stays as it was. answers: graded answers that
    `calibtrain evaluate --output` wrote; by default those of the certification split. Raises UserError for answers of
    another model, and for those that trained it, fitted the calibrator, lack a grade, occur twice or lack the group.
    """
    config = load_config(output_dir / "config.yaml")
    source = served_source(output_dir)
    before = read_calibration(output_dir, source=source)
    path = output_dir / "answers" / "certification.jsonl" if answers is None else answers
    held_out = read_measurement(path)
    target = source_folder(output_dir, source) / "calibration.json"
    fitted_on = output_dir / "answers" / "temperature.jsonl"
    content = json.loads(target.read_text(encoding="utf-8"))
    if content.get("fitted_on", "unknown") != file_hash(fitted_on):
        raise UserError(
            f"{fitted_on}: not the answers that the calibrator was fitted on; run `calibtrain calibrate` again"
        )
    asked = _asked(config, before, risk, delta, by, hallucination)
    abstention = asked.abstention
    audit = audit_of(config, held_out.answers, output_dir)
    _check(held_out, path, fitted_on, abstention.groups, graded=audit is None)
    if held_out.made_by != made_by(before.calibrator.weights_hash, before.calibrator.template_hash):
        raise UserError(
            f"{path}: not known to be answers of this model and template; let it answer with `calibtrain evaluate "
            f"--model {output_dir / 'model'} --output FILE`, or calibrate again"
        )
    if answers is not None:
        _check_untrained(config, held_out, answers)
    file = None if answers is None else answers.name
    by_likelihood = source == LIKELIHOOD
    scores = held_out.scores(config.calibration.domain) if by_likelihood else _told(held_out, path, output_dir, before)
    confidence = before.calibrator.apply(scores)
    risk, delta = abstention.target_risk, abstention.delta
    found = certified_claims(
        asked, before.calibrator, confidence, held_out.answers, risk, delta, file, before.parts, audit
    )
    calibrated = replace(
        found,
        hallucination=before.hallucination if abstention.target_hallucination is None else found.hallucination,
    )
    # What rests on an audit that is another one now holds no longer, whatever takes its place.
    refuted = before.audit is not None and calibrated.audit != before.audit
    writes = refuted or not calibrated.failures
    if writes:
        content |= claims(calibrated)
        if answers is not None:
            content["data_hashes"]["certification"] = file_hash(answers)
            content |= outside.facts(
                None, f"it is certified on {answers.name}, without the hidden states of its questions"
            )
            content["parts"].pop(outside.FILE, None)
        write_json(target, content)
    show(calibrated, target, written=writes)
    return calibrated


def _told(held_out: Measurement, path: Path, output_dir: Path, before: Calibrated) -> NDArray[np.float64]:
    """What the run's confidence head told of these answers."""
    fitted = before.calibrator
    told = held_out.told_of(FittedHead.load(output_dir, Fingerprint(fitted.weights_hash, fitted.template_hash)))
    if told is None:
        raise UserError(
            f"{path}: the run answers by its confidence head, and these answers were given without it, or with another "
            "one; let the model answer with `calibtrain evaluate --output FILE`, or calibrate again"
        )
    return told


def _asked(
    config: RunConfig,
    before: Calibrated,
    risk: float | None,
    delta: float | None,
    by: str | None,
    hallucination: float | None,
) -> RunConfig:
    """The config with what the command names instead of its own, and the groups that were certified before."""
    if by is None and before.groups is not None:
        by = before.groups.by
    named = {"target_risk": risk, "delta": delta, "groups": by, "target_hallucination": hallucination}
    update = {name: value for name, value in named.items() if value is not None}
    return config.model_copy(update={"abstention": config.abstention.model_copy(update=update)})


def _check(held_out: Measurement, path: Path, fitted_on: Path, by: str | None, *, graded: bool) -> None:
    if not held_out.answers:
        raise UserError(f"{path}: no answers")
    fitted = {answer.question_id for answer in read_measurement(fitted_on).answers}
    seen: set[str] = set()
    for number, answer in enumerate(held_out.answers, start=1):
        if graded and answer.correct is None:
            raise UserError(f"{path}:{number}: `correct` is null; a certificate needs graded answers, leave others out")
        if answer.question_id in fitted:
            raise UserError(
                f"{path}:{number}: the calibrator was fitted on this question ({answer.question!r}); certify on others"
            )
        if answer.question_id in seen:
            raise UserError(f"{path}:{number}: this question ({answer.question!r}) occurs twice; each counts once")
        seen.add(answer.question_id)
        if by is not None and by not in answer.strata:
            known = ", ".join(sorted(answer.strata)) or "none"
            raise UserError(f"{path}:{number}: `strata` has no {by!r} to group by; it has: {known}")


def _check_untrained(config: RunConfig, held_out: Measurement, path: Path) -> None:
    """UserError for an answer to a question that the model, or its confidence head, has learned from."""
    prepared = prepare(config)
    trained = {record.id for split in ("train", "calibration") for record in prepared.splits[split]}
    trained |= {record.id for record in prepared.drops.spare}  # of which a confidence head is solved
    for number, answer in enumerate(held_out.answers, start=1):
        if answer.question_id in trained:
            raise UserError(
                f"{path}:{number}: the model was trained on this question ({answer.question!r}); certify on others"
            )
