"""A calibrated run without a model, for commands that work on its files."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from calibtrain.calibration.scores import TEMPERATURE_GRID, UNSCALED
from calibtrain.confidence.answer import Answer
from calibtrain.config_file import dump_config
from calibtrain.pipeline import calibrate
from calibtrain.pipeline.evaluate import Measurement, read_measurement, write_measurement
from tests.unit.pipeline.test_calibrate import config_of


def measured(n, seed):
    """Answers between two options, right as often as the model says at temperature 1.5."""
    rng = np.random.default_rng(seed)
    logit = np.abs(rng.normal(0, 5, n))
    table = -np.log1p(np.exp(-logit[:, None] / np.array(TEMPERATURE_GRID)))
    right = rng.random(n) < 1 / (1 + np.exp(-logit / 1.5))
    answers = [
        Answer(f"q{seed}-{i}", "?", "a", (float(table[i, UNSCALED]),), bool(right[i]), ("a",),
               {"side": "left" if i % 3 else "right"})
        for i in range(n)
    ]  # fmt: skip
    return Measurement(answers, table)


@pytest.fixture
def out(tmp_path):
    """A calibrated run: no model that could answer, but its weights' hash."""
    (tmp_path / "model").mkdir()
    save_file({"w": np.ones(3)}, tmp_path / "model" / "model.safetensors")
    config = config_of("temperature", target_hallucination=0.1, target_risk=0.1)
    dump_config(config, tmp_path / "config.yaml")
    fitting, held_out = (measured(1200, seed) for seed in (0, 1))
    write_measurement(fitting, tmp_path / "answers" / "temperature.jsonl")
    write_measurement(held_out, tmp_path / "answers" / "certification.jsonl")
    held_out = read_measurement(tmp_path / "answers" / "certification.jsonl")
    calibrator = calibrate.fit(config, fitting, "t" * 64, calibrate.weights_hash(tmp_path / "model"))
    found = calibrate.certified(config, calibrator, held_out, 0.1, 0.05)
    calibrate.write_calibration(
        tmp_path / "calibration.json", found, config, {"temperature": "a", "certification": "b"}
    )
    content = json.loads((tmp_path / "calibration.json").read_text())
    (tmp_path / "calibration.json").write_text(json.dumps(content | {"of_another_command": [1]}))
    return tmp_path
