"""Quantisation of a finished run, or of any model with questions: its last word is the quantised model's own.

The model is quantised on its own answers to calibration questions, answers every other split anew, and gets a calibrator
and a certificate from these answers. What that cost is measured on the same held-out questions before anything is handed
over. The artefact is an output_dir that every command takes: config.yaml, model/, answers/ (temperature, certification,
test, and full_test: the full-precision model's), calibration.json, quantization.json, report.html.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calibtrain.calibration.calibrators import Calibrator
from calibtrain.config import RunConfig
from calibtrain.config_file import dump_config
from calibtrain.data.calibration_set import choose_calibration_set, composition_distance
from calibtrain.data.summary import data_hash
from calibtrain.errors import UserError
from calibtrain.pipeline import calibrate, outside
from calibtrain.pipeline.answer_parts import fit_answer_parts
from calibtrain.pipeline.calibration_file import (
    Calibrated,
    file_hash,
    made_by,
    weights_hash,
    write_calibration,
    write_json,
)
from calibtrain.pipeline.evaluate import Loaded, with_progress
from calibtrain.pipeline.measurement import Measurement, read_measurement, write_measurement
from calibtrain.pipeline.prepare import Prepared, prepare
from calibtrain.pipeline.provenance import git_hash, versions
from calibtrain.pipeline.quantize_cost import Memory, cost, has_room, speeds
from calibtrain.pipeline.quantize_full import TEXTS_FILE, Full, full_precision, kept_answers
from calibtrain.pipeline.quantize_gate import Check, check, refusal
from calibtrain.pipeline.quantize_page import FORMAT
from calibtrain.pipeline.quantize_source import (
    DATA_FILE,
    FULL_ANSWERS,
    USUAL,
    Asked,
    Subject,
    check_space,
    samples_of,
    subject_of,
)
from calibtrain.pipeline.quantize_table import Side, compare
from calibtrain.pipeline.quantize_words import print_table
from calibtrain.pipeline.question import shapes_of
from calibtrain.quantization import run as quantization
from calibtrain.quantization.run import METHODS, Settings, quantize_directory
from calibtrain.records import Record

logger = logging.getLogger(__name__)

FACTS_FILE = "facts.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it. `path` is the artefact, or None where it was refused."""

    path: Path | None
    content: dict[str, Any]  # of quantization.json
    calibrated: Calibrated
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Quantized:
    """The quantised model as measured, still in the work directory."""

    facts: dict[str, Any]  # of quantize_directory
    measured: dict[str, Measurement]
    calibrated: Calibrated
    hashes: tuple[str, str]  # template, weights
    costs: dict[str, Any]  # before and after


def run(source: Path, asked: Asked) -> Outcome:
    """Quantise, calibrate, certify, compare, and hand over what `asked.keep` allows.

    Raises UserError for whatever can be found wrong before the work, and for a full disk. Interrupted, the same command
    goes on where it was.
    """
    if asked.method not in METHODS:
        raise UserError(f"--method: {asked.method!r} is none of {', '.join(METHODS)}")
    subject = subject_of(source, asked)
    prepared = prepare(subject.config)
    calibrate.check_strata(subject.config, prepared.splits)
    if not prepared.splits["test"]:
        raise UserError("data.splits.test: 0 questions; the comparison needs some")
    samples = samples_of(asked.samples, len(prepared.splits["calibration"]))
    quantization.check(subject.model, _settings(subject, asked))
    check_space(subject, asked.scheme, rotate=asked.rotate)
    try:
        return _run(subject, asked, prepared, samples)
    except Exception as error:
        if not _is_full_disk(error):
            raise
        raise UserError(
            f"{subject.work}: no space left on the disk, and nothing is written to {subject.target}; make room and run "
            f"the same command, which goes on where it was, or delete {subject.work}"
        ) from error


