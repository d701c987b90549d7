"""The auxiliary network of a finished run: fitted on one split, calibrated on a second, measured on a third."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibtrain.calibration.calibrators import Calibrator, fit_calibrator
from calibtrain.calibration.intervals import paired_bootstrap, sample_ids
from calibtrain.calibration.metrics import ece
from calibtrain.calibration.ranking import auroc
from calibtrain.calibration.state import CalibrationState, state_of
from calibtrain.confidence.features import (
    POSITIONS,
    Features,
    Fingerprint,
    collect_features,
    default_layers,
    depth_of,
)
from calibtrain.confidence.probe import KINDS, Kind, Probe, cost, fit_probe
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.pipeline.calibration_file import weights_hash
from calibtrain.pipeline.evaluate import Loaded, with_progress
from calibtrain.pipeline.measurement import Measurement, read_measurement, write_measurement
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.pipeline.prepare import prepare
from calibtrain.records import Record

SPLITS = {"fit": "calibration", "calibrate": "temperature", "measure": "test"}
"""What each split of the run is for. The certification split stays untouched."""
BEFORE = "p_ik"
"""P(IK), the probe of the question's last token, which knows no answer yet: its folder in OUT/probe/ and its name."""


def run(
    output_dir: Path, *, layers: tuple[int, ...] | None = None, kind: Kind = "linear", questions: int | None = None
) -> dict[str, Any]:
    """Collect features, fit and measure; writes OUT/probe/. `questions` limits each split. Returns what it measured."""
    config = config_of_run(output_dir)
    model = output_dir / "model"
    if not (model / "config.json").is_file():
        raise UserError(f"{output_dir}: no exported model (model/config.json); train first")
    prepared = prepare(config)
    for use, split in SPLITS.items():
        if not prepared.splits[split]:
            raise UserError(f"data.splits.{split}: 0 questions; a probe needs some to {use}")
    loaded = Loaded(config, model)
    depth = depth_of(loaded.model)
    chosen = default_layers(depth) if layers is None else layers
    fingerprint = Fingerprint(weights_hash(model), loaded.template.hash)
    folder = output_dir / "probe"
    answered: dict[str, Measurement] = {}
    features: dict[str, Features] = {}
    for use, split in SPLITS.items():
        records = prepared.splits[split][:questions]
        answered[use] = _answers(loaded, records, fingerprint, folder / "answers" / f"{split}.jsonl", split)
        features[use] = collect_features(
            loaded.model,
            loaded.template,
            records,
            [answer.said for answer in answered[use].answers],
            folder / "features" / f"{split}-{len(records)}",
            layers=chosen,
            depth=depth,
            fingerprint=fingerprint,
            world=World(0, 1, 0, loaded.device),
            batch_size=config.evaluation.batch_size,
        )
    ids = {use: [answer.question_id for answer in one.answers] for use, one in answered.items()}
    probe = fit_probe(features["fit"], answered["fit"].correct, ids["fit"], kind=kind, seed=config.seed)
    probe.save(folder)
    before = fit_probe(
        features["fit"], answered["fit"].correct, ids["fit"], kind=kind, positions=POSITIONS[:1], seed=config.seed
    )
    before.save(folder / BEFORE)
    uses = ("calibrate", "measure")
    scores, foreseen = ({use: one.score(features[use]) for use in uses} for one in (probe, before))
    likelihood = {use: answered[use].confidence for use in uses}
    calibrated = {}
    for name, found in (("probe", scores), (BEFORE, foreseen), ("likelihood", likelihood)):
        calibrator = fit_platt(found["calibrate"], answered["calibrate"].correct, ids["calibrate"], fingerprint)
        if name == "probe":
            _write(folder / "calibrator.json", calibrator.to_json())
        calibrated[name] = calibrator.apply(found["measure"])
    measured = {
        "n": len(scores["measure"]),
        "kind": kind,
        "layer": probe.layer,
        "position": probe.position,
        "cost": cost(features["measure"]),
        "raw": compare(likelihood["measure"], scores["measure"], answered["measure"].correct, ids["measure"]),
        "calibrated": compare(
            calibrated["likelihood"], calibrated["probe"], answered["measure"].correct, ids["measure"]
        ),
        BEFORE: {
            "layer": before.layer,
            "raw": compare(likelihood["measure"], foreseen["measure"], answered["measure"].correct, ids["measure"]),
            "calibrated": compare(
                calibrated["likelihood"], calibrated[BEFORE], answered["measure"].correct, ids["measure"]
            ),
        },
    }
    _write(folder / "measured.json", json.dumps(measured, indent=2))
    _print(measured, folder)
    return measured


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers of "8,16,24"; None without any."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--layers: {text!r} is no list of numbers like 8,16,24") from error


