"""A finished run asked: what it says, when it abstains, and which promises can be chosen."""

from dataclasses import replace

import numpy as np
import pytest

from calibtrain.abstention.certificate import Certification, certify
from calibtrain.calibration.scores import TEMPERATURE_GRID
from calibtrain.confidence.answer import Answer
from calibtrain.errors import UserError
from calibtrain.pipeline.answer import REFUSAL, Answerer
from calibtrain.pipeline.calibrate import fit, read_calibration
from calibtrain.pipeline.evaluate import Measurement
from tests.unit.pipeline.conftest import config_of, measured

CHANCES = {"sure": 0.97, "even": 0.5, "never": 0.02}


class Template:
    """Counts characters as tokens."""

    control_tokens = ("<|end|>",)

    def prompt_ids(self, record):
        return list(range(len(record.question)))


class Loaded:
    """Answers "yes" with the chance that CHANCES gives the question."""

    template = Template()

    def __init__(self, config):
        self.config = config

    def measure(self, records):
        logprobs = [np.log(CHANCES[record.question]) for record in records]
        answers = [
            Answer(record.id, record.question, "yes", (logprob / 2, logprob / 2), tokens=(" yes", ""))
            for record, logprob in zip(records, logprobs, strict=True)
        ]
        return Measurement(answers, np.repeat(np.array(logprobs)[:, None], len(TEMPERATURE_GRID), axis=1))


@pytest.fixture
def answerer(out):
    return Answerer(Loaded(config_of("temperature", target_risk=0.1)), read_calibration(out))


def test_one_question_and_many_get_the_same_replies_in_order(answerer):
    questions = ["even", "sure", "never", "sure"]
    assert answerer.answers(questions) == [answerer.answer(question) for question in questions]
    assert answerer.answers([]) == []
    assert answerer.answer(" sure ").prompt_tokens == len("sure")


def test_it_abstains_below_the_threshold_and_says_why(answerer):
    sure, never = answerer.answers(["sure", "never"])
    assert not sure.abstained
    assert sure.spoken == "yes"
    assert "at most 10%" in sure.reason
    assert never.abstained
    assert never.spoken == REFUSAL
    assert "2% chance of being right; I answer from" in never.reason
    assert never.text == "yes"
    assert sure.certificate.threshold == sure.threshold > never.probability
    assert sure.sentence.startswith("I am almost certain") or "likely" in sure.sentence
    assert [token.text for token in sure.tokens] == [" yes", ""]
    assert sure.tokens[0].probability == pytest.approx(0.97**0.5)


def test_a_stricter_level_answers_less_and_the_last_answers_everything(answerer):
    levels = answerer.levels()
    assert [level.risk for level in levels[:-1]] == sorted(level.risk for level in levels[:-1])
    assert levels[-1].certificate is None
    assert levels[-1].threshold == 0
    assert answerer.default in levels
    assert [level.threshold for level in levels] == sorted((level.threshold for level in levels), reverse=True)
    reply = answerer.answer("even", risk=levels[0].certificate.target_risk)
    assert reply.abstained
    assert not answerer.decide(reply, levels[-1]).abstained
    assert answerer.answer("even", risk=0.1).certificate == answerer.default.certificate


def test_without_a_certificate_it_answers_all_and_says_so(answerer):
    none = replace(answerer.calibrated, certification=Certification(None, "too few"), curve={})
    reply = Answerer(answerer.loaded, none).answer("never")
    assert (reply.abstained, reply.certified, reply.risk, reply.threshold) == (False, False, None, None)
    assert "No threshold is certified" in reply.reason


@pytest.mark.parametrize(
    ("question", "risk", "words"),
    [
        (" ", None, "empty"),
        ("hi \ud83d", None, "half of a character"),
        ("sure", 0.123, "certified are: 0."),
        ("a<|end|>b", None, "control token"),
    ],
)
def test_bad_input_is_told(answerer, question, risk, words):
    with pytest.raises(UserError, match=words):
        answerer.answers([question], risk=risk)


def test_the_probability_is_the_calibrators_not_the_models(out):
    fitting = measured(1200, 7)
    calibrator = fit(config_of("temperature"), fitting, "t" * 64, "w" * 64)
    found = certify([0.9] * 400, [True] * 400, 0.1, 0.05)
    calibrated = replace(read_calibration(out), calibrator=calibrator, certification=found, curve={})
    answerer = Answerer(Loaded(config_of("temperature")), calibrated)
    scores = answerer.loaded.measure([type("R", (), {"question": "even", "id": "x"})()]).scores()
    assert answerer.answer("even").probability == float(calibrator.apply(scores)[0])