def _is_full_disk(error: Exception) -> bool:
    """Whether there was no room to write. safetensors says so in words alone."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(f"(os error {one})" in str(error) for one in numbers)


def _run(subject: Subject, asked: Asked, prepared: Prepared, samples: int) -> Outcome:
    if samples < USUAL:
        logger.warning("%d calibration questions: with fewer than %d results depend on the draw", samples, USUAL)
    subject.work.mkdir(parents=True, exist_ok=True)
    chosen = choose_calibration_set(prepared.splits["calibration"], samples)
    full = full_precision(subject, prepared, chosen)
    promised = _promised(subject.config, full.calibrated)
    made = _measured(subject, asked, prepared, full, promised)
    table = compare(
        side_of(promised, full.measured, full.calibrated, full.calibrated.calibrator),
        side_of(promised, made.measured, made.calibrated, full.calibrated.calibrator),
        risk=promised.abstention.target_risk,
        delta=promised.abstention.delta,
    )
    checks = check(asked.keep or {}, table["rows"])
    content = {
        "format": FORMAT,
        "source": str(subject.run or subject.model),
        "source_hash": full.weights_hash,
        "model_hash": made.hashes[1],
        "template_hash": made.hashes[0],
        "scheme": asked.scheme.name,
        "label": made.facts.get("label", asked.scheme.label),  # the group that was taken may be smaller
        "method": asked.method,
        "settings": {**asked.settings(), "samples": samples, "seed": subject.config.seed},
        "calibration_set": _make_up(chosen, prepared),
        "quantization": made.facts,
        "table": table,
        "keep": [one.as_dict() for one in checks],
        "cost": made.costs,
        "calibrator_before": full.calibrated.calibrator.as_dict(),
        "certificate_before": _certificate(full.calibrated),
        "certificate": _certificate(made.calibrated),
        "certification": made.calibrated.certification.reason,
        "made_with": {"versions": versions(), "git": git_hash(), "data_hash": prepared.data_hash},
    }
    return _handed_over(subject, asked, content, made, full, checks)


def _promised(config: RunConfig, before: Calibrated) -> RunConfig:
    """The config with the promise that the full-precision model makes: `certify` may have taken another than its own."""
    certificate, groups = before.certification.certificate, before.groups
    update: dict[str, Any] = {} if groups is None else {"groups": groups.by}
    if certificate is not None:
        update |= {"target_risk": certificate.target_risk, "delta": certificate.delta}
    return config.model_copy(update={"abstention": config.abstention.model_copy(update=update)})


def _measured(subject: Subject, asked: Asked, prepared: Prepared, full: Full, promised: RunConfig) -> Quantized:
    """Quantise, let the quantised model answer, and calibrate and certify it by these answers alone."""
    work, config = subject.work, subject.config.model_copy(update={"output_dir": subject.target})
    facts = _quantized(subject, asked, full)
    dump_config(config, work / "config.yaml")
    memory = Memory()
    loaded = Loaded(config, work / "model")
    hashes = (loaded.template.hash, weights_hash(work / "model"))
    mark, measured, states = made_by(hashes[1], hashes[0]), {}, {}
    for split in (*calibrate.SPLITS, "test"):
        path, records = work / "answers" / f"{split}.jsonl", prepared.splits[split]
        if kept_answers(path, mark, records) is None:
            found = with_progress(loaded, records, (), f"answering {split}, quantised")
            states[split] = found.states
            write_measurement(found, path, mark)
        elif split in calibrate.SPLITS:
            states[split] = outside.states_of(loaded, records)
        measured[split] = replace(read_measurement(path), states=states.get(split))  # as rounded there
    after = cost(work / "model", loaded, memory.peak())
    before, test = dict(full.cost), prepared.splits["test"]
    if alternating := has_room(subject.model):
        other = Loaded(config, subject.model)
        taken = speeds((other, loaded), test)
    else:
        (second,) = speeds((loaded,), test)
        del loaded
        other = Loaded(config, subject.model)
        taken = [*speeds((other,), test), second]
    before["tokens_per_second"], after["tokens_per_second"] = taken
    costs = {"before": before, "after": after, "alternating": alternating}
    calibrated = _calibrated(promised, prepared, measured, hashes, work)
    return Quantized(facts, measured, calibrated, hashes, costs)


def _quantized(subject: Subject, asked: Asked, full: Full) -> dict[str, Any]:
    """Quantise under a progress bar, unless an interrupted run of the same settings has. Returns the facts of it."""
    from rich.console import Console
    from rich.progress import Progress

    target, path = subject.work / "model", subject.work / FACTS_FILE
    settings = _settings(subject, asked)
    known = [full.weights_hash, asdict(settings), file_hash(subject.work / TEXTS_FILE)]
    key = hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()
    kept = _kept_facts(path, key, target)
    if kept is not None:
        return kept
    shutil.rmtree(target, ignore_errors=True)  # of other settings
    console = Console(stderr=True)
    label = f"quantising, {asked.method}: {asked.scheme.label}"
    if not console.is_terminal:
        console.print(label, highlight=False)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(label, total=None)

        def on_block(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        try:
            facts = quantize_directory(subject.model, target, full.texts, settings, on_block=on_block)
        except UserError:  # what was asked for cannot be: nothing here is worth going on with
            shutil.rmtree(subject.work, ignore_errors=True)
            raise
    write_json(path, {"key": key, "model_hash": weights_hash(target), "facts": facts})
    return facts


def _settings(subject: Subject, asked: Asked) -> Settings:
    return Settings(
        scheme=asked.scheme,
        method=asked.method,
        ignore=tuple(asked.ignore),
        alpha=asked.strength,
        rotate=asked.rotate,
        seed=subject.config.seed,
        trust_remote_code=subject.config.model.trust_remote_code,
    )


def _kept_facts(path: Path, key: str, model: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        same = kept["key"] == key and kept["model_hash"] == weights_hash(model)
        return dict(kept["facts"]) if same else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def _calibrated(
    config: RunConfig, prepared: Prepared, measured: dict[str, Measurement], hashes: tuple[str, str], work: Path
) -> Calibrated:
    """Calibrator and certificates of the quantised model's own answers; the old ones play no part."""
    if config.calibration.method == "base_alignment":
        base = with_progress(Loaded(config), prepared.splits["temperature"], prepared.shots, "answering with the base")
        calibrator = calibrate.align(measured["temperature"], base, *hashes)
    else:
        calibrator = calibrate.fit(config, measured["temperature"], *hashes)
    promise = config.abstention
    detector, why = calibrate.detector_of(
        config, {split: measured[split].states for split in calibrate.SPLITS}, *hashes
    )
    held_out = outside.marked(measured["certification"], detector)
    write_measurement(held_out, work / "answers" / "certification.jsonl", made_by(hashes[1], hashes[0]))
    parts = fit_answer_parts(measured["temperature"].answers, *hashes)
    found = calibrate.certified(config, calibrator, held_out, promise.target_risk, promise.delta, parts=parts)
    facts = {
        "fitted_on": file_hash(work / "answers" / "temperature.jsonl"),
        "shapes": shapes_of(prepared.splits["certification"]).as_dict(),
        "parts": outside.write(detector, work),
        **outside.facts(detector, why),
    }
    data_hashes = {split: data_hash(prepared.splits[split]) for split in calibrate.SPLITS}
    write_calibration(work / "calibration.json", found, config, data_hashes, facts)
    return found


