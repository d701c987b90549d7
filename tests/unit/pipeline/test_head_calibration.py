"""The confidence head beside the likelihood: which of them serves, by what it is certified, and what the report says."""

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import FittedHead, HeadInputs, fit_head
from calibtrain.config import RunConfig
from calibtrain.config_file import dump_config, load_config
from calibtrain.errors import UserError
from calibtrain.models.confidence_head import POSITIONS, READINGS
from calibtrain.pipeline import calibrate, certify, collect, monitor
from calibtrain.pipeline.calibration_file import file_hash, read_calibration, served_source, weights_hash
from calibtrain.pipeline.head_calibration import calibrate_head, serving
from calibtrain.pipeline.measurement import read_measurement, write_measurement
from calibtrain.pipeline.prepare import prepare
from calibtrain.pipeline.quantize_source import Asked, subject_of
from calibtrain.pipeline.report import render_report
from calibtrain.pipeline.source import load_scorer
from calibtrain.quantization.schemes import SCHEMES
from tests.unit.pipeline.conftest import TEMPLATE, mark_of, measured

HARD = 0.02
"""A risk that the head can keep, and the likelihood cannot."""
KNOWS = 3.0
"""Log-odds by which what the head tells of a right answer lies above that of a wrong one."""


def told(n, seed):
    """The run's answers, with what a head tells that knows more than the likelihood."""
    found, rng = measured(n, seed), np.random.default_rng(seed + 100)
    logit = KNOWS * (found.correct - 0.5) + rng.normal(size=n)
    return replace(found, told=1 / (1 + np.exp(-logit)))


def a_head(out, informative=True):
    """Solved on made-up states that tell the grades, or that do not."""
    head = solved(weights_hash(out / "model"), informative)
    head.save(out)
    return head


@cache
def solved(weights, informative):
    """The head of a_head: all tests' runs have the same weights."""
    rng = np.random.default_rng(0)
    states, correct = rng.normal(size=(400, 1, len(POSITIONS), 8)), rng.random(400) < 0.5
    states[:, 0, 0, 0] += 3 * informative * correct
    inputs = HeadInputs(np.full(400, -0.7), np.zeros((400, len(READINGS))), states)
    return fit_head(inputs, correct, (1,), Fingerprint(weights, TEMPLATE))[0]


@pytest.fixture
def served(out):
    """The calibrated run with a head that serves."""
    config = load_config(out / "config.yaml").model_dump(mode="json") | {"confidence_head": {"weight": 0}}
    config = RunConfig.model_validate(config)
    dump_config(config, out / "config.yaml")
    head = a_head(out)
    seeds = {"temperature": 0, "certification": 1, "test": 3}
    parts = {name: replace(told(1200, seed), told_by=head.mark) for name, seed in seeds.items()}
    for name, one in parts.items():
        write_measurement(one, out / "answers" / f"{name}.jsonl", mark_of(out))
    content = json.loads((out / "calibration.json").read_text())
    content["serves"] = serving(config, head)
    content["fitted_on"] = file_hash(out / "answers" / "temperature.jsonl")
    (out / "calibration.json").write_text(json.dumps(content))
    facts = {key: content[key] for key in ("fitted_on", "parts", "serves")}
    found = calibrate_head(config, out, head, parts, 0.1, 0.05, {"temperature": "a", "certification": "b"}, facts)
    assert found is not None
    (out / "run.json").write_text(json.dumps({"versions": {}, "git": None, "data_hash": None, "world_size": 1}))
    return out


def test_what_a_head_told_is_kept_with_the_answers(tmp_path):
    one = told(20, 0)
    write_measurement(one, tmp_path / "a.jsonl", "mark")
    np.testing.assert_array_equal(read_measurement(tmp_path / "a.jsonl").told, one.told)
    write_measurement(replace(one, told=None), tmp_path / "a.jsonl", "mark")
    assert read_measurement(tmp_path / "a.jsonl").told is None
    assert "told" not in (tmp_path / "a.jsonl").read_text()
    write_measurement(replace(one, told=np.full(20, np.nan)), tmp_path / "a.jsonl", "mark")
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*`told` is nan; it is a probability"):
        read_measurement(tmp_path / "a.jsonl")


