"""Calibration of a trained model: a calibrator and certified thresholds, each on questions used for nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibtrain.abstention.certificate import Certification, certified_curve, certify
from calibtrain.abstention.groups import GroupCertification, certify_groups
from calibtrain.abstention.hallucination import control_hallucinations
from calibtrain.abstention.prediction_sets import PredictionSets, fit_prediction_sets
from calibtrain.abstention.strata import group_risks
from calibtrain.calibration.calibrators import Calibrator, fit_calibrator
from calibtrain.calibration.intervals import sample_ids
from calibtrain.calibration.parts import PartCalibrators
from calibtrain.calibration.unlabelled import fit_base_alignment
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import FittedHead
from calibtrain.confidence.outside import Outside
from calibtrain.confidence.scorer import HEAD
from calibtrain.config import RunConfig
from calibtrain.data.summary import data_hash
from calibtrain.errors import UserError
from calibtrain.pipeline import answer_parts, outside
from calibtrain.pipeline.audit import FILE as AUDIT_FILE
from calibtrain.pipeline.audit import Audit, audit_of, matched, read_audit
from calibtrain.pipeline.calibration_file import (
    LIKELIHOOD,
    Calibrated,
    file_hash,
    made_by,
    read_calibration,
    served_source,
    weights_hash,
    write_calibration,
)
from calibtrain.pipeline.evaluate import Loaded, head_beside, measured_again, with_progress
from calibtrain.pipeline.judged import audit_lines, judged_claims
from calibtrain.pipeline.kept import kept_sources, refuted, withdraw
from calibtrain.pipeline.measurement import Measurement, move_measurement, read_measurement, write_measurement
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.pipeline.prepare import prepare
from calibtrain.pipeline.question import shapes_of
from calibtrain.pipeline.scope import at_most, plain, scope_of
from calibtrain.records import Record
from calibtrain.tasks.kinds import task_of

SPLITS = ("temperature", "certification")
"""The first fits the calibrator, the second certifies; each is used for nothing else."""


def run(output_dir: Path, *, target_risk: float | None = None, delta: float | None = None) -> Calibrated:
    """Fit and certify the model of a finished run; writes calibration.json and the graded answers it rests on.

    Where nothing can be certified, a calibration that holds and has a certificate stays as it is, with its answers; else
    the new one is written without a certificate, by which nothing is answered. `failures` of what is returned says so.

    The run's confidence head, where it has one, is calibrated and certified on the same answers: OUT/sources/head/. The
    failures are then those of whichever of the two serves.
    """
    from calibtrain.pipeline.head_calibration import calibrate_head, serving  # which certifies by this module

    config = config_of_run(output_dir)
    model = output_dir / "model"
    if not (model / "config.json").is_file():
        raise UserError(f"{output_dir}: no exported model (model/config.json); train first")
    prepared = prepare(config)
    check_strata(config, prepared.splits)
    loaded = Loaded(config, model)
    hashes = (loaded.template.hash, weights_hash(model))
    answers, measured = output_dir / "answers", {}
    loaded.head = head = head_beside(model, loaded.template)
    read_audit(output_dir / AUDIT_FILE)  # a mistake in it is told before anything is answered
    mark = made_by(hashes[1], hashes[0])
    for split in SPLITS:
        measured[split] = measured_again(loaded, prepared.splits[split], answers / f"{split}.new.jsonl", mark, split)
    detector, why = detector_of(config, {split: one.states for split, one in measured.items()}, *hashes)
    if detector is not None:
        measured["certification"] = outside.marked(measured["certification"], detector)
        write_measurement(measured["certification"], answers / "certification.new.jsonl", mark)
    fitting = measured["temperature"]
    if config.calibration.method == "base_alignment":
        base = with_progress(Loaded(config), prepared.splits["temperature"], prepared.shots, "answering with the base")
        calibrator = align(fitting, base, *hashes)
    else:
        calibrator = fit(config, fitting, *hashes)
    certificate_risk = config.abstention.target_risk if target_risk is None else target_risk
    certificate_delta = config.abstention.delta if delta is None else delta
    parts = answer_parts.fit_answer_parts(fitting.answers, *hashes)
    held_out = measured["certification"]
    audit = audit_of(config, held_out.answers, output_dir)
    calibrated = certified(config, calibrator, held_out, certificate_risk, certificate_delta, parts=parts, audit=audit)
    stays = keeps_earlier(output_dir, calibrated, template_hash=hashes[0])
    facts = {
        "fitted_on": file_hash(answers / "temperature.new.jsonl"),
        "certified_on": file_hash(answers / "certification.new.jsonl"),
        "shapes": shapes_of(prepared.splits["certification"]).as_dict(),
        **outside.facts(detector, why),
        "serves": serving(config, head),
    }
    for split in SPLITS:
        move_measurement(answers / f"{split}.new.jsonl", None if stays else answers / f"{split}.jsonl")
    data_hashes = {split: data_hash(prepared.splits[split]) for split in measured}
    if not stays:
        facts["parts"] = outside.write(detector, output_dir)
        write_calibration(output_dir / "calibration.json", calibrated, config, data_hashes, facts)
    show(calibrated, output_dir / "calibration.json", written=not stays, note=outside.told(detector, why))
    by_head = None
    if head is not None:
        if stays:
            measured, facts, audit = _kept(config, output_dir, head, facts)
        by_head = calibrate_head(
            config, output_dir, head, measured, certificate_risk, certificate_delta, data_hashes, facts, audit
        )
        if by_head is None:
            print("the confidence head is not certified: the answers that stay were given without this head")
    written = [*([] if stays else [LIKELIHOOD]), *([] if by_head is None else [HEAD])]
    withdraw(output_dir, [source for source in kept_sources(output_dir) if source not in written])
    return replace(calibrated, failures=by_head.failures) if by_head and facts["serves"] == HEAD else calibrated


def _kept(
    config: RunConfig, output_dir: Path, head: FittedHead, facts: Mapping[str, Any]
) -> tuple[dict[str, Measurement], dict[str, Any], Audit | None]:
    """For a head beside a likelihood whose calibration stays: the answers that stay with it, its facts, and their audit."""
    content = json.loads((output_dir / "calibration.json").read_text(encoding="utf-8"))
    own = {key: content[key] for key in ("fitted_on", "certified_on", "shapes", "outside", "parts") if key in content}
    found = {split: read_measurement(output_dir / "answers" / f"{split}.jsonl") for split in SPLITS}
    found = {split: replace(one, told=one.told_of(head)) for split, one in found.items()}
    audit = audit_of(config, found["certification"].answers, output_dir)
    return found, {**facts, **own, "serves": served_source(output_dir)}, audit


def detector_of(
    config: RunConfig, states: Mapping[str, NDArray[np.float32] | None], template_hash: str, model_hash: str
) -> tuple[Outside | None, str]:
    """The detector of questions unlike the graded ones, where the config wants one; else None and why."""
    if config.abstention.outside == "ignore":
        return None, "abstention.outside: ignore"
    return outside.fit(states, Fingerprint(model_hash, template_hash))


def check_strata(config: RunConfig, splits: Mapping[str, Sequence[Record]]) -> None:
    """UserError, before anything is answered, for a split without questions and for a stratum that no question has."""
    for split in SPLITS:
        records = splits[split]
        if not records:
            raise UserError(f"data.splits.{split}: 0 questions; calibration needs some")
        known = sorted({key for record in records for key in record.strata})
        for key, name in (
            ("abstention.groups", config.abstention.groups),
            ("calibration.domain", config.calibration.domain),
        ):
            if name is not None and name not in known:
                raise UserError(
                    f"{key}: no question has the stratum {name!r}; strata are: {', '.join(known) or 'none'}"
                )


def keeps_earlier(
    output_dir: Path, calibrated: Calibrated, *, template_hash: str | None = None, source: str | None = None
) -> bool:
    """Whether this calibration has no certificate, where the one on disk has one and still holds, by the audit of now."""
    if calibrated.promised:
        return False
    try:
        before = read_calibration(output_dir, template_hash=template_hash, source=source)
    except UserError:
        return False
    return before.promised and not refuted(output_dir, before)


def fit(config: RunConfig, measurement: Measurement, template_hash: str, model_hash: str) -> Calibrator:
    """The config's calibrator on graded answers, its intervals from resampling questions."""
    return fit_calibrator(
        config.calibration.method,
        measurement.scores(config.calibration.domain),
        measurement.correct,
        template_hash=template_hash,
        weights_hash=model_hash,
        ids=sample_ids([answer.question_id for answer in measurement.answers]),
    )


