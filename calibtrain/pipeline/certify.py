"""Certificates of a finished run refitted: another risk, other groups, or newly graded answers; the model is not run."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibtrain.confidence.answer import Answer
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import FittedHead
from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.pipeline import outside
from calibtrain.pipeline.audit import Audit, audit_of
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
from calibtrain.pipeline.kept import RENEWED, kept_sources, withdraw
from calibtrain.pipeline.measurement import Measurement, read_measurement
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.pipeline.prepare import prepare
from calibtrain.pipeline.scope import at_most

KEPT, GIVEN = "answers/certification.jsonl", "answers/certified-{}.jsonl"
"""What the calibration kept, and a copy of what a source was last certified by instead: its certificate rests on these."""
LEARNED_FROM = ("train", "validation", "calibration", "examples")
"""Splits by which nothing is certified."""


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

    So it does for the run's likelihood and for its confidence head, where each is calibrated; what is returned is that of
    the one that serves. Of the other sources it withdraws what an audit has refuted.

    Nothing is written of a source where something that was asked for cannot be certified, unless what its certificate
    rests on has changed; `failures` of what is returned says so.
    Defaults are the config's. Groups that were certified before are certified anew with the same risk, so that no group
    keeps an easier promise; a hallucination rate that is not asked for stays as it was. answers: graded answers that
    `calibtrain evaluate --output` wrote; by default those of the certification split. Raises UserError for answers of
    another model, and for those that trained it, fitted the calibrator, lack a grade, occur twice or lack the group.
    """
    config = config_of_run(output_dir)
    serves = served_source(output_dir)
    path = output_dir / KEPT if answers is None else answers
    held_out = HeldOut(path, read_measurement(path), given=answers is not None)
    before = read_calibration(output_dir, source=serves)
    _check_fitted_on(output_dir, serves)
    asked = _asked(config, before, risk, delta, by, hallucination)
    audit = audit_of(config, held_out.found.answers, output_dir)
    _check(held_out.found, path, _fitted_on(output_dir), asked.abstention.groups, graded=audit is None)
    if held_out.found.made_by != made_by(before.calibrator.weights_hash, before.calibrator.template_hash):
        raise UserError(
            f"{path}: not known to be answers of this model and template; let it answer with `calibtrain evaluate "
            f"--model {output_dir / 'model'} --output FILE`, or calibrate again"
        )
    if answers is not None:
        _check_untrained(config, held_out.found, answers)
    renewed = _renew(output_dir, serves, before, asked, held_out, audit)
    written = [serves] if renewed.written else []
    show(renewed.calibrated, renewed.target, written=renewed.written)
    for source in RENEWED:
        if source != serves and source in kept_sources(output_dir):
            try:
                other = read_calibration(output_dir, source=source)
                _check_fitted_on(output_dir, source)
                own = _asked(config, other, risk, delta, by, hallucination)
                beside = _renew(output_dir, source, other, own, held_out, audit)
            except UserError as error:
                print(f"not certified anew: {error}")
                continue
            written += [source] if beside.written else []
            print(f"beside it, {_outcome(source, beside)}")
    withdraw(output_dir, [source for source in kept_sources(output_dir) if source not in written])
    return renewed.calibrated


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Graded answers to certify by."""

    path: Path
    found: Measurement
    given: bool  # named by the command; else those that the calibration kept


@dataclass(frozen=True, slots=True)
class Renewed:
    """What was certified of one source, and whether it stands in its calibration.json now."""

    calibrated: Calibrated
    target: Path
    written: bool


def _renew(
    output_dir: Path, source: str, before: Calibrated, asked: RunConfig, held_out: HeldOut, audit: Audit | None
) -> Renewed:
    """Certify one source by what the answers' file holds of it, and write it unless an earlier certificate still holds."""
    target = source_folder(output_dir, source) / "calibration.json"
    content = json.loads(target.read_text(encoding="utf-8"))
    path, found = held_out.path, held_out.found
    scores = found.scores(asked.calibration.domain) if source == LIKELIHOOD else _told(found, path, output_dir, before)
    abstention, file = asked.abstention, path.name if held_out.given else None
    risk, delta = abstention.target_risk, abstention.delta
    confidence = before.calibrator.apply(scores)
    made = certified_claims(asked, before.calibrator, confidence, found.answers, risk, delta, file, before.parts, audit)
    calibrated = replace(
        made,
        hallucination=before.hallucination if abstention.target_hallucination is None else made.hallucination,
    )
    # What rests on an audit, or on grades, that are others now holds no longer, whatever takes its place.
    audited = before.audit is not None and calibrated.audit != before.audit
    certified_on = content.get("certified_on", "")
    copy = output_dir / GIVEN.format(source)
    if held_out.given:
        changed = _regrades(found, copy if not certified_on and copy.is_file() else output_dir / KEPT)
    else:
        changed = audited or certified_on not in ("", file_hash(path))
    written = not calibrated.failures or changed
    if written:
        content |= claims(calibrated) | {"certified_on": "" if held_out.given else file_hash(path)}
        if held_out.given:
            content["data_hashes"]["certification"] = file_hash(path)
            why = f"it is certified on {path.name}, without the hidden states of its questions"
            content |= outside.facts(None, why)
            content["parts"].pop(outside.FILE, None)
            if path.resolve() != copy.resolve():
                shutil.copyfile(path, copy)
        write_json(target, content)
    return Renewed(calibrated, target, written)


