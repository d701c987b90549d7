"""A finished run at work: a question in, an answer with its calibrated probability and word out, or an abstention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibtrain.abstention.words import scale_of, word_for
from calibtrain.config_file import load_config
from calibtrain.data.records import Message, Record
from calibtrain.errors import UserError
from calibtrain.pipeline.calibrate import Calibrated, read_calibration
from calibtrain.pipeline.evaluate import Loaded


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. `text` is the model's best guess also where it abstains; show it then only as such."""

    text: str
    probability: float  # calibrated chance that `text` is right
    word: str
    abstained: bool
    threshold: float | None  # None: no certificate
    risk: float | None  # certified share of wrong answers among the given ones
    certified: bool


class Answerer:
    """The model and calibration of a finished run."""

    def __init__(self, loaded: Loaded, calibrated: Calibrated) -> None:
        self.loaded = loaded
        self.calibrated = calibrated

    def answer(self, question: str) -> Reply:
        """Reply to one question. Without a certificate it never abstains and says so in `certified`."""
        if not question.strip():
            raise UserError("the question is empty")
        measurement = self.loaded.measure([Record(prompt=(Message("user", question.strip()),))])
        config = self.loaded.config
        probability = float(self.calibrated.calibrator.apply(measurement.scores(config.calibration.domain))[0])
        certificate = self.calibrated.certification.certificate
        return Reply(
            text=measurement.answers[0].text,
            probability=probability,
            word=word_for(probability, scale_of(config.abstention.words)).name,
            abstained=certificate is not None and probability < certificate.threshold,
            threshold=None if certificate is None else certificate.threshold,
            risk=None if certificate is None else certificate.risk_bound,
            certified=certificate is not None,
        )


def load(output_dir: Path) -> Answerer:
    """Load a finished run. Raises UserError when it lacks a model or a calibration that fits it."""
    config = load_config(output_dir / "config.yaml")
    if not (output_dir / "model" / "config.json").is_file():
        raise UserError(f"{output_dir}: no exported model (model/config.json); train first")
    loaded = Loaded(config, output_dir / "model")
    return Answerer(loaded, read_calibration(output_dir, template_hash=loaded.template.hash))
