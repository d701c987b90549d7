"""Every calibrator that a config can name, from graded answers to calibration.json and back."""

import json
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import save_file

from calibtrain.calibration.scores import TEMPERATURE_GRID, UNSCALED, TokenScores
from calibtrain.confidence.answer import Answer
from calibtrain.config import CalibrationConfig, RunConfig
from calibtrain.config_file import dump_config
from calibtrain.errors import UserError
from calibtrain.pipeline import calibrate
from calibtrain.pipeline.calibration_file import write_calibration
from calibtrain.pipeline.measurement import Measurement, read_measurement, write_measurement

METHODS = get_args(CalibrationConfig.model_fields["method"].annotation)


def measured(n=300, seed=0, options=False):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2.5, (2 * n, 1, 30)) / np.array(TEMPERATURE_GRID)[None, :, None]
    tokens = -np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))
    owner = np.repeat(np.arange(n), 2)
    table = tokens[::2] + tokens[1::2]
    right = rng.random(n) < np.exp(table[:, UNSCALED + 2])
    likelier = 0.5 + 0.5 * np.exp(table[:, UNSCALED])
    answers = [
        Answer(f"q{seed}-{i}", "?", "a", tuple(tokens[2 * i : 2 * i + 2, UNSCALED]), bool(right[i]),
               ("a",) if right[i] else ("b",), {"side": "left" if i % 3 else "right"},
               **({"options": ("a", "b"), "option_logprobs": (math.log(p), math.log(1 - p))} if options else {}))
        for i, p in enumerate(likelier)
    ]  # fmt: skip
    return Measurement(answers, table, TokenScores(tokens, rng.normal(0, 1, (2 * n, 5)), owner))


def config_of(method, data=None, **abstention):
    domain = "side" if method == "domain_temperature" else None
    return RunConfig(calibration={"method": method, "domain": domain}, abstention=abstention, data=data or {})


@pytest.fixture
def output(tmp_path):
    (tmp_path / "model").mkdir()
    save_file({"w": np.ones(3)}, tmp_path / "model" / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_to_the_file_and_back(method, output):
    config = config_of(method, target_hallucination=0.1, groups="side", target_risk=0.4, words="ipcc")
    dump_config(config, output / "config.yaml")
    hashes = ("t" * 64, calibrate.weights_hash(output / "model"))
    options = method.endswith("_scaling")
    fitting = measured(options=options)
    if method == "base_alignment":
        calibrator = calibrate.align(fitting, measured(), *hashes)
    else:
        calibrator = calibrate.fit(config, fitting, *hashes)
    assert calibrator.method == method
    held_out = measured(seed=1, options=options)
    found = calibrate.certified(config, calibrator, held_out, 0.4, 0.05)
    assert (found.prediction_sets is not None) == options
    write_calibration(output / "calibration.json", found, config, {})
    assert calibrate.read_calibration(output, template_hash="t" * 64) == found
    content = json.loads((output / "calibration.json").read_text())
    assert content["words"][0]["name"] == "exceptionally unlikely"
    assert set(content["groups"]["groups"]) == {"left", "right"}
    assert content["groups"]["share"] == 0.025
    assert found.hallucination.n_wrong / 300 <= 0.1
    write_measurement(held_out, output / "answers" / "test.jsonl")
    again = read_measurement(output / "answers" / "test.jsonl")
    assert calibrator.apply(again.scores(config.calibration.domain)) == pytest.approx(
        calibrator.apply(held_out.scores(config.calibration.domain)), abs=1e-5
    )
    with pytest.raises(UserError, match="template"):
        calibrate.read_calibration(output, template_hash="other")


def test_graded_answers_go_to_the_file_and_back_whatever_characters_they_hold(tmp_path):
    marks = "".join(map(chr, [*range(32), 0x7F, 0x85, 0xA0, 0x2028, 0x2029, 0xFEFF, 0xFFFD, 0x1F600])) + '\ud83d"\\'
    found = measured(n=3)
    answers = [
        replace(one, question=f"a{marks}b", text=marks + "c", accepted=(marks + "d",), strata={marks + "k": marks})
        for one in found.answers
    ]
    write_measurement(replace(found, answers=answers), tmp_path / "test.jsonl")
    assert read_measurement(tmp_path / "test.jsonl").answers == answers


def test_nothing_beyond_the_threshold_is_certified_unless_asked_for():
    config = config_of("temperature")
    found = calibrate.certified(config, calibrate.fit(config, measured(), "t", "w"), measured(seed=1), 0.2, 0.05)
    assert (found.hallucination, found.groups) == (None, None)


def test_a_domain_is_named_with_the_method_that_uses_it():
    for values in ({"method": "domain_temperature"}, {"domain": "side"}):
        with pytest.raises(ValueError, match="go together"):
            CalibrationConfig(**values)
