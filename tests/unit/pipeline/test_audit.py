"""A run whose answers a judge graded: nothing without an audit, a certificate with one, and what spoils it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from calibtrain.abstention.certificate import Certification
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import audit, calibrate, certify
from calibtrain.pipeline.calibration_file import file_hash, read_calibration, weights_hash, write_calibration
from calibtrain.pipeline.head_calibration import calibrate_head
from calibtrain.pipeline.judged import audit_lines, corrected_line
from calibtrain.pipeline.measurement import read_measurement, write_measurement
from calibtrain.pipeline.promise import Promises
from tests.unit.pipeline.conftest import TEMPLATE, mark_of
from tests.unit.pipeline.test_head_calibration import a_head

JUDGE = {"kind": "judge", "judge": {"url": "http://127.0.0.1:1/v1", "model": "big"}}


@pytest.fixture(scope="module")
def judged(made, tmp_path_factory):
    """The run of the other tests, its grades a lenient judge's; `truth.json` holds the right ones."""
    import yaml

    out = tmp_path_factory.mktemp("judged") / "run"
    shutil.copytree(made, out)
    content = yaml.safe_load((out / "config.yaml").read_text())
    content["task"] = JUDGE
    content["output_dir"] = str(out)
    content["abstention"]["target_hallucination"] = None
    (out / "config.yaml").write_text(yaml.safe_dump(content))
    rng, truth = np.random.default_rng(5), {}
    for split in ("temperature", "certification"):
        path = out / "answers" / f"{split}.jsonl"
        found = read_measurement(path)
        truth |= {one.question_id: one.correct for one in found.answers}
        answers = [
            replace(one, correct=None if i == 7 else one.correct or bool(rng.random() < 0.3))
            for i, one in enumerate(found.answers)
        ]
        write_measurement(replace(found, answers=answers), path, mark_of(out))
    (out / "truth.json").write_text(json.dumps(truth))
    config, (fitting, held_out) = load_config(out / "config.yaml"), (
        read_measurement(out / "answers" / f"{split}.jsonl") for split in ("temperature", "certification")
    )  # fmt: skip
    calibrator = calibrate.fit(config, fitting, TEMPLATE, weights_hash(out / "model"))
    found = calibrate.certified(config, calibrator, held_out, 0.1, 0.05)
    facts = {"fitted_on": file_hash(out / "answers" / "temperature.jsonl")}
    write_calibration(out / "calibration.json", found, config, {"temperature": "a", "certification": "b"}, facts)
    return out


@pytest.fixture
def run(judged, tmp_path):
    shutil.copytree(judged, tmp_path / "run")
    return tmp_path / "run"


def filled(out, n, lines=None):
    """An audit whose first lines (default: all) a person has graded."""
    path = audit.run(out, n)
    truth = json.loads((out / "truth.json").read_text())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"correct": truth[row["question_id"]]} if i < (lines or n) else row for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def test_without_an_audit_nothing_is_certified_and_the_reason_is_told(run):
    calibrated = read_calibration(run)
    assert calibrated.certification.certificate is None
    assert "the grades are a judge's, and none was audited; run `calibtrain audit" in calibrated.certification.reason
    assert all(one.certificate is None for one in calibrated.curve.values())
    assert not Promises(calibrated).default.answers
    found = certify.run(run, risk=0.1)
    assert found.failures[0].startswith("no certificate: the grades are a judge's")
    assert audit_lines(found.audit) == [
        "graded by a judge: 1200 answers, 1 of them without a verdict; 0 of them audited by a person"
    ]


def test_an_audit_is_a_random_sample_that_is_not_overwritten(run):
    path = audit.run(run, 30)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["question_id"] for row in rows}) == 30
    assert all(row["correct"] is None and row["verdict"] in ("right", "wrong", "unread") for row in rows)
    held_out = read_measurement(run / "answers" / "certification.jsonl").answers
    places = [[one.question_id for one in held_out].index(row["question_id"]) for row in rows]
    assert 300 < np.mean(places) < 900
    assert places != sorted(places)
    with pytest.raises(UserError, match="may hold a person's work"):
        audit.run(run, 30)
    path.unlink()
    with pytest.raises(UserError, match="ask for 1200 at most"):
        audit.run(run, 1201)


def test_an_audit_certifies_and_measures_the_judge(run, capsys):
    filled(run, 250)
    found = certify.run(run, risk=0.2)
    certificate = found.certification.certificate
    assert not found.failures
    assert certificate.n_audited == 250
    again = read_calibration(run)
    assert again.certification.certificate == certificate
    assert again.audit == found.audit
    truth = json.loads((run / "truth.json").read_text())
    held_out = read_measurement(run / "answers" / "certification.jsonl")
    right = np.array([truth[one.question_id] for one in held_out.answers])
    means = found.audit["corrected"]
    assert means["judged_accuracy"] > right.mean() + 0.02
    assert means["accuracy"]["low"] < right.mean() < means["accuracy"]["high"]
    assert found.audit["agreement"]["sensitivity"]["estimate"] > 0.99
    assert found.audit["agreement"]["specificity"]["high"] < 0.9
    told = capsys.readouterr().out.replace("\n", " ")
    assert "judge and person agree on" in told
    assert "corrected by the audit" in told
    promise = Promises(again).default
    assert promise.answers
    assert "at most 20% of the answers given are wrong" in promise.promise
    line = corrected_line(replace(held_out, made_by=mark_of(run)), run / "model")
    assert "accuracy corrected by 250 audited answers" in line


