"""Calibration of a trained model: a calibrator and certified thresholds, each on questions used for nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibtrain.abstention.certificate import Certificate, Certification, certified_curve, certify
from calibtrain.abstention.groups import GroupCertification, certify_groups
from calibtrain.abstention.hallucination import HallucinationCertificate, control_hallucinations
from calibtrain.abstention.words import scale_of
from calibtrain.calibration.calibrators import Calibrator, fit_calibrator
from calibtrain.calibration.intervals import sample_ids
from calibtrain.calibration.unlabelled import fit_base_alignment
from calibtrain.confidence.answer import Answer
from calibtrain.config import RunConfig
from calibtrain.config_file import load_config
from calibtrain.data.grading import normalize
from calibtrain.data.summary import data_hash
from calibtrain.errors import UserError
from calibtrain.pipeline.evaluate import Loaded, Measurement, read_measurement, with_progress, write_measurement
from calibtrain.pipeline.prepare import prepare


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What `calibration.json` holds."""

    calibrator: Calibrator
    certification: Certification
    curve: dict[float, Certification]
    hallucination: HallucinationCertificate | None = None  # where the config asks for a rate
    groups: GroupCertification | None = None  # where the config names the groups


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
        kept = output_dir / "answers" / f"{split}.jsonl"
        write_measurement(with_progress(loaded, records, (), f"answering {split}"), kept)
        measured[split] = read_measurement(kept)  # as rounded there, so that `calibtrain certify` finds the same
    fitting, hashes = measured["temperature"], (loaded.template.hash, weights_hash(model))
    if config.calibration.method == "base_alignment":
        base = with_progress(Loaded(config), prepared.splits["temperature"], prepared.shots, "answering with the base")
        calibrator = align(fitting, base, *hashes)
    else:
        calibrator = fit(config, fitting, *hashes)
    certificate_risk = config.abstention.target_risk if target_risk is None else target_risk
    certificate_delta = config.abstention.delta if delta is None else delta
    calibrated = certified(config, calibrator, measured["certification"], certificate_risk, certificate_delta)
    data_hashes = {split: data_hash(prepared.splits[split]) for split in measured}
    write_calibration(output_dir / "calibration.json", calibrated, config, data_hashes)
    show(calibrated, output_dir)
    return calibrated


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
        [normalize(ours.text) == normalize(theirs.text) for ours, theirs in pairs],
        template_hash=template_hash,
        weights_hash=model_hash,
        ids=sample_ids([answer.question_id for answer in measurement.answers]),
    )


def certified(
    config: RunConfig, calibrator: Calibrator, held_out: Measurement, target_risk: float, delta: float
) -> Calibrated:
    """What the config asks to certify, on graded answers used for nothing else. Each claim holds at its own delta."""
    confidence = calibrator.apply(held_out.scores(config.calibration.domain))
    return certified_claims(config, calibrator, confidence, held_out.answers, target_risk, delta)


