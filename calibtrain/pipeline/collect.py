"""What report.html shows, collected from the files of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from calibtrain.config_file import load_config
from calibtrain.data.calibration_set import Composition
from calibtrain.errors import UserError
from calibtrain.hooks.jsonl import read_metrics
from calibtrain.hooks.wandb import attach
from calibtrain.pipeline.calibration_file import read_calibration
from calibtrain.pipeline.evaluate import measured_metrics, read_measurement
from calibtrain.pipeline.prepare import prepare
from calibtrain.pipeline.report import CompositionRow, Measured, ReportData, write_report


def run(output_dir: Path) -> Path:
    """Write report.html from a run's config, metrics, calibration and graded answers, and attach it to the W&B run."""
    data = report_data(output_dir)
    report = write_report(output_dir / "report.html", data)
    config = load_config(output_dir / "config.yaml")
    described = {**data.config, "world_size": _facts(output_dir / "run.json")["world_size"]}
    attach(output_dir, described, config.tracking, [output_dir / "calibration.json", report], _summary(data))
    return report


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
    config = load_config(output_dir / "config.yaml")
    facts = _facts(output_dir / "run.json")
    calibrated = read_calibration(output_dir)
    test = read_measurement(output_dir / "answers" / "test.jsonl")
    raw_path = output_dir / "answers" / "raw_test.jsonl"
    measured = [Measured("raw model", read_measurement(raw_path).answers)] if raw_path.is_file() else []
    measured.append(Measured("fine-tuned", test.answers))
    label = f"with {calibrated.calibrator.method.replace('_', ' ')}"
    confidence = calibrated.calibrator.apply(test.scores(config.calibration.domain))
    measured.append(Measured(label, test.answers, confidence.tolist()))
    composition = prepare(config).composition
    metrics = output_dir / "metrics.jsonl"
    # `calibrate` and `certify` take another risk or delta than the config's: the certificate says which.
    promise = calibrated.certification.certificate or config.abstention
    return ReportData(
        run_name=config.name,
        config=config.resolved(),
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
        temperature=calibrated.calibrator.temperature,
        training=read_metrics(metrics) if metrics.is_file() else [],
    )


def composition_rows(composition: Composition) -> list[CompositionRow]:
    """Shares of every stratum, largest first within a key."""
    return [
        CompositionRow(stratum.key, name, stratum.source_shares.get(name, 0.0), stratum.set_shares.get(name, 0.0))
        for stratum in composition.strata
        for name in sorted(stratum.source_shares, key=lambda one: -stratum.source_shares[one])
    ]


def _facts(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); train first") from error