def parse_kind(text: str) -> Kind:
    """Kind of a probe by name."""
    for kind in KINDS:
        if text == kind:
            return kind
    raise UserError(f"--kind: {text!r} is none of {', '.join(KINDS)}")


def load(output_dir: Path, template_hash: str) -> tuple[Probe, Calibrator]:
    """Probe of a run and the calibrator of its scores. UserError when they are missing or of another model."""
    fingerprint = Fingerprint(weights_hash(output_dir / "model"), template_hash)
    folder = output_dir / "probe"
    probe = Probe.load(folder, fingerprint)
    try:
        text = (folder / "calibrator.json").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder}: no calibrator of the probe ({error}); run `calibtrain probe {output_dir}`"
        ) from error
    return probe, Calibrator.from_json(text, **asdict(fingerprint))


def load_probes(output_dir: Path, fingerprint: Fingerprint) -> dict[str, Probe]:
    """The run's probes by the name of their source; none without `calibtrain probe`."""
    folders = {"probe": output_dir / "probe", BEFORE: output_dir / "probe" / BEFORE}
    return {name: Probe.load(one, fingerprint) for name, one in folders.items() if (one / "probe.json").is_file()}


def fit_platt(
    score: NDArray[np.float64], correct: NDArray[np.bool_], ids: list[str], fingerprint: Fingerprint
) -> Calibrator:
    """Platt's map of a score in [0, 1]: two numbers, so that it keeps the order."""
    return fit_calibrator("platt", score, correct, ids=sample_ids(ids), **asdict(fingerprint))


def compare(
    likelihood: NDArray[np.float64], probe: NDArray[np.float64], correct: NDArray[np.bool_], ids: list[str]
) -> dict[str, dict[str, Any]]:
    """AUROC and ECE of both on the same answers, with the paired bootstrap interval of probe minus likelihood."""
    grades = correct.astype(np.float64)
    difference = paired_bootstrap(_metrics, (likelihood, grades), (probe, grades), sample_ids(ids))
    before, after = (_metrics(state_of(torch.from_numpy(one), torch.from_numpy(grades))) for one in (likelihood, probe))
    return {
        name: {
            "likelihood": before[name],
            "probe": after[name],
            "difference": [interval.estimate, interval.low, interval.high],
        }
        for name, interval in difference.items()
    }


def _metrics(state: CalibrationState) -> dict[str, float]:
    return {"auroc": auroc(state), "ece15": ece(state)}


def _answers(
    loaded: Loaded, records: Sequence[Record], fingerprint: Fingerprint, path: Path, split: str
) -> Measurement:
    """Graded answers to `records`: those of an earlier call of the same model, or new ones."""
    asked = json.dumps({**asdict(fingerprint), "questions": [record.id for record in records]})
    mark = path.with_suffix(".made-by.json")
    if path.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == asked:
        return read_measurement(path)
    measurement = with_progress(loaded, records, (), f"answering {split}")
    mark.unlink(missing_ok=True)
    write_measurement(measurement, path)
    _write(mark, asked)
    return measurement


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _print(measured: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=f"{measured['n']} test questions", title_justify="left")
    for column in ("", "likelihood", "probe", "difference (95%)"):
        table.add_column(column, justify="left" if not column else "right")
    for stage in ("raw", "calibrated"):
        for name, title in (("auroc", "AUROC"), ("ece15", "ECE (15 bins)")):
            row = measured[stage][name]
            estimate, low, high = row["difference"]
            table.add_row(
                f"{title}, {stage}",
                f"{row['likelihood']:.3f}",
                f"{row['probe']:.3f}",
                f"{estimate:+.3f} ({low:+.3f} to {high:+.3f})",
            )
    console.print(table)
    foreseen = measured[BEFORE]["raw"]["auroc"]
    console.print(f"before any answer (p_ik, layer {measured[BEFORE]['layer']}): AUROC {foreseen['probe']:.3f}")
    extra = measured["cost"]
    console.print(
        f"{measured['kind']} probe of layer {measured['layer']}, {measured['position']}; per answer "
        f"{extra['forward_passes']:g} extra forward pass of {extra['tokens']:.0f} tokens"
    )
    console.print(f"written: {folder}")
