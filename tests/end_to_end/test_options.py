"""Choice and label through the whole job: trained, measured, calibrated, certified, reported, answered."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline.question import question_of
from calibtrain.records import unit_hash
from tests.distributed.jobs import metrics, write_job

SIZES = {"train": 40, "calibration": 20, "temperature": 20, "certification": 24, "test": 16}
COUNTRIES = ("Japan", "Kenya", "France", "India")
JOBS = {
    "choice": {
        "task": {"kind": "choice", "shuffle": True},
        "objective": {"name": "orpo"},
    },
    "label": {
        "task": {"kind": "label", "labels": list(COUNTRIES)},
        "objective": {"name": "sft"},
        "calibration": {"method": "matrix_scaling"},
    },
}


def job(folder, kind):
    rows = []
    for i in range(340):
        right = COUNTRIES[int(4 * unit_hash("right", i))]
        rows.append({"question": f"Where is town {i} of {right}?", "answers": [right], "options": list(COUNTRIES)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {**JOBS[kind], "abstention": {"target_risk": 0.9, "delta": 0.4, "set_error": 0.2}}
    sections.setdefault("calibration", {"method": "temperature"})
    path = write_job(
        folder,
        data={"splits": SIZES, "max_length": 96, "source": {"kind": "file", "path": str(folder / "rows.jsonl")}},
        training={"zero_stage": 1, "evaluate_every": 3, "learning_rate": 3e-3, "global_batch_size": 8},
    )
    import yaml

    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**config, **sections}))
    return load_config(path)


@pytest.fixture(scope="module", params=list(JOBS))
def finished(request, tmp_path_factory):
    os.environ["DS_ACCELERATOR"] = "cpu"
    from calibtrain.pipeline import calibrate, collect, evaluate, train

    config = job(tmp_path_factory.mktemp(request.param), request.param)
    output = config.output_dir
    evaluate.run(config, model=None, split="test", output=output / "answers" / "raw_test.jsonl")
    train.run(config)
    evaluate.run(config, model=output / "model", split="test", output=output / "answers" / "test.jsonl")
    calibrate.run(output)
    collect.run(output)
    return request.param, config


def test_answers_are_among_the_options_and_the_scale_was_solved_for_them(finished):
    kind, config = finished
    from calibtrain.pipeline.measurement import read_measurement

    names = COUNTRIES if kind == "label" else tuple("ABCD")
    for file in ("raw_test", "test", "temperature", "certification"):
        found = read_measurement(config.output_dir / "answers" / f"{file}.jsonl")
        for answer, row in zip(found.answers, found.table, strict=True):
            assert answer.options == names
            assert answer.text == names[int(np.argmax(answer.option_logprobs))]
            assert np.exp(answer.option_logprobs).sum() == pytest.approx(1)
            assert answer.confidence >= 0.25 - 1e-9
            assert row[12] == pytest.approx(answer.logprob, abs=2e-6)  # at temperature 1
            assert answer.correct == (answer.text in answer.accepted)
            assert ("A. " in answer.question) == (kind == "choice")
    rounds = [line for line in metrics(config.output_dir) if line["event"] == "evaluation"]
    assert rounds
    assert {line["calib/calibration/likelihood/acc"] for line in rounds} != {0.0}


def test_what_was_calibrated_is_what_answers(finished):
    kind, config = finished
    from calibtrain.pipeline.answer import load
    from calibtrain.pipeline.calibration_file import read_calibration
    from calibtrain.pipeline.measurement import read_measurement

    measured = read_measurement(config.output_dir / "answers" / "certification.jsonl")
    calibrated = read_calibration(config.output_dir)
    probabilities = calibrated.calibrator.apply(measured.scores())
    answerer = load(config.output_dir)
    for index in (0, 5):
        answer = measured.answers[index]
        question = answer.question.split("\n")[0]
        options = {"options": COUNTRIES[::-1]} if kind == "choice" else {}  # shuffled by question: in any order
        reply = answerer.answer(question, **options)
        listed = dict(line.split(". ") for line in answer.question.split("\n")[1:]) if kind == "choice" else {}
        assert (reply.question, reply.text) == (answer.question, listed.get(answer.text, answer.text))
        assert reply.text in COUNTRIES
        assert reply.probability == pytest.approx(float(probabilities[index]), abs=1e-4)
        inside = calibrated.prediction_sets.of(answer.options, answer.option_logprobs)
        assert reply.prediction_set == tuple(listed.get(one, one) for one in inside)
        named = f"certified share of such questions: {', '.join(reply.prediction_set)}"
        assert (named in reply.told()) == (not reply.abstained and bool(reply.prediction_set))
        assert answerer.prompt_tokens(question_of(question, options.get("options", ()))) == reply.prompt_tokens
    if kind == "choice":
        with pytest.raises(UserError, match="without options"):
            answerer.answer("Where is town 1?")
        with pytest.raises(UserError, match="an option contains"):
            answerer.answer("Where is town 1?", options=["a", "b<|im_end|>"])
        with pytest.raises(UserError, match="2 for 1 questions"):
            answerer.answers(["Where is town 1?"], options=[["a", "b"], ["c", "d"]])
    assert calibrated.prediction_sets.n == SIZES["certification"]
    assert calibrated.prediction_sets.alpha == 0.2


def test_the_report_says_what_belongs_to_the_kind(finished):
    kind, config = finished
    page = (config.output_dir / "report.html").read_text()
    assert ("Does it prefer a place?" in page) == (kind == "choice")
    assert ("Is every class calibrated?" in page) == (kind == "label")
    assert ("with the calibrator" in page) == (kind == "label")


def test_other_sources_and_other_commands_take_them(finished, tmp_path):
    from calibtrain.pipeline import confidence, evaluate, forced
    from calibtrain.pipeline.measurement import read_measurement

    kind, config = finished
    table = confidence.run(config.output_dir, sources=["likelihood", "likelihood_margin", "self_consistency"])
    measured = read_measurement(config.output_dir / "answers" / "test.jsonl")
    scores = [json.loads(line) for line in (config.output_dir / "confidence" / "scores.jsonl").read_text().splitlines()]
    assert [one["scores"]["likelihood"] for one in scores] == pytest.approx(measured.confidence.tolist(), abs=1e-6)
    assert table["n"] == SIZES["test"]
    if kind == "choice":
        with pytest.raises(UserError, match="never refusals"):
            forced.run(config, model=config.output_dir / "model", split="test")
        token_method = config.model_copy(
            update={"calibration": config.calibration.model_copy(update={"method": "adaptive_temperature"})}
        )
        with pytest.raises(UserError, match="adaptive_temperature reads the tokens"):
            evaluate.run(token_method, model=config.output_dir / "model", split="test", output=None)


def test_files_of_answers_from_before_options_are_read(finished, tmp_path):
    from calibtrain.pipeline.measurement import read_measurement

    _, config = finished
    rows = [json.loads(line) for line in (config.output_dir / "answers" / "test.jsonl").read_text().splitlines()]
    old = [{key: value for key, value in row.items() if key not in ("options", "option_logprobs")} for row in rows]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    found = read_measurement(tmp_path / "old.jsonl")
    assert found.scores().options is None
    whole = read_measurement(config.output_dir / "answers" / "test.jsonl")
    assert [replace(one, options=(), option_logprobs=()) for one in whole.answers] == found.answers
