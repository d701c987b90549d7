"""Calibration of a trained model: a temperature and a certified threshold, each on questions used for nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibtrain.abstention.certificate import Certificate, Certification, certified_curve, certify
from calibtrain.abstention.words import WORDS
from calibtrain.calibration.intervals import sample_ids
from calibtrain.calibration.temperature import TemperatureCalibrator
from calibtrain.config import RunConfig
from calibtrain.config_file import load_config
from calibtrain.data.summary import data_hash
from calibtrain.errors import UserError
from calibtrain.pipeline.evaluate import Loaded, Measurement, with_progress, write_measurement
from calibtrain.pipeline.prepare import prepare


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What `calibration.json` holds."""

    calibrator: TemperatureCalibrator
    certification: Certification
    curve: dict[float, Certification]


def run(output_dir: Path, *, target_risk: float | None = None, delta: float | None = None) -> Calibrated:
    """Fit and certify the model of a finished run; writes calibration.json and the graded answers it rests on."""
    config = load_config(output_dir / "config.yaml")
    model = output_dir / "model"
    if not (model / "config.json").is_file():
        raise UserError(f"{output_dir}: no exported model (model/config.json); train first")
    prepared = prepare(config)
    loaded = Loaded(config, model)
    measured: dict[str, Measurement] = {}
    for split in ("temperature", "certification"):
        records = prepared.splits[split]
        if not records:
            raise UserError(f"data.splits.{split}: 0 questions; calibration needs some")
        measured[split] = with_progress(loaded, records, (), f"answering {split}")
        write_measurement(measured[split], output_dir / "answers" / f"{split}.jsonl")
    calibrator = fit_temperature(measured["temperature"], loaded.template.hash, weights_hash(model))
    certificate_risk = config.abstention.target_risk if target_risk is None else target_risk
    certificate_delta = config.abstention.delta if delta is None else delta
    held_out = measured["certification"]
    confidence = calibrator.apply(held_out.table)
    certification = certify(confidence, held_out.correct, certificate_risk, certificate_delta)
    curve = certified_curve(confidence, held_out.correct, config.abstention.report_risks, certificate_delta)
    calibrated = Calibrated(calibrator, certification, curve)
    hashes = {split: data_hash(prepared.splits[split]) for split in measured}
    write_calibration(output_dir / "calibration.json", calibrated, config, hashes)
    _print(calibrated, output_dir)
    return calibrated


def fit_temperature(measurement: Measurement, template_hash: str, model_hash: str) -> TemperatureCalibrator:
    """Temperature of graded answers, its interval from resampling questions."""
    ids: Sequence[int] | NDArray[np.uint64] = sample_ids([answer.question_id for answer in measurement.answers])
    return TemperatureCalibrator.fit(
        measurement.table, measurement.correct, template_hash=template_hash, weights_hash=model_hash, ids=ids
    )


def weights_hash(model: Path) -> str:
    """SHA-256 over the weight files of a Hugging Face directory; a calibrator holds for these weights alone."""
    digest = hashlib.sha256()
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise UserError(f"{model}: no safetensors weights")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def write_calibration(path: Path, calibrated: Calibrated, config: RunConfig, data_hashes: dict[str, str]) -> None:
    """calibration.json: calibrator, certificate (or why there is none), certified curve and word scale."""
    certificate = calibrated.certification.certificate
    content = {
        "calibrator": calibrated.calibrator.as_dict(),
        "certificate": None if certificate is None else certificate.as_dict(),
        "certification": calibrated.certification.reason,
        "curve": [
            {"target_risk": risk, "reason": one.reason, "certificate": one.certificate and one.certificate.as_dict()}
            for risk, one in sorted(calibrated.curve.items())
        ],
        "template": config.data.template,
        "data_hashes": data_hashes,
        "words": [asdict(word) for word in WORDS],
    }
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(partial, path)


def read_calibration(output_dir: Path, *, template_hash: str | None = None) -> Calibrated:
    """Calibration of a run. Raises UserError when there is none, or it was fitted to other weights or template."""
    path = output_dir / "calibration.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `calibtrain calibrate {output_dir}`")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fitted = content["calibrator"]
        calibrator = TemperatureCalibrator.from_dict(
            fitted,
            template_hash=fitted["template_hash"] if template_hash is None else template_hash,
            weights_hash=weights_hash(output_dir / "model"),
        )
        curve = {
            one["target_risk"]: Certification(_certificate(one["certificate"]), one["reason"])
            for one in content["curve"]
        }
        return Calibrated(
            calibrator, Certification(_certificate(content["certificate"]), content["certification"]), curve
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run `calibtrain calibrate {output_dir}` again") from error


def _certificate(values: dict[str, Any] | None) -> Certificate | None:
    return None if values is None else Certificate.from_dict(values)


def _print(calibrated: Calibrated, output_dir: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    fitted, certificate = calibrated.calibrator, calibrated.certification.certificate
    console.print(f"temperature {fitted.temperature:.2f} ({fitted.low:.2f} to {fitted.high:.2f}, n={fitted.n})")
    if certificate is None:
        console.print(f"no certificate: {calibrated.certification.reason}")
    else:
        console.print(
            f"certified: answering at {certificate.threshold:.2f} and above, at most {certificate.risk_bound:.0%} of the "
            f"answers are wrong (confidence {1 - certificate.delta:.0%}, n={certificate.n}); it answers "
            f"{certificate.coverage:.0%}"
        )
    console.print(f"written: {output_dir / 'calibration.json'}")
