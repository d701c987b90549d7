"""What a finished run says of answers made of parts: which claims are shown, what is promised, what the report holds."""

import math
from dataclasses import replace

import numpy as np
import pytest

from calibtrain.abstention.certificate import Certification
from calibtrain.calibration.calibrators import fit_calibrator
from calibtrain.confidence.answer import Answer, AnswerPart
from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.pipeline.answer import Answerer
from calibtrain.pipeline.answer_parts import certify_parts, fit_answer_parts, part_probabilities, told
from calibtrain.pipeline.calibrate import certified
from calibtrain.pipeline.measurement import Measurement
from calibtrain.pipeline.reply import REFUSAL
from calibtrain.pipeline.report import Measured, ReportData, render_report
from calibtrain.pipeline.report_parts import parts_report
from calibtrain.tasks.kinds import task_of

CONFIG = RunConfig(task={"kind": "claims"}, abstention={"target_risk": 0.2, "report_risks": [0.1, 0.3]})
CHANCES = {"Surely so.": 0.95, "Perhaps so.": 0.5, "Hardly so.": 0.05}


def answer_of(name, claims, right):
    text, parts = "", []
    for claim, correct in zip(claims, right, strict=True):
        text += " " * bool(text)
        parts.append(AnswerPart("claim", claim, math.log(CHANCES[claim]), correct, len(text), len(text) + len(claim)))
        text += claim
    logprob = sum(part.logprob for part in parts)
    return Answer(name, name, text, (logprob,), all(right), tokens=(text,), parts=tuple(parts), found=bool(parts))


def answers(n, seed):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        claims = [list(CHANCES)[k] for k in rng.integers(0, 3, rng.integers(0, 4))]
        made.append(answer_of(f"q{seed}-{i}", claims, [bool(rng.random() < CHANCES[one]) for one in claims]))
    return made


def measurement(found):
    return Measurement(found, np.zeros((len(found), 0)))


@pytest.fixture(scope="module")
def calibrated():
    fitting, held_out = answers(150, 0), answers(150, 1)
    parts = fit_answer_parts(fitting, "t", "w")
    scores = [one.confidence for one in fitting]
    calibrator = fit_calibrator("platt", scores, [one.correct for one in fitting], template_hash="t", weights_hash="w")
    return certified(CONFIG, calibrator, measurement(held_out), 0.2, 0.05, "graded.jsonl", parts)


class Loaded:
    """Answers every question with the claims that it lists."""

    def __init__(self):
        self.config = CONFIG

        class Template:
            control_tokens = ()
            task = task_of(CONFIG.task)

            def prompt_ids(self, record):
                return [0]

        self.template = Template()

    def measure(self, records):
        claims = [[f"{one} so." for one in record.question.split()] for record in records]
        return measurement([answer_of("?", one, [True] * len(one)) for one in claims])


def test_claims_in_doubt_are_withheld(calibrated):
    answerer = Answerer(Loaded(), calibrated)
    reply = answerer.answer("Surely Hardly Perhaps Surely")
    assert [part.kept for part in reply.parts] == [True, False, False, True]
    assert (reply.spoken, reply.abstained, reply.certified) == ("Surely so. Surely so.", False, True)
    assert (reply.threshold, reply.risk, reply.certificate) == (calibrated.claim.threshold, 0.2, None)
    assert "Hardly" not in reply.told()
    assert reply.told().count("withheld: ") == 2
    assert "at least 80% of the replies hold no wrong claim" in reply.promise
    assert reply.reason.startswith("I give 2 of my 4 claims: those from")
    silent = answerer.answer("Hardly Hardly")
    assert (silent.spoken, silent.abstained) == (REFUSAL, True)
    assert "all 2 claims are withheld" in silent.told()


