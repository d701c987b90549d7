"""Certificates refitted from kept answers: only what was asked for changes, and wrong answers are refused."""

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from calibtrain import cli
from calibtrain.errors import UserError
from calibtrain.pipeline import calibrate, certify
from calibtrain.pipeline.collect import report_data
from calibtrain.pipeline.measurement import Measurement, read_measurement, write_measurement
from calibtrain.pipeline.report import render_report
from calibtrain.records import Message, Record
from tests.unit.pipeline.conftest import mark_of, measured

TRAINED = Record(prompt=(Message("user", "What is 18?"),)).id  # in the fixture's training split


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
    write_measurement(measured(300, 3), out / "answers" / "test.jsonl", mark_of(out))
    (out / "run.json").write_text(json.dumps({"versions": {}, "git": None, "data_hash": None}))
    data = report_data(out)
    assert (data.target_risk, data.delta) == (0.15, 0.1)
    assert "With probability 90% all of these hold together" in render_report(data)


def test_groups_keep_no_easier_promise_than_the_certificate(out):
    easy = certify.run(out, by="side", risk=0.3).groups
    strict = certify.run(out, risk=0.1).groups
    assert {one.certificate.target_risk for one in strict.groups.values()} == {0.1}
    assert strict.groups["left"].certificate.threshold > easy.groups["left"].certificate.threshold
    found = certify.run(out, hallucination=0.05).hallucination
    assert found.target_rate == 0.05
    assert found.n_wrong <= 0.05 * 1201


def test_new_answers_are_certified_and_named(out, tmp_path):
    new = measured(900, 2)
    write_measurement(new, tmp_path / "new.jsonl", mark_of(out))
    found = certify.run(out, answers=tmp_path / "new.jsonl", risk=0.3)
    assert found.certification.certificate.n == 900
    assert content(out)["data_hashes"]["temperature"] == "a"
    assert content(out)["data_hashes"]["certification"] != "b"
    assert content(out)["scope"] == {"source": "new.jsonl", "n": 900, "examples": ["?"]}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"risk": 0.001}, "no certificate: .* needs at least"),
        ({"hallucination": 0.0001}, "no hallucination certificate: 1200 graded answers are too few"),
        ({"by": "each"}, "no certificate by each: none of the groups"),
    ],
)
def test_what_cannot_be_certified_ends_with_1_and_leaves_the_valid_certificate(asked, words, out):
    before = (out / "calibration.json").read_bytes()
    call = ["certify", str(out), *(f"--{key}={value}" for key, value in asked.items())]
    done = CliRunner().invoke(cli.app, call)
    assert done.exit_code == 1
    assert re.search(words, " ".join(done.output.split()))
    assert "nothing is written" in done.output
    assert (out / "calibration.json").read_bytes() == before
    assert CliRunner().invoke(cli.app, ["certify", str(out)]).exit_code == 0


@pytest.mark.parametrize(
    ("spoil", "by", "words"),
    [
        (lambda a: replace(a, question_id="q2-0"), None, ":2: this question .* occurs twice"),
        (lambda a: replace(a, question_id=TRAINED), None, ":2: the model was trained on this question"),
        (lambda a: replace(a, question_id="another", asked=TRAINED), None, ":2: the model was trained on this question"),
        (lambda a: replace(a, question_id="another", asked="q2-0"), None, ":2: this question .* occurs twice"),
        (lambda a: replace(a, question_id="another", asked="q0-5"), None, ":2: the calibrator was fitted on this question"),
        (lambda a: replace(a, correct=None), None, ":2: `correct` is null"),
        (lambda a: replace(a, question_id="q0-5"), None, ":2: the calibrator was fitted on this question"),
        (lambda a: replace(a, strata={"continent": "Asia"}), "side", ":2: `strata` has no 'side' to group by; .* continent"),
    ],
)  # fmt: skip
def test_answers_that_cannot_certify_are_refused_and_nothing_is_written(spoil, by, words, out, tmp_path):
    before = content(out)
    new = measured(100, 2)
    write_measurement(
        Measurement([new.answers[0], spoil(new.answers[1]), *new.answers[2:]], new.table),
        tmp_path / "n.jsonl",
        mark_of(out),
    )
    assert len(read_measurement(tmp_path / "n.jsonl").answers) == 100
    with pytest.raises(UserError, match=words):
        certify.run(out, answers=tmp_path / "n.jsonl", by=by)
    assert content(out) == before