def test_it_serves_where_its_own_questions_found_it_better(served, tmp_path_factory):
    """By cross-validation on the questions that it was solved on: the certificate and the test have no part in it."""
    config = load_config(served / "config.yaml")
    assert served_source(served) == "head"
    assert serving(config, a_head(served, informative=False)) == "likelihood"
    assert serving(config, None) == "likelihood"
    never = config.model_copy(update={"confidence_head": config.confidence_head.model_copy(update={"serves": "never"})})
    assert serving(never, a_head(served)) == "likelihood"
    dump_config(never, served / "config.yaml")  # after it was calibrated: it holds at once
    assert served_source(served) == "likelihood"
    assert certify.run(served, risk=0.2) == read_calibration(served)
    dump_config(config, served / "config.yaml")
    assert served_source(served) == "head"
    content = json.loads((served / "calibration.json").read_text())
    del content["serves"]  # as earlier versions wrote it
    (served / "calibration.json").write_text(json.dumps(content))
    assert served_source(served) == "likelihood"
    assert served_source(tmp_path_factory.mktemp("nothing")) == "likelihood"


def test_its_calibration_is_read_as_any_source_is(served):
    likelihood, by_head = read_calibration(served), read_calibration(served, source="head")
    assert by_head.calibrator.method == "platt"
    assert by_head.certification.certificate.coverage > likelihood.certification.certificate.coverage + 0.05
    assert load_scorer(served, "head", Fingerprint(weights_hash(served / "model"), TEMPLATE)).name == "head"
    (served / "confidence_head" / "head.json").write_text("{}")
    with pytest.raises(UserError, match=r"head\.json has changed since"):
        read_calibration(served, source="head")


def test_certify_certifies_what_serves_and_the_likelihood_beside_it(served, capsys):
    found = certify.run(served, risk=0.05)
    assert found == read_calibration(served, source="head")
    certified = [one.certification.certificate for one in (found, read_calibration(served))]
    assert [one.target_risk for one in certified] == [0.05, 0.05]
    assert certified[0].coverage > certified[1].coverage
    told = " ".join(capsys.readouterr().out.split())
    assert f"beside it, --source likelihood: certified: at {certified[1].threshold:.2f} and above" in told
    plain = replace(read_measurement(served / "answers" / "certification.jsonl"), told=None)
    write_measurement(plain, served / "answers" / "certification.jsonl", mark_of(served))
    with pytest.raises(UserError, match="these answers were given without it"):
        certify.run(served, risk=0.2)


def test_where_the_likelihood_s_calibration_stays_the_head_is_tried_all_the_same(served, monkeypatch):
    """On the answers that stay: at a risk that the likelihood cannot keep, the head may."""
    head = FittedHead.load(served, Fingerprint(weights_hash(served / "model"), TEMPLATE))

    def again(loaded, records, path, mark, split):
        found = read_measurement(served / "answers" / f"{split}.jsonl")
        write_measurement(found, path, mark)
        return found

    loaded = SimpleNamespace(template=SimpleNamespace(hash=TEMPLATE), head=None)
    monkeypatch.setattr(calibrate, "Loaded", lambda *_: loaded)
    monkeypatch.setattr(calibrate, "head_beside", lambda *_: head)
    monkeypatch.setattr(calibrate, "check_strata", lambda *_: None)
    monkeypatch.setattr(calibrate, "measured_again", again)
    before = (served / "calibration.json").read_bytes()
    found = calibrate.run(served, target_risk=HARD)
    assert not found.failures
    by_head = read_calibration(served, source="head")
    assert by_head.certification.certificate.target_risk == HARD
    assert (served / "calibration.json").read_bytes() == before
    assert certify.run(served, risk=HARD) == by_head  # on answers that it knows