def test_risks_to_choose_from(calibrated):
    answerer = Answerer(Loaded(), calibrated)
    assert [one.risk for one in answerer.levels()] == [0.1, 0.2, 0.3]
    thresholds = [one.threshold for one in answerer.levels()]
    assert thresholds == sorted(thresholds, reverse=True)
    assert answerer.level(0.3).claims == calibrated.claims[0.3].certificate
    with pytest.raises(UserError, match=r"risk 0.4 is not certified; certified are: 0.1, 0.2, 0.3"):
        answerer.level(0.4)


def test_without_a_promise_nothing_is_said_unless_allowed(calibrated):
    none = replace(calibrated, claims={}, certification=Certification(None, "too few"))
    assert not none.promised
    assert Answerer(Loaded(), none).answer("Surely Hardly").spoken == REFUSAL
    allowed = Answerer(Loaded(), none, uncertified=True).answer("Surely Hardly")
    assert (allowed.spoken, allowed.certified) == ("Surely so. Hardly so.", False)
    assert all(part.kept for part in allowed.parts)
    bare = Answerer(Loaded(), replace(none, parts=None), uncertified=True).answer("Surely")
    assert bare.parts == ()


def test_what_is_told(calibrated):
    lines = told(calibrated.parts, calibrated.claims)
    assert "at least 80% of replies hold no wrong claim, on average over draws of the 150 graded ones" in lines[1]
    assert "with 95% confidence" in lines[2]
    few = certify_parts(CONFIG, calibrated.parts, answers(3, 5), 0.2, 0.05)
    assert told(None, few) == ["claims: nothing is promised: 3 graded replies; a risk of 0.2 needs at least 4"]
    assert certify_parts(CONFIG, None, answers(3, 5), 0.2, 0.05)[0.2].reason == "no claim was graded to calibrate by"
    assert certify_parts(RunConfig(), calibrated.parts, answers(30, 5), 0.2, 0.05) == {}
    assert fit_answer_parts([Answer("q", "?", "a", (-1.0,), True)], "t", "w") is None


def test_unknown_grades_count_as_wrong(calibrated):
    unknown = [replace(one, parts=tuple(replace(part, correct=None) for part in one.parts)) for one in answers(40, 3)]
    found = certify_parts(CONFIG, calibrated.parts, unknown, 0.2, 0.05)[0.2]
    assert found.certificate is None


def test_the_report_counts_the_test_answers(calibrated):
    test = answers(120, 2)
    report = parts_report(calibrated, test, 20)
    (row,) = report.fields
    parts = [part for one in test for part in one.parts]
    assert (row.name, row.n) == ("claim", len(parts))
    assert row.right.estimate == pytest.approx(np.mean([part.correct for part in parts]))
    assert row.gap.low < 0 < row.gap.high
    assert report.not_found == sum(not one.parts for one in test)
    found = {(risk, one.promise.delta): one for risk, _, rows in report.claims for one in rows}
    for (risk, _), one in found.items():
        kept = [p >= one.promise.threshold for p in part_probabilities(calibrated.parts, test)]
        assert one.kept == sum(each.sum() for each in kept)
        assert one.wrong == sum(
            any(stays and not part.correct for stays, part in zip(each, answer.parts, strict=True))
            for each, answer in zip(kept, test, strict=True)
        )
        assert one.low <= risk
    assert report.figure is not None
    assert parts_report(replace(calibrated, parts=None), test, 20) is None


def test_the_page_holds_it_and_a_field_that_a_reply_made_up_does_no_harm(calibrated):
    test = [
        replace(one, parts=tuple(replace(part, name="<img src=x>") for part in one.parts)) for one in answers(60, 2)
    ]
    report = parts_report(calibrated, test, 20)
    measured = [Measured("tuned", test)]
    data = ReportData("run", {}, {}, None, None, measured, 0.2, 0.05, calibrated.certification, parts=report)
    html = render_report(data)
    assert "<img" not in html
    assert "&lt;img src=x&gt;" in html
    assert "At least 80% of its replies then hold no wrong claim" in html
    assert "with something left" in html
    assert "img src" not in render_report(replace(data, parts=replace(report, fields=())))