def _outcome(source: str, one: Renewed) -> str:
    """The other source's certificate in a line."""
    found = one.calibrated.certification.certificate
    said = one.calibrated.failures[0] if one.calibrated.failures else "certified by its claims"
    if found is not None:
        said = f"certified: at {found.threshold:.2f} and above, at most {at_most(found.risk_bound)} wrong"
    return f"--source {source}: {said}; {'written: ' if one.written else 'it stays as it was: '}{one.target}"


def _fitted_on(output_dir: Path) -> Path:
    return output_dir / "answers" / "temperature.jsonl"


def _check_fitted_on(output_dir: Path, source: str) -> None:
    """UserError where the questions that fitted the calibrator are not known."""
    content = json.loads((source_folder(output_dir, source) / "calibration.json").read_text(encoding="utf-8"))
    if content.get("fitted_on", "unknown") != file_hash(_fitted_on(output_dir)):
        raise UserError(
            f"{_fitted_on(output_dir)}: not the answers that the calibrator was fitted on; run `calibtrain calibrate` again"
        )


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
    fitted = {name for answer in read_measurement(fitted_on).answers for name in _names(answer)}
    seen: set[str] = set()
    for number, answer in enumerate(held_out.answers, start=1):
        if graded and answer.correct is None:
            raise UserError(f"{path}:{number}: `correct` is null; a certificate needs graded answers, leave others out")
        if not fitted.isdisjoint(_names(answer)):
            raise UserError(
                f"{path}:{number}: the calibrator was fitted on this question ({answer.question!r}); certify on others"
            )
        if not seen.isdisjoint(_names(answer)):
            raise UserError(f"{path}:{number}: this question ({answer.question!r}) occurs twice; each counts once")
        seen |= _names(answer)
        if by is not None and by not in answer.strata:
            known = ", ".join(sorted(answer.strata)) or "none"
            raise UserError(f"{path}:{number}: `strata` has no {by!r} to group by; it has: {known}")


def _regrades(found: Measurement, kept: Path) -> bool:
    """Whether an answer of that file is graded otherwise here."""
    if not kept.is_file():
        return False
    grades = {(one.question_id, one.text): one.correct for one in read_measurement(kept).answers}
    return any(grades.get((one.question_id, one.text), one.correct) != one.correct for one in found.answers)


def _check_untrained(config: RunConfig, held_out: Measurement, path: Path) -> None:
    """UserError for an answer to a question that the model, or its confidence head, has learned from."""
    prepared = prepare(config)
    # What a validation chose the best weights by has had a part in them; of the spare ones a confidence head is solved.
    learned = [record for split in LEARNED_FROM for record in prepared.splits.get(split, ())] + [*prepared.drops.spare]
    trained = {name for record in learned for name in (record.id, *record.taught)}
    for number, answer in enumerate(held_out.answers, start=1):
        if not trained.isdisjoint(_names(answer)):
            raise UserError(
                f"{path}:{number}: the model was trained on this question ({answer.question!r}); certify on others"
            )


def _names(answer: Answer) -> set[str]:
    """What a question is known again by: its id, and what was asked, which is the same under another id.

    Files of earlier versions hold the id alone.
    """
    return {answer.question_id, *([answer.asked] if answer.asked else [])}
