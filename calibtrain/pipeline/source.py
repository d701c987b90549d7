"""Another source of confidence than the answer's likelihood put to work: its calibrator and certificates beside the run's.

OUT/sources/NAME/ holds calibration.json in the shape of the run's own, and ensemble.json for an ensemble. `calibtrain
answer`, `serve` and `monitor` take it by --source NAME.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from calibtrain.calibration.calibrators import fit_calibrator
from calibtrain.calibration.intervals import sample_ids
from calibtrain.confidence.ensemble import Ensemble, cross_scores, fit_ensemble
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import FOLDER, OUTSIDE, STEM, FittedHead
from calibtrain.confidence.probe import Probe
from calibtrain.confidence.scorer import ENSEMBLE, EVERY, HEAD, PROBES, Scorer
from calibtrain.confidence.source import SourceScores
from calibtrain.confidence.sources import FAMILIES, SOURCES, cost_of
from calibtrain.data.summary import data_hash
from calibtrain.errors import UserError
from calibtrain.pipeline import outside
from calibtrain.pipeline import probe as probes_of_run
from calibtrain.pipeline.answer_parts import fit_answer_parts
from calibtrain.pipeline.audit import audit_of
from calibtrain.pipeline.calibrate import SPLITS, certified_claims, check_strata, keeps_earlier, show
from calibtrain.pipeline.calibration_file import (
    Calibrated,
    file_hash,
    parts_hashes,
    source_folder,
    weights_hash,
    write_calibration,
    write_json,
)
from calibtrain.pipeline.confidence import Scored, asker_of, score_split, with_probes
from calibtrain.pipeline.evaluate import Loaded
from calibtrain.pipeline.measurement import read_measurement
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.pipeline.prepare import prepare
from calibtrain.pipeline.question import shapes_of

CHEAP = next(iter(FAMILIES))
"""Members of an ensemble unless they are named, with the run's probes: they cost at most one more pass."""


def run(
    output_dir: Path,
    name: str,
    *,
    members: Sequence[str] | None = None,
    target_risk: float | None = None,
    delta: float | None = None,
) -> Calibrated:
    """Calibrate a source on `temperature` and certify it on `certification`; writes OUT/sources/NAME/.

    members: of an ensemble, which is fitted on `temperature` too; its calibrator then sees scores by ensembles fitted
    without the answer. What was scored already is not scored again.
    """
    config = config_of_run(output_dir)
    model = output_dir / "model"
    if not (model / "config.json").is_file():
        raise UserError(f"{output_dir}: no exported model (model/config.json); train first")
    _check(name, members)
    prepared = prepare(config)
    check_strata(config, prepared.splits)
    loaded = Loaded(config, model)
    fingerprint = Fingerprint(weights_hash(model), loaded.template.hash)
    fitted = probes_of_run.load_probes(output_dir, fingerprint)
    names = (name,) if name != ENSEMBLE else tuple(members or (*CHEAP, *fitted))
    head = FittedHead.load(output_dir, fingerprint) if HEAD in names else None
    Scorer(name, fingerprint, fitted, None if name != ENSEMBLE else _placeholder(names, fingerprint), head)
    found = {}
    for split in SPLITS:
        asker, records = asker_of(loaded), prepared.splits[split]
        plain = [one for one in names if one in SOURCES]
        scored = score_split(asker, records, output_dir / "confidence" / "work" / split, plain, fingerprint, head)
        found[split] = with_probes(
            scored, asker, records, {one: fitted[one] for one in names if one in PROBES}, fingerprint
        )
    folder = source_folder(output_dir, name)
    made = _combine(found, names, fingerprint, config.seed) if name == ENSEMBLE else None
    fit, held_out = found["temperature"], found["certification"]
    calibrator = fit_calibrator(
        "platt", fit.scores[name].values, fit.correct, ids=sample_ids(fit.ids), **asdict(fingerprint)
    )
    told, kept, p_values = outside.of_run(output_dir, fingerprint)
    calibrated = certified_claims(
        config,
        calibrator,
        calibrator.apply(held_out.scores[name].values),
        [replace(one, outside=p_values.get(one.question_id)) for one in held_out.answers],
        config.abstention.target_risk if target_risk is None else target_risk,
        config.abstention.delta if delta is None else delta,
        parts=fit_answer_parts(fit.answers, **asdict(fingerprint)),
        audit=audit_of(config, held_out.answers, output_dir),
    )
    stays = keeps_earlier(output_dir, calibrated, template_hash=fingerprint.template_hash, source=name)
    if not stays:
        if made is not None:
            write_json(folder / "ensemble.json", json.loads(made.to_json()))
        parts = parts_hashes(output_dir, _parts(names, name)) | kept
        facts = {"source": name, "members": list(names), "cost": held_out.scores[name].cost.mean(), "parts": parts}
        facts |= {"shapes": shapes_of(prepared.splits["certification"]).as_dict(), **told}
        facts["fitted_on"] = _fitted_on(output_dir, fit)
        hashes = {split: data_hash(prepared.splits[split]) for split in SPLITS}
        write_calibration(folder / "calibration.json", calibrated, config, hashes, facts)
    show(calibrated, folder / "calibration.json", written=not stays)
    return calibrated


