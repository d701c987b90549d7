"""What report.html shows, collected from the files of a finished run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from calibtrain.abstention.strata import group_risks
from calibtrain.calibration.calibrators import Calibrator
from calibtrain.confidence.scorer import HEAD
from calibtrain.config import RunConfig
from calibtrain.config_file import without_keys
from calibtrain.data.calibration_set import Composition
from calibtrain.errors import UserError
from calibtrain.hooks.jsonl import read_metrics
from calibtrain.hooks.wandb import attach
from calibtrain.pipeline.calibration_file import (
    made_by,
    made_by_source,
    read_calibration,
    served_source,
    source_folder,
    weights_hash,
    write_json,
)
from calibtrain.pipeline.evaluate import measured_metrics
from calibtrain.pipeline.measurement import Measurement, read_measurement
from calibtrain.pipeline.options import options_part
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.pipeline.prepare import prepare
from calibtrain.pipeline.quantize_page import Part, read_quantization
from calibtrain.pipeline.quantize_source import DATA_FILE, FULL_ANSWERS
from calibtrain.pipeline.report import CompositionRow, Measured, ReportData, write_report
from calibtrain.pipeline.report_head import head_report
from calibtrain.pipeline.report_parts import parts_report
from calibtrain.pipeline.reward_audit import FILE as AUDIT
from calibtrain.pipeline.reward_audit import read_audit
from calibtrain.pipeline.spectra_page import read_spectra, write_page
from calibtrain.tasks.kinds import task_of

NUMBERS = ("source", "certificate", "certification", "claims", "hallucination", "answering", "data_hashes", "words")
"""Of calibration.json, what goes to W&B without tracking.log_answers, beside the calibrator's and the curve's numbers."""


def run(output_dir: Path) -> Path:
    """Write report.html from a run's config, metrics, calibration and graded answers, and attach it to the W&B run.

    Without tracking.log_answers what is attached holds no question, no answer and no name of a group.
    """
    data = report_data(output_dir)
    report = write_report(output_dir / "report.html", data)
    config = config_of_run(output_dir)
    shown = data if config.tracking.log_answers else bare(data)
    described = {**shown.config, "world_size": _facts(output_dir).get("world_size", 1)}
    with TemporaryDirectory() as folder:
        files = [_served_calibration(output_dir), report]
        if not config.tracking.log_answers:
            files = _without_answers(output_dir, shown, Path(folder))
        if data.spectra:  # anew, so that the report's link leads to what the report shows
            files.append(write_page(output_dir / "spectra.html", data.spectra))
        attach(output_dir, described, config.tracking, files, _summary(data))
    return report


def _without_answers(output_dir: Path, data: ReportData, folder: Path) -> list[Path]:
    """calibration.json and report.html without questions, answers and names of groups: what may leave the machine."""
    content = json.loads(_served_calibration(output_dir).read_text(encoding="utf-8"))
    numbers = {key: content[key] for key in NUMBERS if key in content}
    fitted = content["calibrator"]
    parameters = {name: value for name, value in fitted["parameters"].items() if isinstance(value, float | int)}
    numbers["calibrator"] = {"method": fitted["method"], "n": fitted["n"], "parameters": parameters}
    numbers["curve"] = [
        {"target_risk": one["target_risk"], "certificate": one["certificate"]} for one in content["curve"]
    ]
    write_json(folder / "calibration.json", numbers)
    return [folder / "calibration.json", write_report(folder / "report.html", data)]


def bare(data: ReportData) -> ReportData:
    """The report without questions, answers and names of groups, also those that prompts show."""
    config = {**data.config, "data": {**data.config["data"], "examples": []}} if data.config else data.config
    scope = data.scope and replace(data.scope, examples=())
    parts = data.parts and replace(data.parts, fields=(), left_out=0)  # a reply may have made up a field's name
    kept = replace(
        data, config=config, samples=False, scope=scope, group_risks=(), groups=None, composition=(), parts=parts
    )
    return replace(kept, composition_verdict="")


def _served_calibration(output_dir: Path) -> Path:
    """Of the source that serves, of which the report is."""
    return source_folder(output_dir, served_source(output_dir)) / "calibration.json"


def _summary(data: ReportData) -> dict[str, float]:
    """Calibration on the test questions as W&B's summary: one set of keys per row of the report's table."""
    found = {}
    for one in data.measured:
        confidence = [answer.confidence for answer in one.answers] if one.confidence is None else one.confidence
        correct = [bool(answer.correct) for answer in one.answers]
        for key, value in measured_metrics(np.array(confidence), np.array(correct)).items():
            found[f"calib/test/{one.label.replace(' ', '_').replace('-', '_')}/{key}"] = value
    return found


def report_data(output_dir: Path) -> ReportData:
    """Collect the report's content. Raises UserError naming the file that is missing."""
    config = config_of_run(output_dir)
    facts = _facts(output_dir)
    calibrated = read_calibration(output_dir)
    answers = output_dir / "answers" / "test.jsonl"
    fitted = calibrated.calibrator
    again = f"`calibtrain evaluate {output_dir / 'config.yaml'} --model {output_dir / 'model'} --output {answers}`"
    if not answers.is_file():
        raise UserError(f"{answers}: no such file; the report needs answers to the test questions: run {again}")
    test = read_measurement(answers)
    if test.made_by != made_by(fitted.weights_hash, fitted.template_hash):
        raise UserError(f"{answers}: not known to be answers of this model; run {again}")
    raw_path = output_dir / "answers" / "raw_test.jsonl"
    measured = []
    if raw_path.is_file():
        raw = read_measurement(raw_path)
        if raw.made_by not in (None, made_by_source(config.model)):
            raise UserError(
                f"{raw_path}: not answers of {config.model.source}, from which this run started; delete it, or run "
                f"`calibtrain evaluate {output_dir / 'config.yaml'} --output {raw_path}`"
            )
        measured.append(Measured("raw model", raw.answers))
    confidence = calibrated.calibrator.apply(test.scores(config.calibration.domain))
    quantized, no_quantization = _quantized(output_dir, config, test)
    if quantized is None:
        measured.append(Measured("fine-tuned", test.answers))
        label = f"with {calibrated.calibrator.method.replace('_', ' ')}"
        measured.append(Measured(label, test.answers, confidence.tolist()))
    else:
        old, kept = (one.tolist() for one in quantized.confidence)
        measured = [Measured("full precision", quantized.before, old)]
        measured.append(Measured("quantised, old calibrator", test.answers, kept))
        measured.append(Measured("quantised, refitted", test.answers, confidence.tolist()))
    head, no_head = head_report(output_dir, test, calibrated, confidence)
    if no_head and served_source(output_dir) == HEAD:
        raise UserError(f"{output_dir}: answers by its confidence head, which the report cannot show: {no_head}")
    if head is not None and head.serves and quantized is None:
        measured.append(Measured("with confidence head", test.answers, head.confidence.tolist()))
        calibrated, confidence = head.calibrated, head.confidence
    composition = prepare(config).composition
    metrics = output_dir / "metrics.jsonl"
    # `calibrate` and `certify` take another risk or delta than the config's: the certificate says which.
    certificate = calibrated.certification.certificate
    promise = certificate or config.abstention
    graded = [(q, one) for q, one in zip(confidence, test.answers, strict=True) if one.correct is not None]
    risks = (
        group_risks(
            [q for q, _ in graded],
            [bool(one.correct) for _, one in graded],
            [one.strata for _, one in graded],
            certificate.threshold,
            certificate.risk_bound,
        )
        if certificate
        else []
    )
    spectra, problem = _spectra(output_dir)
    options_are = task_of(config.task).options_are
    return ReportData(
        run_name=config.name,
        config=without_keys(config).resolved(),
        versions=facts["versions"],
        git_hash=facts["git"],
        data_hash=facts["data_hash"],
        measured=measured,
        target_risk=promise.target_risk,
        delta=promise.delta,
        certification=calibrated.certification,
        certified_curve=calibrated.curve,
        composition=[] if composition is None else composition_rows(composition),
        composition_verdict="" if composition is None else composition.verdict,
        scope=calibrated.scope,
        outside=calibrated.outside,
        group_risks=risks,
        groups=calibrated.groups,
        audit=calibrated.audit,
        temperature=fitted.temperature,
        training=read_metrics(metrics) if metrics.is_file() else [],
        reward_models=read_audit(output_dir / AUDIT),
        spectra=spectra,
        spectra_problem=problem,
        quantized=quantized,
        quantization_problem=no_quantization,
        options=options_part(options_are, test.answers),
        options_after=options_part(options_are, test.answers, calibrated.calibrator),
        parts=parts_report(calibrated, test.answers),
        head=head,
        head_problem=no_head,
    )


