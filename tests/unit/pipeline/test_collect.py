"""The report of a run: which groups break the promise, and what of it may leave the machine."""

import json
from dataclasses import replace
from functools import partial

import pytest

from calibtrain.config_file import dump_config, load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import certify, collect, train
from calibtrain.pipeline.calibration_file import made_by_source, weights_hash
from calibtrain.pipeline.measurement import write_measurement
from calibtrain.pipeline.report import render_report
from tests.unit.pipeline import spectra_cases
from tests.unit.pipeline.conftest import mark_of, measured

SECRET = "a-persons-own-words"


@pytest.fixture
def tested(out):
    """The run with answers to test questions, of which those of one side are wrong."""
    found = measured(300, 3)
    answers = [
        replace(one, question=f"{SECRET} {i}", text=SECRET, correct=one.correct and one.strata["side"] == "left",
                strata={"side": one.strata["side"], "patient": f"{SECRET} {i % 40}"})
        for i, one in enumerate(found.answers)
    ]  # fmt: skip
    write_measurement(replace(found, answers=answers), out / "answers" / "test.jsonl", mark_of(out))
    (out / "run.json").write_text(json.dumps({"versions": {}, "git": None, "data_hash": None, "world_size": 1}))
    return out


def test_the_group_that_breaks_the_promise_is_named_first(tested):
    certify.run(tested, risk=0.1, by="side")
    page = render_report(replace(collect.report_data(tested), bootstrap_replicates=10))
    verdict = page[page.index('<div class="verdict') : page.index("<h2>")]
    assert "on questions like the 1,200 graded ones from questions.jsonl" in verdict
    assert "Not in every group: where side is right, " in verdict
    table = page[page.index("Does the promise hold in every group?") :]
    assert table.index(">right<") < table.index(">left<")
    assert "✕ broken" in table
    assert "By patient, 10 more groups are left out" in table
    assert "Own certificate" in table


def test_what_leaves_the_machine_holds_no_question_answer_or_name_of_a_group(tested, tmp_path):
    engine = f"rollouts.engine={{kind: vllm, launch: true, environment: {{KEY: {SECRET}}}}}"
    shown = f"data.examples=[{{question: who, answer: {SECRET}}}]"
    dump_config(load_config(tested / "config.yaml", [engine, shown]), tested / "config.yaml")
    certify.run(tested, risk=0.1, by="side")
    data = replace(collect.report_data(tested), bootstrap_replicates=10)
    assert SECRET in render_report(data)
    (tmp_path / "sent").mkdir()
    files = collect._without_answers(tested, collect.bare(data), tmp_path / "sent")
    assert {path.name for path in files} == {"calibration.json", "report.html"}
    for path in files:
        text = path.read_text("utf-8")
        assert SECRET not in text
        assert '"left"' not in text
    sent = json.loads(files[0].read_text())
    assert sent["certificate"]["target_risk"] == 0.1
    assert sent["calibrator"]["parameters"].keys() == {"temperature"}
    assert {"scope", "groups", "exceptions"}.isdisjoint(sent)


def test_test_answers_of_another_model_are_not_reported_as_this_ones(tested):
    write_measurement(measured(30, 3), tested / "answers" / "test.jsonl")
    with pytest.raises(UserError, match="not known to be answers of this model"):
        collect.report_data(tested)


def test_raw_answers_of_another_starting_model_are_not_reported_as_this_ones(tested):
    source = load_config(tested / "config.yaml").model
    raw = tested / "answers" / "raw_test.jsonl"
    for mark in (None, made_by_source(source)):  # files of earlier releases bear none
        write_measurement(measured(300, 3), raw, mark)
        assert next(one.label for one in collect.report_data(tested).measured) == "raw model"
    write_measurement(measured(300, 3), raw, made_by_source(source.model_copy(update={"revision": "another"})))
    with pytest.raises(UserError, match="not answers of"):
        collect.report_data(tested)


def test_spectra_of_the_run_are_part_of_its_report(tested, monkeypatch):
    monkeypatch.setattr(collect, "ReportData", partial(collect.ReportData, bootstrap_replicates=2))
    path = tested / "spectra.json"
    assert collect.report_data(tested).spectra is None
    content = spectra_cases.with_nulls()
    path.write_text(json.dumps(content))
    assert "of other weights than those" in collect.report_data(tested).spectra_problem
    content["tuned_hash"] = weights_hash(tested / "model")
    path.write_text(json.dumps(content))
    assert collect.report_data(tested).spectra == content
    collect.run(tested)
    assert 'href="spectra.html"' in (tested / "report.html").read_text("utf-8")
    assert "lm_head.weight" in (tested / "spectra.html").read_text("utf-8")
    path.write_text(path.read_text()[:-100])
    data = collect.report_data(tested)
    assert data.spectra is None
    assert data.spectra_problem.startswith(f"{path}: cannot be read")


@pytest.mark.parametrize("answers", [False, True])
def test_a_tracker_gets_no_key_and_examples_only_where_answers_may_go(out, answers):
    engine = f"rollouts.engine={{kind: vllm, launch: true, arguments: [--api-key, key-{SECRET}]}}"
    shown = f"data.examples=[{{question: who, answer: {SECRET}}}]"
    changes = [engine, shown, f"tracking.log_answers={answers}", f"output_dir={out}"]
    config = load_config(out / "config.yaml", changes)
    dump_config(config, out / "config.yaml")
    shared, files = train._what_hooks_share(config)
    for text in (json.dumps(shared), *(path.read_text() for path in files if path.is_file())):
        assert f"key-{SECRET}" not in text
        assert (SECRET in text) is answers
    assert load_config(out / "config.yaml") == config
