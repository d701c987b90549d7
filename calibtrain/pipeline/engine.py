"""A served model calibrated and certified by the log-probs that its server returns, beside the run's own.

OUT/engines/NAME/ holds calibration.json in the shape of the run's own, with the identity of the engine that it holds for,
and the graded answers that it rests on. `calibtrain answer OUT --engine URL` takes it, where the same engine answers there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calibtrain.calibration.calibrators import Calibrator, fit_calibrator
from calibtrain.calibration.intervals import sample_ids
from calibtrain.config import RunConfig
from calibtrain.data.summary import data_hash
from calibtrain.engines import Identity
from calibtrain.errors import UserError
from calibtrain.pipeline import outside
from calibtrain.pipeline.answer_parts import fit_answer_parts
from calibtrain.pipeline.calibrate import SPLITS, certified, check_strata, show
from calibtrain.pipeline.calibration_file import (
    Calibrated,
    calibrated_of,
    changed,
    file_hash,
    write_calibration,
)
from calibtrain.pipeline.evaluate import measured_again
from calibtrain.pipeline.measurement import move_measurement
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.pipeline.prepare import prepare
from calibtrain.pipeline.question import shapes_of
from calibtrain.pipeline.served import Served

SOURCE = "engine"
METHODS = ("platt", "beta", "isotonic", "histogram")
"""Calibrators that need an answer's confidence alone; a server does not return logits, so no temperature is fitted."""


def run(
    output_dir: Path,
    *,
    url: str,
    name: str | None = None,
    target_risk: float | None = None,
    delta: float | None = None,
) -> Calibrated:
    """Let the server answer the run's `temperature` and `certification` questions; writes OUT/engines/NAME/.

    The calibrator is the config's where it needs the confidence alone, else Platt's. A calibration of the same engine that
    has a certificate stays where the new one has none. UserError where another engine answers at the end than at the start.
    """
    config = config_of_run(output_dir)
    prepared = prepare(config)
    check_strata(config, prepared.splits)
    served = Served(config, _model(output_dir), url=url, name=name)
    folder = engine_folder(output_dir, served)
    answers, measured = folder / "answers", {}
    mark = served.mark()
    for split in SPLITS:
        measured[split] = measured_again(served, prepared.splits[split], answers / f"{split}.new.jsonl", mark, split)
    served.check_same()
    fitting = measured["temperature"]
    calibrator = fit_calibrator(
        config.calibration.method if config.calibration.method in METHODS else METHODS[0],
        fitting.scores(),
        fitting.correct,
        template_hash=served.template.hash,
        weights_hash=served.identity.hash,
        ids=sample_ids([answer.question_id for answer in fitting.answers]),
    )
    calibrated = certified(
        config,
        calibrator,
        measured["certification"],
        config.abstention.target_risk if target_risk is None else target_risk,
        config.abstention.delta if delta is None else delta,
        parts=fit_answer_parts(fitting.answers, served.template.hash, served.identity.hash),
    )
    stays = not calibrated.promised and _has_certificate(output_dir, config, served)
    facts = {
        "source": SOURCE,
        "engine": served.identity.as_dict(),
        "fitted_on": file_hash(answers / "temperature.new.jsonl"),
        "shapes": shapes_of(prepared.splits["certification"]).as_dict(),
        **outside.facts(None, outside.SERVED),
    }
    for split in SPLITS:
        move_measurement(answers / f"{split}.new.jsonl", None if stays else answers / f"{split}.jsonl")
    if not stays:
        hashes = {split: data_hash(prepared.splits[split]) for split in SPLITS}
        write_calibration(folder / "calibration.json", calibrated, config, hashes, facts)
    note = outside.told(None, outside.SERVED)
    show(calibrated, folder / "calibration.json", written=not stays, note=note)
    return calibrated


def load_served(output_dir: Path, url: str, name: str | None = None) -> tuple[Served, Calibrated]:
    """The engine behind an address and its calibration. UserError where it has none, or another engine was calibrated."""
    config = config_of_run(output_dir)
    served = Served(config, _model(output_dir), url=url, name=name)
    return served, read_engine_calibration(output_dir, config, served)


def read_engine_calibration(output_dir: Path, config: RunConfig, served: Served) -> Calibrated:
    """Calibration of this engine. UserError without one, or one of another engine, template or other settings."""
    path = engine_folder(output_dir, served) / "calibration.json"
    command = f"calibtrain calibrate {output_dir} --engine {served.server.url}"
    if not path.is_file():
        raise UserError(f"{path}: the engine is not calibrated; run `{command}`")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        identity = Identity.from_dict(content["engine"])
        served.check_same(identity)
        calibrator = Calibrator.from_dict(
            content["calibrator"], template_hash=served.template.hash, weights_hash=identity.hash
        )
        if difference := changed(content, config, output_dir, SOURCE):
            raise UserError(f"{difference}; run `{command}` again")
        return calibrated_of(content, calibrator)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); run `{command}` again") from error


def engine_folder(output_dir: Path, served: Served) -> Path:
    """Where an engine's calibration lies; a model id makes one folder, whoever serves it."""
    return output_dir / "engines" / served.identity.name


def _has_certificate(output_dir: Path, config: RunConfig, served: Served) -> bool:
    try:
        before = read_engine_calibration(output_dir, config, served)
    except UserError:
        return False
    return before.promised


def _model(output_dir: Path) -> Path:
    """The run's exported model, whose tokenizer and template the server's must be."""
    model = output_dir / "model"
    if not (model / "config.json").is_file():
        raise UserError(f"{output_dir}: no exported model (model/config.json); train first")
    return model