def _spectra(output_dir: Path) -> tuple[dict[str, Any] | None, str]:
    """Content of spectra.json, and why there is none: the report is of more than the weights, so it goes on without."""
    path = output_dir / "spectra.json"
    if not path.is_file():
        return None, ""
    try:
        content = read_spectra(path)
        if content["tuned_hash"] != weights_hash(output_dir / "model"):
            return (
                None,
                f"{path}: of other weights than those in {output_dir / 'model'}; run `calibtrain spectra {output_dir}`",
            )
    except UserError as error:
        return None, str(error)
    return content, ""


def composition_rows(composition: Composition) -> list[CompositionRow]:
    """Shares of every stratum, largest first within a key."""
    return [
        CompositionRow(stratum.key, name, stratum.source_shares.get(name, 0.0), stratum.set_shares.get(name, 0.0))
        for stratum in composition.strata
        for name in sorted(stratum.source_shares, key=lambda one: -stratum.source_shares[one])
    ]


def _quantized(output_dir: Path, config: RunConfig, test: Measurement) -> tuple[Part | None, str]:
    """What quantising cost, of an artefact of `calibtrain quantize`, and why that cannot be shown."""
    path = output_dir / DATA_FILE
    if not path.is_file():
        return None, ""
    again = f"quantise again, or delete {path}"
    try:
        content = read_quantization(path)
        if content["model_hash"] != weights_hash(output_dir / "model"):
            return None, f"{path}: of other weights than those in {output_dir / 'model'}; {again}"
        hashes = {"template_hash": content["template_hash"], "weights_hash": content["source_hash"]}
        old = Calibrator.from_dict(content["calibrator_before"], **hashes)
        full = read_measurement(output_dir / "answers" / FULL_ANSWERS)
    except UserError as error:
        return None, str(error)
    ids = [[one.question_id for one in found.answers] for found in (full, test)]
    if full.made_by != made_by(content["source_hash"], content["template_hash"]) or ids[0] != ids[1]:
        return (
            None,
            f"{output_dir / 'answers' / FULL_ANSWERS}: not the full-precision model's to these questions; {again}",
        )
    domain = config.calibration.domain
    confidence = tuple(old.apply(found.scores(domain)) for found in (full, test))
    return Part(content, full.answers, test.answers, (confidence[0], confidence[1])), ""


def _facts(output_dir: Path) -> dict[str, Any]:
    """What made the run; of a quantised model, what made that."""
    path = output_dir / "run.json"
    if not path.is_file() and (output_dir / DATA_FILE).is_file():
        path = output_dir / DATA_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["made_with"] if path.name == DATA_FILE else content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); train first") from error