def align(measurement: Measurement, base: Measurement, template_hash: str, model_hash: str) -> Calibrator:
    """Temperature that makes the model as sure as the one it started from, where both answer alike; grades stay unread."""
    pairs = zip(measurement.answers, base.answers, strict=True)
    return fit_base_alignment(
        measurement.scores(),
        base.confidence,
        [ours.meaning == theirs.meaning for ours, theirs in pairs],
        template_hash=template_hash,
        weights_hash=model_hash,
        ids=sample_ids([answer.question_id for answer in measurement.answers]),
    )


def certified(
    config: RunConfig,
    calibrator: Calibrator,
    held_out: Measurement,
    target_risk: float,
    delta: float,
    file: str | None = None,
    parts: PartCalibrators | None = None,
    audit: Audit | None = None,
) -> Calibrated:
    """What the config asks to certify, on graded answers used for nothing else. Each claim holds at its own delta.

    file: name of the answers, where they are not those of the config's certification split. parts: what the chances of
    their parts are told by. audit: of answers that a judge graded, without which nothing is certified by these.
    """
    confidence = calibrator.apply(held_out.scores(config.calibration.domain))
    return certified_claims(config, calibrator, confidence, held_out.answers, target_risk, delta, file, parts, audit)


def certified_claims(
    config: RunConfig,
    calibrator: Calibrator,
    confidence: NDArray[np.float64],
    answers: Sequence[Answer],
    target_risk: float,
    delta: float,
    file: str | None = None,
    parts: PartCalibrators | None = None,
    audit: Audit | None = None,
) -> Calibrated:
    """The same for calibrated confidences (N,) of any source."""
    # Grades of a judge alone are audited, if by nobody yet.
    audit = (audit or matched(None, answers, config.output_dir)) if task_of(config.task).judged else None
    if config.abstention.outside == "abstain":
        kept = outside.inside(answers)
        confidence, answers = confidence[kept], [answers[place] for place in kept]
        audit = audit and replace(audit, grades=audit.grades[kept])  # of a random sample what is inside is random too
    if audit is not None:
        return judged_claims(config, calibrator, confidence, answers, target_risk, delta, file, audit)
    correct = np.array([bool(answer.correct) for answer in answers])
    strata = [answer.strata for answer in answers]
    rate, by = config.abstention.target_hallucination, config.abstention.groups

    def with_exceptions(found: Certification) -> Certification:
        one = found.certificate
        if one is None:
            return found
        risks = group_risks(confidence, correct, strata, one.threshold, one.risk_bound)
        return replace(found, exceptions=tuple(risk for risk in risks if risk.breaks))

    main = certify(confidence, correct, target_risk, delta)
    curve = certified_curve(confidence, correct, config.abstention.report_risks, delta)
    hallucination = None if rate is None else control_hallucinations(confidence, correct, rate)
    groups = None if by is None else _by_group(confidence, correct, strata, by, target_risk, delta)
    claims = answer_parts.certify_parts(config, parts, answers, target_risk, delta)
    # Where claims can be withheld one by one, it is by them that replies are given.
    first = next(iter(claims.values()), main)
    nothing = main.certificate is None and first.certificate is None
    failures = [f"no certificate: {first.reason}"] if nothing else []
    if rate is not None and hallucination is None:
        failures.append(
            f"no hallucination certificate: {len(answers)} graded answers are too few for a rate of {rate:g}"
        )
    if groups is not None and not any(one.certificate for one in groups.groups.values()):
        failures.append(f"no certificate by {by}: none of the groups could be certified")
    return Calibrated(
        calibrator,
        with_exceptions(main),
        {risk: with_exceptions(found) for risk, found in curve.items()},
        scope_of(config, answers, file),
        hallucination,
        groups,
        prediction_sets=_prediction_sets(config, answers),
        failures=tuple(failures),
        parts=parts,
        claims=claims,
    )