def side_of(config: RunConfig, measured: Mapping[str, Measurement], calibrated: Calibrated, old: Calibrator) -> Side:
    """One column of the table; `old`: the calibrator of the full-precision model."""
    test, held_out = (measured[split].scores(config.calibration.domain) for split in ("test", "certification"))
    own = calibrated.calibrator
    return Side(
        measured["test"].answers,
        old.apply(test),
        own.apply(test),
        (measured["certification"].answers, own.apply(held_out)),
        calibrated.certification,
    )


def _make_up(chosen: Sequence[Record], prepared: Prepared) -> dict[str, Any]:
    """What the model was quantised by."""
    source = [one for name in (*calibrate.SPLITS, "calibration", "test") for one in prepared.splits[name]]
    return {"n": len(chosen), "data_hash": data_hash(chosen), "verdict": composition_distance(chosen, source).verdict}


def _certificate(calibrated: Calibrated) -> dict[str, Any] | None:
    found = calibrated.certification.certificate
    return None if found is None else found.as_dict()


def _handed_over(
    subject: Subject, asked: Asked, content: dict[str, Any], made: Quantized, full: Full, checks: list[Check]
) -> Outcome:
    """Print the table, then move the artefact to its place, or keep what was measured alone where too much is lost."""
    from calibtrain.pipeline import collect

    print_table(content)
    scheme = asked.scheme
    if not all(one.kept for one in checks):
        write_json(subject.refused / DATA_FILE, content)
        shutil.rmtree(subject.work)
        why = refusal(checks, scheme.name, scheme.group_size, asked.method, METHODS)
        earlier = f"; {subject.target} stays as it was" if subject.target.exists() else ""
        return Outcome(None, content, made.calibrated, f"{why}. Measured: {subject.refused / DATA_FILE}{earlier}")
    work = subject.work
    answers = work / "answers" / FULL_ANSWERS
    write_measurement(full.measured["test"], answers, made_by(full.weights_hash, full.template_hash))
    write_json(work / DATA_FILE, content)
    collect.run(work)
    for name in (TEXTS_FILE, FACTS_FILE):
        (work / name).unlink(missing_ok=True)
    _move(work, subject.target)
    shutil.rmtree(subject.refused, ignore_errors=True)  # of an earlier try
    calibrate.show(made.calibrated, subject.target / "calibration.json", written=True)
    return Outcome(subject.target, content, made.calibrated)


def _move(work: Path, target: Path) -> None:
    """Let `work` take the place of `target`, where an earlier artefact of the same weights may lie."""
    aside = target.with_name(target.name + ".earlier")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.replace(target, aside)
    try:
        os.replace(work, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
