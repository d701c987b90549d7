"""The run's detector of questions unlike the graded ones: fitted when it is calibrated, kept beside calibration.json.

It is fitted on the `temperature` questions and calibrated on the `certification` questions, which fitted nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibtrain.confidence.answer import Answer
from calibtrain.confidence.features import Fingerprint, features_of
from calibtrain.confidence.outside import ALPHA, Outside, fit_outside
from calibtrain.errors import UserError
from calibtrain.pipeline.calibration_file import file_hash
from calibtrain.pipeline.evaluate import Loaded
from calibtrain.pipeline.measurement import Measurement, read_measurement
from calibtrain.records import Record

FILE = "outside.safetensors"
SERVED = "a server returns no hidden states"


def states_of(loaded: Loaded, records: Sequence[Record]) -> NDArray[np.float32]:
    """Final states (N, H) of the prompts' last tokens, from a pass over the prompts: for answers whose states are gone."""
    from calibtrain.confidence.features import depth_of

    layer = depth_of(loaded.model)
    found = features_of(
        loaded.model,
        loaded.template,
        records,
        [""] * len(records),
        layers=(layer,),
        fingerprint=Fingerprint("", ""),
        device=loaded.device,
        batch_size=loaded.config.evaluation.batch_size,
    )
    return found.at(layer, "question_last")


def fit(states: Mapping[str, NDArray[np.float32] | None], fingerprint: Fingerprint) -> tuple[Outside | None, str]:
    """The detector of states by split; None and why where there can be none."""
    fitting, held_out = states["temperature"], states["certification"]
    if fitting is None or held_out is None:
        return None, SERVED
    return fit_outside(fitting, held_out, fingerprint)


def marked(measurement: Measurement, detector: Outside | None) -> Measurement:
    """The answers with the p-values of their questions, where their states are known."""
    if detector is None or measurement.states is None:
        return measurement
    found = detector.p_values(measurement.states).tolist()
    answers = [replace(one, outside=p) for one, p in zip(measurement.answers, found, strict=True)]
    return replace(measurement, answers=answers)


def inside(answers: Sequence[Answer]) -> list[int]:
    """Places of the answers whose questions are not told to be outside.

    Held-out scores below the one that an alarm needs are drawn as those of later questions without an alarm are, so a
    certificate by these answers holds for such questions.
    """
    return [place for place, one in enumerate(answers) if one.outside is None or one.outside >= ALPHA]


def facts(detector: Outside | None, why: str) -> dict[str, Any]:
    """What calibration.json says of it."""
    return {"outside": {"n": 0 if detector is None else detector.n, "alpha": ALPHA, "reason": why}}


def write(detector: Outside | None, folder: Path) -> dict[str, str]:
    """Keep the detector, or remove an earlier one. Returns its hash, for the parts that a calibration rests on."""
    path = folder / FILE
    if detector is None:
        path.unlink(missing_ok=True)
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    detector.save(path)
    return {FILE: file_hash(path)}


def read(output_dir: Path, n: int, fingerprint: Fingerprint) -> Outside | None:
    """The detector of a calibration that has one (n > 0). UserError where it is gone, or another model's."""
    if not n:
        return None
    path = output_dir / FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `calibtrain calibrate {output_dir}` again")
    return Outside.load(path, fingerprint)


def told(detector: Outside | None, why: str) -> str:
    """One line for a person."""
    if detector is None:
        return f"questions unlike the graded ones cannot be told: {why}"
    return (
        f"questions unlike the graded ones are told by their hidden state, wrongly at most {ALPHA:.0%} of those like them "
        f"(n={detector.n})"
    )


def of_run(output_dir: Path, fingerprint: Fingerprint) -> tuple[dict[str, Any], dict[str, str], dict[str, float]]:
    """For another source of confidence of the same model: the run's facts, parts, and p-values by question id."""
    try:
        detector = Outside.load(output_dir / FILE, fingerprint)
        answers = read_measurement(output_dir / "answers" / "certification.jsonl").answers
    except UserError:
        return facts(None, "run `calibtrain calibrate` without --source first"), {}, {}
    known = {one.question_id: one.outside for one in answers if one.outside is not None}
    return facts(detector, ""), {FILE: file_hash(output_dir / FILE)}, known