def certified_claims(
    config: RunConfig,
    calibrator: Calibrator,
    confidence: NDArray[np.float64],
    answers: Sequence[Answer],
    target_risk: float,
    delta: float,
) -> Calibrated:
    """The same for calibrated confidences (N,) of any source."""
    correct = np.array([bool(answer.correct) for answer in answers])
    rate, group = config.abstention.target_hallucination, config.abstention.groups
    names = None if group is None else [answer.strata.get(group, "") for answer in answers]
    return Calibrated(
        calibrator,
        certify(confidence, correct, target_risk, delta),
        certified_curve(confidence, correct, config.abstention.report_risks, delta),
        None if rate is None else control_hallucinations(confidence, correct, rate),
        None if names is None else certify_groups(confidence, correct, names, target_risk, delta),
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


def source_folder(output_dir: Path, source: str | None) -> Path:
    """Where the calibration of a source lies: beside the model for the likelihood, which None stands for too."""
    return output_dir if source in (None, "likelihood") else output_dir / "sources" / source


def write_calibration(
    path: Path,
    calibrated: Calibrated,
    config: RunConfig,
    data_hashes: dict[str, str],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """calibration.json: calibrator, certificate (or why there is none), certified curve, word scale, and `facts`."""
    content = {
        **(facts or {}),
        "calibrator": calibrated.calibrator.as_dict(),
        **claims(calibrated),
        "template": config.data.template,
        "data_hashes": data_hashes,
        "words": [asdict(word) for word in scale_of(config.abstention.words)],
    }
    write_json(path, content)


def claims(calibrated: Calibrated) -> dict[str, Any]:
    """What calibration.json says of certificates."""
    certification, groups = calibrated.certification, calibrated.groups
    return {
        "certificate": _certification(certification)["certificate"],
        "certification": certification.reason,
        "curve": [{"target_risk": risk, **_certification(one)} for risk, one in sorted(calibrated.curve.items())],
        "hallucination": calibrated.hallucination and calibrated.hallucination.as_dict(),
        "groups": groups
        and {
            "delta": groups.delta,
            "share": groups.share,
            "groups": {name: _certification(one) for name, one in groups.groups.items()},
        },
    }


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(partial, path)


def read_calibration(output_dir: Path, *, template_hash: str | None = None, source: str | None = None) -> Calibrated:
    """Calibration of a run, or of one of its sources. UserError when there is none or it is of other weights or template."""
    path = source_folder(output_dir, source) / "calibration.json"
    command = f"calibtrain calibrate {output_dir}" + ("" if path.parent == output_dir else f" --source {source}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `{command}`")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fitted = content["calibrator"]
        calibrator = Calibrator.from_dict(
            fitted,
            template_hash=fitted["template_hash"] if template_hash is None else template_hash,
            weights_hash=weights_hash(output_dir / "model"),
        )
        hallucination, groups = content["hallucination"], content["groups"]
        return Calibrated(
            calibrator,
            Certification(_certificate(content["certificate"]), content["certification"]),
            {one["target_risk"]: _read_certification(one) for one in content["curve"]},
            hallucination and HallucinationCertificate.from_dict(hallucination),
            groups
            and GroupCertification(
                {name: _read_certification(one) for name, one in groups["groups"].items()},
                groups["delta"],
                groups["share"],
            ),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run `{command}` again") from error


def _certification(found: Certification) -> dict[str, Any]:
    return {"reason": found.reason, "certificate": found.certificate and found.certificate.as_dict()}


def _read_certification(values: dict[str, Any]) -> Certification:
    return Certification(_certificate(values["certificate"]), values["reason"])


def _certificate(values: dict[str, Any] | None) -> Certificate | None:
    return None if values is None else Certificate.from_dict(values)


def show(calibrated: Calibrated, output_dir: Path) -> None:
    """Print the calibrator and what is certified."""
    from rich.console import Console

    console = Console(highlight=False)
    fitted, certificate = calibrated.calibrator, calibrated.certification.certificate
    console.print(_fitted(fitted))
    if certificate is None:
        console.print(f"no certificate: {calibrated.certification.reason}")
    else:
        console.print(
            f"certified: answering at {certificate.threshold:.2f} and above, at most {certificate.risk_bound:.0%} of the "
            f"answers are wrong (confidence {1 - certificate.delta:.0%}, n={certificate.n}); it answers "
            f"{certificate.coverage:.0%}"
        )
    if calibrated.hallucination is not None:
        found = calibrated.hallucination
        console.print(
            f"hallucinations: answering at {found.threshold:.2f} and above, at most {found.target_rate:.0%} of all "
            f"questions are answered wrongly in expectation (n={found.n}); it answers {found.coverage:.0%}"
        )
    for name, one in (calibrated.groups.groups if calibrated.groups else {}).items():
        answered = "not answered: " if one.certificate is None else f"at {one.certificate.threshold:.2f} and above: "
        console.print(f"group {name}, {answered}{one.reason}", markup=False)
    console.print(f"written: {output_dir / 'calibration.json'}")


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
