"""A tiny model through the whole job with a judge's grades, and with those of a function of the user's."""

import json
import os
import re
import shutil
import sys

import pytest
import yaml

from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline.calibration_file import read_calibration
from calibtrain.pipeline.own_code import trust
from tests.distributed.jobs import write_job
from tests.judging import FakeJudge, serve_judge

SIZES = {"train": 40, "calibration": 8, "temperature": 10, "certification": 14, "test": 8}
GRADER = """
def is_right(answer, record):
    assert set(record) >= {"question", "accepted", "fields"}
    return int(record["question"].split()[-1].strip("?")) != 3

def broken(answer, record):
    return "yes" if is_right(answer, record) else False
"""


def verdict(prompt):
    """The judge is right about three questions of four, whatever is answered."""
    number = re.search(r"What is (\d+)\?", prompt)
    return "wrong" if number and int(number[1]) % 4 == 0 else "That will do.\nright"


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    made = FakeJudge(verdict)
    before = os.environ.get("CALIBTRAIN_CACHE")
    os.environ["CALIBTRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    with serve_judge(made) as url:
        made.url = url
        yield made
    os.environ.pop("CALIBTRAIN_CACHE")
    if before is not None:
        os.environ["CALIBTRAIN_CACHE"] = before


@pytest.fixture(scope="module")
def trained(judge, tmp_path_factory):
    """An SFT run whose own answers, that it trains on and is measured by, the judge grades; calibrated without an audit."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from calibtrain.pipeline import calibrate, evaluate, train

    job = write_job(
        tmp_path_factory.mktemp("judged"),
        data={"splits": SIZES},
        task={"kind": "judge", "judge": {"url": judge.url, "model": "big"}},
        training={"zero_stage": 1, "max_steps": 4, "checkpoint_every": None},
    )
    config = load_config(job)
    train.run(config)
    out = config.output_dir
    evaluate.run(config, model=out / "model", split="test", output=out / "answers" / "test.jsonl")
    return out, calibrate.run(out, target_risk=0.9, delta=0.4)


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


def with_task(out, **task):
    """The same model, calibrated anew with another task."""
    content = yaml.safe_load((out / "config.yaml").read_text())
    content["task"] = task
    (out / "config.yaml").write_text(yaml.safe_dump(content))
    return out


def test_a_judge_alone_certifies_nothing_and_with_an_audit_what_it_is_worth(trained, judge, out, capsys):
    from calibtrain.pipeline import audit, calibrate, certify, collect
    from calibtrain.pipeline.answer import load

    found = trained[1]
    assert found.certification.certificate is None
    assert "none was audited" in found.failures[0]
    assert judge.asked
    path = audit.run(out, 12)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["verdict"] for row in rows} <= {"right", "wrong"}
    filled = (json.dumps(row | {"correct": row["verdict"] == "right"}) for row in rows)
    path.write_text("\n".join(filled) + "\n")
    certified = certify.run(out, risk=0.9, delta=0.4)
    assert certified.certification.certificate.n_audited == 12
    report = collect.run(out).read_text()
    assert "How far the judge can be trusted" in report
    assert "12 of them audited by a person" in report
    asked = len(judge.requests)
    reply = load(out).answer("What is 77?")
    assert reply.certified
    assert "at most 90% of the answers given are wrong" in reply.promise
    assert len(judge.requests) == asked  # nobody grades what is asked in service
    again = calibrate.run(out, target_risk=0.9, delta=0.4)
    assert again.certification.certificate == certified.certification.certificate
    assert len(judge.asked) == len({*judge.asked})  # nothing was asked twice in all of this
    assert "graded by a judge" in capsys.readouterr().out


def test_what_a_judge_that_went_down_left_ungraded_is_not_answered_again(out, judge, monkeypatch, tmp_path):
    from calibtrain.pipeline import calibrate
    from calibtrain.pipeline.evaluate import Loaded

    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path / "empty"))
    judge.before = lambda prompt: (400, b"{}") if "What is" in prompt and len(judge.asked) - asked > 3 else None
    asked = len(judge.asked)
    with pytest.raises(UserError, match=r"answers have no grade: .* the server refuses the request"):
        calibrate.run(out)
    left = out / "answers" / "temperature.new.jsonl"
    grades = [json.loads(line)["correct"] for line in left.read_text().splitlines()]
    assert len(grades) == 10
    assert None in grades
    assert {True, False} & {*grades}
    judge.before = lambda prompt: None
    answered = []
    measure = Loaded.measure

    def counted(self, records, *more):
        answered.append(len(records))
        return measure(self, records, *more)

    monkeypatch.setattr(Loaded, "measure", counted)
    calibrate.run(out)
    assert answered == [SIZES["certification"]]  # the temperature answers were kept
    assert not left.exists()


def test_a_grader_of_the_users_grades_all_the_way(out, tmp_path, monkeypatch):
    from calibtrain.pipeline import calibrate, collect, evaluate
    from calibtrain.pipeline.answer import load

    (tmp_path / "graders_here.py").write_text(GRADER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path / "cache"))  # where nobody has trusted this grader yet
    with_task(out, kind="custom", grader="graders_here:is_right")
    with pytest.raises(UserError, match=r"names code that would run here: task\.grader: graders_here:is_right"):
        calibrate.run(out, target_risk=0.9, delta=0.4)
    trust(load_config(out / "config.yaml"), out)
    found = calibrate.run(out, target_risk=0.9, delta=0.4)
    assert found.certification.certificate is not None
    assert found.audit is None
    lines = (out / "answers" / "certification.jsonl").read_text().splitlines()
    grades = {one["question"]: one["correct"] for one in map(json.loads, lines)}
    assert all(right == (question != "What is 3?") for question, right in grades.items())
    config = load_config(out / "config.yaml")
    evaluate.run(config, model=out / "model", split="test", output=out / "answers" / "test.jsonl")
    assert "How far the judge" not in collect.run(out).read_text()
    assert load(out).answer("What is 77?").certified
    before = (out / "calibration.json").read_text()
    with_task(out, kind="custom", grader="graders_here:broken")
    trust(load_config(out / "config.yaml"), out)
    with pytest.raises(UserError, match=r"graders_here:broken: \d+ of 10 answers have no grade: it returns str 'yes'"):
        calibrate.run(out)
    assert len((out / "answers" / "temperature.new.jsonl").read_text().splitlines()) == 10  # nothing is lost
    assert (out / "calibration.json").read_text() == before
    with pytest.raises(UserError, match="task in config"):  # of another grader it says nothing
        read_calibration(out)
    sys.modules.pop("graders_here", None)