def test_a_certificate_by_grades_that_were_mended_does_not_outlive_them(out):
    path = out / "answers" / "certification.jsonl"
    found = read_measurement(path)
    certify.run(out, risk=0.001)  # in vain, and the grades are those of the certificate: it stays
    assert content(out)["certificate"] is not None
    mended = [replace(one, correct=i % 2 == 0) for i, one in enumerate(found.answers)]
    write_measurement(replace(found, answers=mended), path, mark_of(out))
    assert certify.run(out).failures
    assert content(out)["certificate"] is None
    write_measurement(found, path, mark_of(out))
    assert not certify.run(out).failures


@pytest.mark.parametrize("regraded", [True, False])
def test_mended_grades_in_a_file_of_their_own_take_the_certificate_too(regraded, out, tmp_path):
    """Answers to other questions, by which nothing can be certified, say nothing of those that it rests on."""
    found = read_measurement(out / "answers" / "certification.jsonl") if regraded else measured(900, 2)
    mended = [replace(one, correct=i % 2 == 0) for i, one in enumerate(found.answers)]
    write_measurement(replace(found, answers=mended), tmp_path / "mended.jsonl", mark_of(out))
    assert certify.run(out, answers=tmp_path / "mended.jsonl").failures
    assert (content(out)["certificate"] is None) == regraded


def test_a_certificate_by_answers_that_were_given_falls_with_their_grades(out, tmp_path):
    given, kept = measured(900, 2), read_measurement(out / "answers" / "certification.jsonl")
    write_measurement(given, tmp_path / "given.jsonl", mark_of(out))
    assert not certify.run(out, answers=tmp_path / "given.jsonl", risk=0.3).failures
    for regraded in (kept, given):  # it no longer rests on the kept ones
        mended = [replace(one, correct=i % 2 == 0) for i, one in enumerate(regraded.answers)]
        write_measurement(replace(regraded, answers=mended), tmp_path / "given.jsonl", mark_of(out))
        assert certify.run(out, answers=tmp_path / "given.jsonl", risk=0.3).failures
        assert (content(out)["certificate"] is None) == (regraded is given)


@pytest.mark.parametrize("mark", [None, "0123456789abcdef"])
def test_answers_of_another_or_an_unknown_model_certify_nothing(mark, out, tmp_path):
    before = content(out)
    write_measurement(measured(900, 2), tmp_path / "new.jsonl", mark)
    with pytest.raises(UserError, match="not known to be answers of this model"):
        certify.run(out, answers=tmp_path / "new.jsonl", risk=0.3)
    assert content(out) == before


def test_the_questions_that_fitted_the_calibrator_must_be_known(out):
    fitted_on = out / "answers" / "temperature.jsonl"
    write_measurement(measured(50, 5), fitted_on, mark_of(out))
    with pytest.raises(UserError, match="not the answers that the calibrator was fitted on"):
        certify.run(out)
    fitted_on.unlink()
    with pytest.raises(UserError, match="not the answers that the calibrator was fitted on"):
        certify.run(out)


@pytest.mark.parametrize(
    ("spoiled", "words"), [(b"\xff\xfe\x00", "not UTF-8"), (b'"correct": "false"', ":1: .*`correct` is 'false'")]
)
def test_a_binary_file_and_a_grade_in_words_are_named(spoiled, words, out, tmp_path):
    write_measurement(measured(9, 2), tmp_path / "new.jsonl", mark_of(out))
    whole = (tmp_path / "new.jsonl").read_bytes()
    changed = whole.replace(b'"correct": true', spoiled).replace(b'"correct": false', spoiled)
    (tmp_path / "new.jsonl").write_bytes(changed if b"correct" in spoiled else spoiled)
    with pytest.raises(UserError, match=words):
        certify.run(out, answers=tmp_path / "new.jsonl")