def _prediction_sets(config: RunConfig, answers: Sequence[Answer]) -> PredictionSets | None:
    """Sets of options that hold the right one; None where answers are not chosen among options by their likelihood."""
    known = [one for one in answers if one.option_logprobs and any(one.right_options)]
    if not known:
        return None
    probabilities = [np.exp(one.option_logprobs) for one in known]
    right = [one.right_options for one in known]
    return fit_prediction_sets(probabilities, right, config.abstention.set_error, config.abstention.set_score)


def _by_group(
    confidence: NDArray[np.float64],
    correct: NDArray[np.bool_],
    strata: Sequence[Mapping[str, str]],
    by: str,
    target_risk: float,
    delta: float,
) -> GroupCertification:
    """Certificates of the groups; answers without this stratum are in none."""
    named = np.array([by in one for one in strata])
    names = [one[by] for one in strata if by in one]
    return replace(certify_groups(confidence[named], correct[named], names, target_risk, delta), by=by)


def show(calibrated: Calibrated, path: Path, *, written: bool, note: str = "") -> None:
    """Print the calibrator, what is certified and of which questions, a note, and whether it was written."""
    from rich.console import Console

    console = Console(highlight=False)
    fitted, certificate = calibrated.calibrator, calibrated.certification.certificate
    console.print(_fitted(fitted))
    for failure in calibrated.failures:
        console.print(failure, style="bold red", markup=False)
    if certificate is not None:
        bound = at_most(certificate.risk_bound)
        console.print(
            f"certified: answering at {certificate.threshold:.2f} and above, at most {bound} of the answers are wrong "
            f"(confidence {1 - certificate.delta:.0%}, n={certificate.n}); it answers {certificate.coverage:.0%}"
        )
        console.print(f"it holds for questions like {calibrated.scope}", markup=False)
    audited = audit_lines(calibrated.audit) if calibrated.audit else []
    for line in [*answer_parts.told(calibrated.parts, calibrated.claims), *audited]:
        console.print(line, markup=False)
    for broken in calibrated.certification.exceptions:
        console.print(
            f"not kept where {broken.key} is {plain(broken.value)}: {broken.n_wrong} of {broken.n_answered} answers wrong "
            f"({broken.low:.0%} to {broken.high:.0%})",
            markup=False,
            style="yellow",
        )
    if calibrated.hallucination is not None:
        found = calibrated.hallucination
        console.print(
            f"hallucinations: answering at {found.threshold:.2f} and above, at most {found.target_rate:.0%} of all "
            f"questions are answered wrongly in expectation (n={found.n}); it answers {found.coverage:.0%}"
        )
    for name, one in (calibrated.groups.groups if calibrated.groups else {}).items():
        answered = "not answered: " if one.certificate is None else f"at {one.certificate.threshold:.2f} and above: "
        console.print(f"group {plain(name)}, {answered}{one.reason}", markup=False)
    if (sets := calibrated.prediction_sets) is not None:
        size = f"they hold {sets.mean_size:.1f} options on average"
        console.print(
            f"prediction sets: at most {sets.alpha:.0%} of them miss the right option, in expectation (n={sets.n}, "
            f"{sets.score}); {'too few questions: all options are in each' if sets.threshold is None else size}"
        )
    if note:
        console.print(note, markup=False)
    if not written:
        console.print(f"nothing is written: {path} stays as it was", markup=False)
        return
    console.print(f"written: {path}", markup=False)
    if not calibrated.promised:
        console.print(
            "without a certificate the model answers nothing, unless --uncertified is given", style="bold red"
        )


def _fitted(calibrator: Calibrator) -> str:
    """The calibrator's single numbers with their intervals, in one line."""
    numbers = [
        f"{name} {value:.2f}"
        + (f" ({calibrator.low[name]:.2f} to {calibrator.high[name]:.2f})" if name in calibrator.low else "")
        for name, value in calibrator.parameters.items()
        if isinstance(value, float)
    ]
    title = "" if calibrator.method == "temperature" else f"{calibrator.method}: "
    return title + ", ".join([*numbers, f"n={calibrator.n}"])
