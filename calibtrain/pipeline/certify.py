"""Certificates of a finished run refitted: another risk, other groups, or newly graded answers; the model is not run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from calibtrain.config import RunConfig
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline.calibrate import Calibrated, certified, claims, read_calibration, show, write_json
from calibtrain.pipeline.evaluate import Measurement, read_measurement


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

    Defaults are the config's; group certificates and a hallucination rate that are not asked for stay as they were.
    answers: graded answers that `calibtrain evaluate --output` wrote; by default those of the certification split.
    Raises UserError for answers that fitted the calibrator, lack a grade or lack the group.
    """
    config = load_config(output_dir / "config.yaml")
    before = read_calibration(output_dir)
    path = output_dir / "answers" / "certification.jsonl" if answers is None else answers
    held_out = read_measurement(path)
    _check(held_out, path, output_dir / "answers" / "temperature.jsonl", by)
    asked = _asked(config, risk, delta, by, hallucination)
    abstention = asked.abstention
    found = certified(asked, before.calibrator, held_out, abstention.target_risk, abstention.delta)
    calibrated = replace(
        found,
        hallucination=before.hallucination if abstention.target_hallucination is None else found.hallucination,
        groups=before.groups if abstention.groups is None else found.groups,
    )
    file = output_dir / "calibration.json"
    content = json.loads(file.read_text(encoding="utf-8")) | claims(calibrated)
    if answers is not None:
        content["data_hashes"]["certification"] = hashlib.sha256(answers.read_bytes()).hexdigest()
    write_json(file, content)
    show(calibrated, output_dir)
    return calibrated


def _asked(
    config: RunConfig, risk: float | None, delta: float | None, by: str | None, hallucination: float | None
) -> RunConfig:
    """The config with what the command names instead of its own."""
    named = {"target_risk": risk, "delta": delta, "groups": by, "target_hallucination": hallucination}
    update = {name: value for name, value in named.items() if value is not None}
    return config.model_copy(update={"abstention": config.abstention.model_copy(update=update)})


def _check(held_out: Measurement, path: Path, fitted_on: Path, by: str | None) -> None:
    if not held_out.answers:
        raise UserError(f"{path}: no answers")
    fitted = {answer.question_id for answer in read_measurement(fitted_on).answers} if fitted_on.is_file() else set()
    for number, answer in enumerate(held_out.answers, start=1):
        if answer.correct is None:
            raise UserError(f"{path}:{number}: `correct` is null; a certificate needs graded answers, leave others out")
        if answer.question_id in fitted:
            raise UserError(
                f"{path}:{number}: the calibrator was fitted on this question ({answer.question!r}); certify on others"
            )
        if by is not None and by not in answer.strata:
            known = ", ".join(sorted(answer.strata)) or "none"
            raise UserError(f"{path}:{number}: `strata` has no {by!r} to group by; it has: {known}")