def test_an_audit_counts_when_all_of_it_is_graded_and_nothing_is_left_out(run):
    path, rows = filled(run, 250, lines=120)
    found = certify.run(run, risk=0.3)
    assert found.certification.certificate is None
    assert "120 of the 250 answers in" in found.certification.reason
    assert "grade all of them" in found.certification.reason
    assert found.audit["audited"] == 120
    rows[50]["correct"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"audit.jsonl:51: `correct` is null, but line 52 is graded"):
        certify.run(run, risk=0.3)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:50] + rows[51:]))
    found = certify.run(run, risk=0.3)
    assert "graded line 51 is not the one of these answers" in found.certification.reason


def test_an_audit_of_other_answers_certifies_nothing(run):
    path, rows = filled(run, 200)
    rows[3]["answer"] = "another"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "graded line 4 is not the one of these answers" in certify.run(run, risk=0.3).certification.reason


@pytest.mark.parametrize("serves", ["likelihood", "head"])
def test_an_audit_that_refutes_the_judge_leaves_no_certificate_of_any_source(run, serves, capsys):
    """Whichever serves: the one beside it is certified anew, and another's is withdrawn until it is."""
    head = a_head(run)
    for split in ("temperature", "certification"):
        path = run / "answers" / f"{split}.jsonl"
        found = read_measurement(path)
        told = np.clip(found.confidence, 0.001, 0.999)
        write_measurement(replace(found, told=told, told_by=head.mark), path, mark_of(run))
    path, rows = filled(run, 250)
    config = load_config(run / "config.yaml")
    parts = {split: read_measurement(run / "answers" / f"{split}.jsonl") for split in ("temperature", "certification")}
    facts = {"fitted_on": file_hash(run / "answers" / "temperature.jsonl"), "parts": {}}
    audited = audit.audit_of(config, parts["certification"].answers, run)
    assert calibrate_head(config, run, head, parts, 0.2, 0.05, {"certification": "b"}, facts, audited).promised
    content = json.loads((run / "calibration.json").read_text()) | {"serves": serves, "fitted_on": facts["fitted_on"]}
    (run / "calibration.json").write_text(json.dumps(content))
    assert not certify.run(run, risk=0.2).failures
    sources = ("likelihood", "head", "p_true")
    (run / "sources" / "p_true").mkdir()
    content = json.loads((run / "calibration.json").read_text()) | {"source": "p_true"}
    (run / "sources" / "p_true" / "calibration.json").write_text(json.dumps(content))
    certify.run(run, risk=0.2)  # by the same audit: nothing is withdrawn
    assert all(read_calibration(run, source=one).promised for one in sources)
    path.write_text("".join(json.dumps(row | {"correct": False}) + "\n" for row in rows))
    assert certify.run(run, risk=0.2).failures
    assert not any(read_calibration(run, source=one).promised for one in sources)
    assert f"`calibtrain calibrate {run} --source p_true` certifies it anew" in capsys.readouterr().out
    assert not Promises(read_calibration(run, source="p_true")).default.answers


def test_a_calibration_whose_audit_is_another_one_now_does_not_stay(run):
    """`calibrate`, where nothing can be certified, keeps an earlier certificate that holds, and no other."""
    path, rows = filled(run, 250)
    certify.run(run, risk=0.2)
    none = replace(read_calibration(run), certification=Certification(None, "none"), claims={})
    assert calibrate.keeps_earlier(run, none)
    path.write_text("".join(json.dumps(row | {"correct": False}) + "\n" for row in rows))
    assert not calibrate.keeps_earlier(run, none)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[", r"audit.jsonl:1: no line of an audit"),
        ('{"question_id": "a"}', "KeyError: 'answer'"),
        ('{"question_id": "a", "answer": "b", "correct": "yes"}', "`correct` is 'yes'; say true, false, or null"),
        ("[1]", "no line of an audit"),
    ],
)
def test_a_bad_line_is_named(run, line, words):
    (run / "audit.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=words):
        certify.run(run, risk=0.3)


def test_groups_and_hallucinations_are_refused_with_the_reason(run):
    filled(run, 200)
    found = certify.run(run, risk=0.3, by="side", hallucination=0.1)
    assert [one.split(":")[0] for one in found.failures] == ["no hallucination certificate", "no certificate by side"]


def test_grades_that_are_no_opinions_have_nothing_to_audit(out):
    with pytest.raises(UserError, match="nothing to audit"):
        audit.run(out, 5)


@pytest.mark.parametrize("graded", [0, 250])
def test_what_is_outside_has_no_part_in_the_audit_either(run, graded):
    """With `outside: abstain` fewer answers are certified than were asked, and of the audit those among them count."""
    if graded:
        filled(run, graded)
    config = load_config(run / "config.yaml", ["abstention.outside=abstain"])
    held_out = read_measurement(run / "answers" / "certification.jsonl")
    answers = [replace(one, outside=0.0 if i % 3 == 0 else 0.9) for i, one in enumerate(held_out.answers)]
    confidence = np.array([one.confidence for one in answers])
    found = calibrate.certified_claims(
        config, read_calibration(run).calibrator, confidence, answers, 0.3, 0.05, None, None,
        audit.audit_of(config, answers, run),
    )  # fmt: skip
    assert found.audit["answers"] == 800
    audited = found.audit["audited"]
    assert (130 < audited < 200) if graded else audited == 0
    assert (found.certification.certificate is not None) == bool(graded)
