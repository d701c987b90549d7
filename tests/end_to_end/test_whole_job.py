"""A tiny model through the whole job by the functions behind the command line; and mistakes, each told before training."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from tests.distributed.jobs import metrics, write_job
from tests.wandb_file import records

SIZES = {"train": 40, "calibration": 8, "temperature": 10, "certification": 12, "test": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A trained, measured, calibrated and reported run."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from calibtrain.pipeline import calibrate, collect, evaluate, train

    folder = tmp_path_factory.mktemp("job")
    job = write_job(
        folder,
        data={"splits": SIZES},
        training={"zero_stage": 1, "evaluate_every": 3},
        tracking={"wandb": True, "mode": "offline"},
    )
    config = load_config(job)
    output = config.output_dir
    evaluate.run(config, model=None, split="test", output=output / "answers" / "raw_test.jsonl")
    train.run(config)
    evaluate.run(config, model=output / "model", split="test", output=output / "answers" / "test.jsonl")
    calibrate.run(output, target_risk=0.9, delta=0.4)
    collect.run(output)
    return config


def test_the_artefact_is_whole(finished):
    output = finished.output_dir
    names = {path.name for path in output.iterdir()}
    wanted = {"model", "calibration.json", "report.html", "metrics.jsonl", "config.yaml", "deepspeed.json", "run.json"}
    assert wanted <= names
    assert load_config(output / "config.yaml") == finished
    assert json.loads((output / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 1
    facts = json.loads((output / "run.json").read_text())
    assert facts["world_size"] == 1
    assert facts["splits"] == {**SIZES, "validation": 0}
    assert {"torch", "deepspeed", "transformers"} <= facts["versions"].keys()
    report = (output / "report.html").read_text()
    assert "raw model" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_calibration_and_report_join_the_wandb_run_of_the_training(finished):
    runs = sorted((finished.output_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2
    assert len({path.stem for path in runs}) == 1
    after = list(records(runs[-1]))
    (artifact,) = (one.artifact for one in after if one.WhichOneof("record_type") == "artifact")
    sent = {entry.path: entry for entry in artifact.manifest.contents}
    assert sent.keys() == {"calibration.json", "report.html"}
    # Not the files of the run, which hold questions and answers.
    assert all(sent[name].size < (finished.output_dir / name).stat().st_size for name in sent)
    summaries = {item.key for one in after if one.WhichOneof("record_type") == "summary" for item in one.summary.update}
    assert {"calib/test/raw_model/ece15", "calib/test/with_temperature/ece15"} <= summaries


def test_metrics_of_training_and_of_the_answers_are_kept(finished):
    lines = metrics(finished.output_dir)
    assert [line["step"] for line in lines if line["event"] == "log"] == [1, 2, 3, 4, 5, 6]
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    assert {line["step"] for line in evaluations} >= {3, 6}
    assert all("calib/calibration/likelihood/acc" in line for line in evaluations)


def test_callbacks_of_other_trainers_log_the_same_keys(finished):
    """Whoever changes from their own trainer to `calibtrain train`, or back, keeps their charts."""
    from calibtrain.hooks.callback import AnswerMeter, CalibrationMeter
    from tests.tiny import tiny_model, tiny_tokenizer
    from tests.unit.hooks.test_callbacks import QUESTIONS, measured

    lines = metrics(finished.output_dir)
    ours = next(line for line in lines if line["event"] == "log")
    meter = CalibrationMeter()
    meter.update(*measured(0))
    tokens = ("calib/train/token/", "train/token/")
    theirs = {key for key in meter.compute(1) if key.startswith(tokens)}
    assert theirs == {key for key in ours if key.startswith(tokens)}
    assert len(theirs) > 8
    evaluation = next(line for line in lines if line["event"] == "evaluation" and line["step"] == 3)
    answers = AnswerMeter(QUESTIONS)(tiny_model(), tiny_tokenizer())
    assert answers.keys() == {key for key in evaluation if key.startswith("calib/")}


def test_calibration_json_holds_what_answer_needs(finished):
    content = json.loads((finished.output_dir / "calibration.json").read_text())
    assert content["calibrator"]["parameters"]["temperature"] > 0
    assert content["calibrator"]["n"] == SIZES["temperature"]
    assert set(content["data_hashes"]) == {"temperature", "certification"}
    assert content["certificate"] is not None or content["certification"]


def test_a_question_is_answered_as_it_was_measured(finished):
    from calibtrain.pipeline.answer import load
    from calibtrain.pipeline.calibration_file import read_calibration
    from calibtrain.pipeline.measurement import read_measurement

    measured = read_measurement(finished.output_dir / "answers" / "certification.jsonl")
    probabilities = read_calibration(finished.output_dir).calibrator.apply(measured.table)
    answerer = load(finished.output_dir)
    for index in (0, 5):
        reply = answerer.answer(measured.answers[index].question)
        assert reply.text == measured.answers[index].text
        assert reply.probability == pytest.approx(float(probabilities[index]), abs=1e-4)
        assert reply.abstained == (not reply.certified or reply.probability < reply.threshold)
    with pytest.raises(UserError, match="empty"):
        answerer.answer("  ")


def test_a_calibration_that_certifies_nothing_leaves_the_one_that_does(finished, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from calibtrain import cli
    from calibtrain.pipeline import evaluate

    def invoke(*call):
        return CliRunner().invoke(cli.app, [str(one) for one in call], catch_exceptions=False)

    output = shutil.copytree(finished.output_dir, tmp_path / "run")
    answered = evaluate.with_progress

    def all_right(*args, **more):
        found = answered(*args, **more)
        return replace(found, answers=[replace(one, correct=True) for one in found.answers])

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "with_progress", all_right)
        assert invoke("calibrate", output, "--target-risk", 0.5).exit_code == 0
    files = [output / "calibration.json", *(output / "answers").iterdir()]
    kept = {path: path.read_bytes() for path in files}
    failed = invoke("calibrate", output, "--target-risk", 0.5)  # this model is never right
    assert failed.exit_code == 1
    assert "nothing is written" in failed.output
    assert {path: path.read_bytes() for path in [files[0], *(output / "answers").iterdir()]} == kept
    # For the first time it is written, and answers nothing.
    files[0].unlink()
    assert invoke("calibrate", output, "--target-risk", 0.5).exit_code == 1
    for more, words in (((), "I do not know."), (("--uncertified",), "It answers everything")):
        said = invoke("answer", output, "What is 3 plus 4?", *more)
        assert said.output.startswith("No certificate: ")
        assert words in said.output


def test_splits_share_no_question(finished):
    from calibtrain.pipeline.prepare import prepare

    splits = prepare(finished).splits
    ids = [record.id for records in splits.values() for record in records]
    assert len(ids) == len(set(ids)) == sum(SIZES.values())


def test_calibration_is_void_for_other_weights_or_template(finished):
    from calibtrain.pipeline.calibration_file import read_calibration

    with pytest.raises(UserError, match="template"):
        read_calibration(finished.output_dir, template_hash="another")
    file = finished.output_dir / "model" / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match="weights"):
            read_calibration(finished.output_dir)
    finally:
        file.write_bytes(whole)
    read_calibration(finished.output_dir)


def test_what_is_missing_is_named(tmp_path, finished):
    from calibtrain.pipeline import answer, calibrate, collect

    job = write_job(tmp_path)
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.yaml").write_text(job.read_text())
    for call, words in ((calibrate.run, "train first"), (answer.load, "train first"), (collect.run, r"run\.json")):
        with pytest.raises(UserError, match=words):
            call(output)


MISTAKES = {
    "unknown key": (["training.learning_rat=1"], "did you mean `learning_rate`"),
    "missing data": (["data.source.path=/nowhere/questions.jsonl"], "/nowhere/questions.jsonl"),
    "missing model": (["model.source=/nowhere/model"], "/nowhere/model"),
    "not a model": (["model.source=NOT_A_MODEL"], "config.json"),
    "no answer": (["data.source.path=NO_ANSWER"], "no_answer.jsonl:3"),
    "empty": (["data.source.path=EMPTY"], "is empty"),
    "batch sizes": (["training.micro_batch_size=3"], "cannot be cut"),
    "unknown lora target": (["model.lora={target_modules: [nowhere]}"], "model.lora.target_modules"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_training_with_exit_code_2(tmp_path, mistake, capsys, monkeypatch):
    from calibtrain.launchers import train

    monkeypatch.setattr(train, "end_within", lambda seconds, code: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path / "cache"))
    config = write_job(tmp_path)
    overrides, words = MISTAKES[mistake]
    (tmp_path / "empty.jsonl").write_text("")
    good = '{"question": "What?", "answers": ["that"]}\n'
    (tmp_path / "no_answer.jsonl").write_text(good + good + '{"question": "Who?"}\n')
    places = {"NOT_A_MODEL": tmp_path, "NO_ANSWER": tmp_path / "no_answer.jsonl", "EMPTY": tmp_path / "empty.jsonl"}
    filled = []
    for override in overrides:
        for name, place in places.items():
            override = override.replace(name, str(place))
        filled.append(override)
    assert train.main([str(config), *filled], {}) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "model").exists()
