"""The guarantee on a run's own answers: certificates of 200 re-splits are wrong at most as often as delta allows."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from calibtrain.pipeline.measurement import write_measurement
from tests.unit.pipeline.conftest import mark_of, measured

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from certificate_validity import read_run, resplits


@pytest.fixture
def tested(out):
    write_measurement(measured(1000, 3), out / "answers" / "test.jsonl", mark_of(out))
    return out


def test_certificates_of_resplits_hold(tested):
    found = resplits(tested, splits=200)
    assert (found["n"], found["target_risk"], found["delta"], found["splits"]) == (1200, 0.1, 0.05, 200)
    assert found["certified"] > 0.9
    assert found["violation_rate"] * 200 <= binom.ppf(0.999, 200, found["delta"])


def test_a_certificate_that_is_not_these_answers_own_would_be_seen(tested, monkeypatch):
    """The test can fail: with a threshold for twice the risk the same count finds it out."""
    import certificate_validity

    certify = certificate_validity.certify
    monkeypatch.setattr(
        certificate_validity, "certify",
        lambda q, y, risk, delta: replace(
            found := certify(q, y, 2 * risk, delta), certificate=replace(found.certificate, risk_bound=risk)
        ),
    )  # fmt: skip
    assert resplits(tested, splits=40)["violation_rate"] > 0.5


def test_the_pool_is_what_the_calibrator_has_not_seen(tested):
    confidence, correct = read_run(tested)
    assert len(confidence) == len(correct) == 2200
    lines = (tested / "answers" / "test.jsonl").read_text().splitlines()
    assert correct[1200:].tolist() == [json.loads(line)["correct"] for line in lines]
    assert np.all((confidence >= 0) & (confidence <= 1))