def test_what_another_head_of_the_same_weights_told_is_nothing_to_this_one(served):
    """A model that is trained again without gradients for its head has the same weights, and maybe another head."""
    for name in ("certification", "test"):
        path = served / "answers" / f"{name}.jsonl"
        write_measurement(replace(read_measurement(path), told_by="f" * 16), path, mark_of(served))
    with pytest.raises(UserError, match="or with another one"):
        certify.run(served, risk=0.2)
    with pytest.raises(UserError, match="answers by its confidence head, which the report cannot show"):
        collect.report_data(served)


def test_unlike_promises_are_not_compared(served):
    before = (served / "calibration.json").read_bytes()
    certify.run(served, risk=0.2)
    (served / "calibration.json").write_bytes(before)
    data = replace(collect.report_data(served), bootstrap_replicates=10)
    assert data.head.asked is None
    assert data.head.rows == ()
    page = render_report(data)
    assert "of every 1,000" not in page
    assert "are not compared" in page


def test_the_report_says_what_it_bought(served):
    data = replace(collect.report_data(served), bootstrap_replicates=10)
    page = render_report(data)
    likelihood, by_head = read_calibration(served), read_calibration(served, source="head")
    assert data.certification == by_head.certification
    assert [one.label for one in data.measured][-1] == "with confidence head"
    before, after = (one.certification.certificate.coverage for one in (likelihood, by_head))
    more = round(1000 * (data.head.asked[1].coverage - data.head.asked[0].coverage))
    assert data.head.asked[1].coverage - data.head.asked[0].coverage == after - before
    assert f"{more} more of every 1,000" in " ".join(page.split())
    assert "from 400 graded answers" in page
    write_measurement(replace(told(1200, 3), told=None), served / "answers" / "test.jsonl", mark_of(served))
    with pytest.raises(UserError, match="the test answers were given without it"):
        collect.report_data(served)
    content = json.loads((served / "calibration.json").read_text()) | {"serves": "likelihood"}
    (served / "calibration.json").write_text(json.dumps(content))
    page = render_report(replace(collect.report_data(served), bootstrap_replicates=10))
    assert "the test answers were given without it" in page


def test_nothing_is_certified_by_questions_that_the_head_was_solved_on(served):
    spare = prepare(load_config(served / "config.yaml")).drops.spare
    found = told(300, 5)
    answers = [replace(found.answers[0], question_id=spare[0].id), *found.answers[1:]]
    write_measurement(replace(found, answers=answers), served / "new.jsonl", mark_of(served))
    with pytest.raises(UserError, match=r"new\.jsonl:1: the model was trained on this question"):
        certify.run(served, risk=0.2, answers=served / "new.jsonl")


def test_answers_that_were_given_by_the_likelihood_are_not_counted_against_the_head(served, tmp_path):
    path, line = tmp_path / "audit.jsonl", json.dumps({"abstained": False, "correct": False}) + "\n"
    content = json.loads((served / "calibration.json").read_text())
    (served / "calibration.json").write_text(json.dumps(content | {"serves": "likelihood"}))
    path.write_text(line * 200)
    assert monitor.run(served, path).failed
    (served / "calibration.json").write_text(json.dumps(content))
    path.write_text(line * 203)
    now = monitor.run(served, path)
    assert (now.n, now.n_new) == (3, 3)
    (served / "calibration.json").write_text(json.dumps(content | {"serves": "likelihood"}))
    assert monitor.run(served, path).n_new == 0


def test_who_quantises_is_told_that_the_head_stays_behind(served, caplog):
    subject_of(served, Asked(SCHEMES["w8a8"], "minmax"))
    assert "answers by its confidence head, which holds for its own weights alone" in caplog.text
