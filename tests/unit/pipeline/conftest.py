"""A calibrated run without a model, for commands that work on its files."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from calibtrain.calibration.scores import TEMPERATURE_GRID, UNSCALED
from calibtrain.confidence.answer import Answer
from calibtrain.config_file import dump_config
from calibtrain.pipeline import calibrate
from calibtrain.pipeline.calibration_file import file_hash, made_by, weights_hash, write_calibration
from calibtrain.pipeline.measurement import Measurement, read_measurement, write_measurement
from tests.unit.pipeline.test_calibrate import config_of


def measured(n, seed):
    """Answers between two options, right as often as the model says at temperature 1.5."""
    rng = np.random.default_rng(seed)
    logit = np.abs(rng.normal(0, 5, n))
    table = -np.log1p(np.exp(-logit[:, None] / np.array(TEMPERATURE_GRID)))
    right = rng.random(n) < 1 / (1 + np.exp(-logit / 1.5))
    answers = [
        Answer(f"q{seed}-{i}", "?", "a", (float(table[i, UNSCALED]),), bool(right[i]), ("a",),
               {"side": "left" if i % 3 else "right", "each": str(i)})
        for i in range(n)
    ]  # fmt: skip
    return Measurement(answers, table)


TEMPLATE = "t" * 64
SPLITS = {"train": 10, "calibration": 0, "temperature": 0, "certification": 0, "test": 0}


def mark_of(out):
    """What a line of answers by the run's own model carries."""
    return made_by(weights_hash(out / "model"), TEMPLATE)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The run that every test gets a copy of."""
    tmp_path = tmp_path_factory.mktemp("made")
    (tmp_path / "model").mkdir()
    save_file({"w": np.ones(3)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"rope_theta": 1, "transformers_version": "5"}')
    rows = [{"question": f"What is {i}?", "answers": ["a"]} for i in range(40)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(
        "temperature",
        data={"source": {"kind": "file", "path": tmp_path / "questions.jsonl"}, "splits": SPLITS},
        target_hallucination=0.1,
        target_risk=0.1,
    )
    dump_config(config, tmp_path / "config.yaml")
    fitting, held_out = (measured(1200, seed) for seed in (0, 1))
    write_measurement(fitting, tmp_path / "answers" / "temperature.jsonl", mark_of(tmp_path))
    write_measurement(held_out, tmp_path / "answers" / "certification.jsonl", mark_of(tmp_path))
    held_out = read_measurement(tmp_path / "answers" / "certification.jsonl")
    calibrator = calibrate.fit(config, fitting, TEMPLATE, weights_hash(tmp_path / "model"))
    found = calibrate.certified(config, calibrator, held_out, 0.1, 0.05)
    files = {"fitted_on": "temperature", "certified_on": "certification"}
    facts = {fact: file_hash(tmp_path / "answers" / f"{split}.jsonl") for fact, split in files.items()}
    hashes = {"temperature": "a", "certification": "b"}
    write_calibration(tmp_path / "calibration.json", found, config, hashes, facts)
    content = json.loads((tmp_path / "calibration.json").read_text())
    (tmp_path / "calibration.json").write_text(json.dumps(content | {"of_another_command": [1]}))
    return tmp_path


@pytest.fixture
def out(made, tmp_path):
    """A calibrated run: no model that could answer, but its weights' hash."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path
