"""Numbers at the end of a chain, through the whole job: learnt, read, graded, calibrated, certified, reported, asked for."""

import json
import os
import random

import pytest

from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from tests.distributed.jobs import write_job

SIZES = {"train": 120, "calibration": 8, "temperature": 16, "certification": 24, "test": 24}
TASK = {"kind": "number", "answer_in": ["boxed", "hashes"]}


def write_rows(folder):
    """Sums with their working, as GSM8K writes them: no column of accepted answers."""
    draw, rows = random.Random(0), []
    for i in range(240):
        a, b = draw.randrange(2), draw.randrange(2)
        chain = f"{a} and {b}\nis {a + b}\n#### {a + b}"
        rows.append({"question": f"What is {a} and {b}, {i}?", "completion": chain})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    os.environ["DS_ACCELERATOR"] = "cpu"
    from calibtrain.pipeline import calibrate, collect, evaluate, train

    folder = tmp_path_factory.mktemp("numbers")
    job = write_job(
        folder,
        task=TASK,
        data={"splits": SIZES, "max_length": 96},
        penalties=[{"name": "answer_score", "moves": "all", "refresh_every": 40, "questions_per_refresh": 4}],
        training={"zero_stage": 1, "max_steps": 80, "learning_rate": 6e-3, "global_batch_size": 8, "micro_batch_size": 8,
                  "checkpoint_every": 80, "log_every": 20},
        evaluation={"batch_size": 24, "max_new_tokens": 32},
    )  # fmt: skip
    write_rows(folder)
    config = load_config(job)
    output = config.output_dir
    train.run(config)
    evaluate.run(config, model=output / "model", split="test", output=output / "answers" / "test.jsonl")
    calibrate.run(output, target_risk=0.9, delta=0.4)
    collect.run(output)
    return config


def test_the_answers_are_the_numbers_at_the_end(finished):
    from calibtrain.pipeline.measurement import read_measurement

    answers = read_measurement(finished.output_dir / "answers" / "test.jsonl").answers
    found = [one for one in answers if one.found]
    assert len(found) >= len(answers) // 2  # it learnt the form
    assert any(one.correct for one in found)
    for one in found:
        assert one.text in one.reply.splitlines()[-1]
        assert one.correct == (one.text in one.accepted)
        assert len(one.token_logprobs) < one.reply_length
        assert one.reply_logprob < one.logprob
    assert all(len(one.accepted) == 1 and one.accepted[0].isdigit() for one in answers)


def test_a_question_is_answered_with_the_number(finished):
    from calibtrain.pipeline.answer import load
    from calibtrain.pipeline.calibration_file import read_calibration
    from calibtrain.pipeline.measurement import read_measurement

    measured = read_measurement(finished.output_dir / "answers" / "certification.jsonl")
    probabilities = read_calibration(finished.output_dir).calibrator.apply(measured.table)
    reply = load(finished.output_dir, uncertified=True).answer(measured.answers[0].question)
    assert reply.text == measured.answers[0].text
    assert reply.probability == pytest.approx(float(probabilities[0]), abs=1e-4)


def test_replies_without_an_answer_are_counted_and_wrong(finished, tmp_path, capsys):
    from calibtrain.pipeline import collect, evaluate
    from calibtrain.pipeline.measurement import read_measurement

    cut = finished.model_copy(update={"evaluation": finished.evaluation.model_copy(update={"max_new_tokens": 3})})
    path = finished.output_dir / "answers" / "test.jsonl"
    evaluate.run(cut, model=finished.output_dir / "model", split="test", output=path)
    assert "24 of 24 replies hold no answer" in capsys.readouterr().out
    answers = read_measurement(path).answers
    assert {(one.found, one.correct, one.text) for one in answers} == {(False, False, "")}
    report = collect.run(finished.output_dir).read_text()
    assert "In 24 of its 24 replies no answer was found" in report


def test_a_row_without_a_number_is_named_before_training(finished, tmp_path):
    from calibtrain.pipeline.prepare import prepare

    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "2+2?", "answers": ["#### 4"]}\n{"question": "Why?", "answers": ["because"]}\n')
    source = finished.data.source.model_copy(update={"path": path})
    config = finished.model_copy(update={"data": finished.data.model_copy(update={"source": source})})
    with pytest.raises(UserError, match=r"rows.jsonl:2: the accepted answer 'because' holds no answer"):
        prepare(config)
