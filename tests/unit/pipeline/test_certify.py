"""Certificates refitted from kept answers: only what was asked for changes, and wrong answers are refused."""

import json
from dataclasses import replace

import pytest

from calibtrain.errors import UserError
from calibtrain.pipeline import calibrate, certify
from calibtrain.pipeline.collect import report_data
from calibtrain.pipeline.evaluate import Measurement, read_measurement, write_measurement
from calibtrain.pipeline.report import render_report
from tests.unit.pipeline.conftest import measured


def content(out):
    return json.loads((out / "calibration.json").read_text())


def test_asking_for_nothing_changes_nothing(out):
    before = content(out)
    certify.run(out)
    assert content(out) == before


def test_risk_delta_and_groups_are_those_asked_for_and_the_rest_stays(out):
    before = content(out)
    found = certify.run(out, risk=0.15, delta=0.1, by="side")
    after = content(out)
    assert (after["certificate"]["target_risk"], after["certificate"]["delta"]) == (0.15, 0.1)
    assert after["certificate"]["n"] == 1200
    assert after["certificate"]["coverage"] > before["certificate"]["coverage"]
    assert {name for name, value in before.items() if after[name] != value} == {
        "certificate", "certification", "curve", "groups",
    }  # fmt: skip
    assert set(after["groups"]["groups"]) == {"left", "right"}
    assert after["groups"]["share"] == 0.05
    assert calibrate.read_calibration(out) == found


def test_the_report_speaks_of_the_certificate_and_not_of_the_config(out):
    """Its promise is the certificate's risk and delta, whatever the config asked for when the run began."""
    certify.run(out, risk=0.15, delta=0.1)
    write_measurement(measured(300, 3), out / "answers" / "test.jsonl")
    (out / "run.json").write_text(json.dumps({"versions": {}, "git": None, "data_hash": None}))
    data = report_data(out)
    assert (data.target_risk, data.delta) == (0.15, 0.1)
    assert "With probability 90% all of these hold together" in render_report(data)


def test_group_certificates_survive_a_later_call_that_does_not_ask_for_them(out):
    groups = certify.run(out, by="side", risk=0.3).groups
    assert certify.run(out, risk=0.25).groups == groups
    found = certify.run(out, hallucination=0.05).hallucination
    assert found.target_rate == 0.05
    assert found.n_wrong <= 0.05 * 1201


def test_new_answers_are_certified_and_named_by_their_hash(out, tmp_path):
    new = measured(900, 2)
    write_measurement(new, tmp_path / "new.jsonl")
    found = certify.run(out, answers=tmp_path / "new.jsonl", risk=0.3)
    assert found.certification.certificate.n == 900
    assert content(out)["data_hashes"]["temperature"] == "a"
    assert content(out)["data_hashes"]["certification"] != "b"


def test_without_a_certificate_the_reason_is_written(out):
    found = certify.run(out, risk=0.001)
    assert found.certification.certificate is None
    assert content(out)["certificate"] is None
    assert "needs at least" in content(out)["certification"]


@pytest.mark.parametrize(
    ("spoil", "by", "words"),
    [
        (lambda a: replace(a, correct=None), None, ":2: `correct` is null"),
        (lambda a: replace(a, question_id="q0-5"), None, ":2: the calibrator was fitted on this question"),
        (lambda a: replace(a, strata={"continent": "Asia"}), "side", ":2: `strata` has no 'side' to group by; .* continent"),
    ],
)  # fmt: skip
def test_answers_that_cannot_certify_are_refused_and_nothing_is_written(spoil, by, words, out, tmp_path):
    before = content(out)
    new = measured(100, 2)
    write_measurement(
        Measurement([new.answers[0], spoil(new.answers[1]), *new.answers[2:]], new.table), tmp_path / "n.jsonl"
    )
    assert len(read_measurement(tmp_path / "n.jsonl").answers) == 100
    with pytest.raises(UserError, match=words):
        certify.run(out, answers=tmp_path / "n.jsonl", by=by)
    assert content(out) == before