def _fitted_on(output_dir: Path, fit: Scored) -> str:
    """Hash of the run's file of answers to the questions that fitted the calibrator; "" where it holds others, or is gone.

    `certify` knows by it which questions it must not certify by.
    """
    path = output_dir / "answers" / "temperature.jsonl"
    try:
        kept = read_measurement(path).answers
    except UserError:
        return ""
    return file_hash(path) if [one.question_id for one in kept] == fit.ids else ""


def _parts(names: Sequence[str], name: str) -> list[str]:
    """Files of the run that the source's scores rest on: with another probe or ensemble its calibration says nothing."""
    fitted = {PROBES[0]: "probe", PROBES[1]: f"probe/{PROBES[1]}"}
    files = [f"{fitted[one]}/{file}" for one in names if one in fitted for file in ("probe.json", "probe.safetensors")]
    own = (f"{STEM}.json", f"{STEM}.safetensors", OUTSIDE)
    files += [f"{FOLDER}/{file}" for file in own if HEAD in names]
    return [*files, *(["sources/ensemble/ensemble.json"] if name == ENSEMBLE else [])]


def load_scorer(output_dir: Path, name: str, fingerprint: Fingerprint) -> Scorer:
    """The scorer of a source that `run` calibrated. UserError where it was not, or for another model or template."""
    check_calibrated(output_dir, name)
    folder, made = source_folder(output_dir, name), None
    if name == ENSEMBLE:
        try:
            made = Ensemble.from_json((folder / "ensemble.json").read_text(encoding="utf-8"), fingerprint)
        except OSError as error:
            raise UserError(
                f"{folder}: no ensemble ({error}); run `calibtrain calibrate` with --source again"
            ) from error
    members = (name,) if made is None else made.sources
    needed = [one for one in members if one in PROBES]
    fitted: dict[str, Probe] = probes_of_run.load_probes(output_dir, fingerprint) if needed else {}
    head = FittedHead.load(output_dir, fingerprint) if HEAD in members else None
    return Scorer(name, fingerprint, fitted, made, head)


def check_calibrated(output_dir: Path, name: str) -> None:
    """Raise UserError unless `run`, or for the likelihood `calibtrain calibrate`, has calibrated the source."""
    if name not in (*EVERY, ENSEMBLE):
        raise UserError(f"--source: {name!r} is none of {', '.join((*EVERY, ENSEMBLE))}")
    folder = source_folder(output_dir, name)
    if not (folder / "calibration.json").is_file():
        option = "" if name == "likelihood" else f" --source {name}"
        raise UserError(f"{folder}: {name} is not calibrated; run `calibtrain calibrate {output_dir}{option}`")


def _check(name: str, members: Sequence[str] | None) -> None:
    if name not in (*EVERY, ENSEMBLE) or name == "likelihood":
        known = ", ".join(one for one in (*EVERY, ENSEMBLE) if one != "likelihood")
        raise UserError(f"--source: {name!r} is none of {known} (the likelihood is calibrated without --source)")
    if members is not None and name != ENSEMBLE:
        raise UserError("--of: names the members of --source ensemble alone")
    for one in members or ():
        if one not in EVERY:
            raise UserError(f"--of: {one!r} is none of {', '.join(EVERY)}")


def _placeholder(names: tuple[str, ...], fingerprint: Fingerprint) -> Ensemble:
    """An ensemble of these sources before it is fitted, to find out early that one of them is missing."""
    n = len(names)
    return Ensemble(names, (0.0,) * n, (1.0,) * n, (0.0,) * n, 0.0, 1.0, 0, fingerprint)


def _combine(found: dict[str, Scored], names: tuple[str, ...], fingerprint: Fingerprint, seed: int) -> Ensemble:
    """Fit the ensemble and add its scores."""
    fit = found["temperature"]
    known = {one: fit.scores[one].values for one in names}
    made = fit_ensemble(known, fit.correct, fingerprint, sources=names, seed=seed)
    for split, scored in found.items():
        values = (
            cross_scores(known, fit.correct, fingerprint, sources=names, seed=seed)
            if split == "temperature"
            else made.score({one: scored.scores[one].values for one in names})
        )
        cost = cost_of({one: scored.scores[one] for one in names})
        scored.scores[ENSEMBLE] = SourceScores(np.asarray(values), cost, True)
    return made
