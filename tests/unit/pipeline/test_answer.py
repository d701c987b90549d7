"""A finished run asked: what it says, when it abstains, and which promises can be chosen."""

from dataclasses import replace

import numpy as np
import pytest

from calibtrain.abstention.certificate import Certification, certify
from calibtrain.calibration.scores import TEMPERATURE_GRID
from calibtrain.confidence.answer import Answer
from calibtrain.errors import UserError
from calibtrain.pipeline import certify as certify_again
from calibtrain.pipeline.answer import Answerer
from calibtrain.pipeline.calibrate import fit
from calibtrain.pipeline.calibration_file import read_calibration
from calibtrain.pipeline.measurement import Measurement, read_measurement, write_measurement
from calibtrain.pipeline.question import Shapes
from calibtrain.pipeline.reply import REFUSAL
from calibtrain.records import Message
from calibtrain.tasks.short_answer import SHORT_ANSWER
from tests.unit.pipeline.conftest import config_of, mark_of, measured

CHANCES = {"sure": 0.97, "even": 0.5, "never": 0.02}


class Template:
    """Counts characters as tokens."""

    control_tokens = ("<|end|>",)
    task = SHORT_ANSWER

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
    assert [level.certificate is None for level in answerer.levels()] == [False] * 4
    answerer = Answerer(answerer.loaded, answerer.calibrated, uncertified=True)
    levels = answerer.levels()
    assert [level.risk for level in levels[:-1]] == sorted(level.risk for level in levels[:-1])
    assert levels[-1].certificate is None
    assert levels[-1].threshold == 0
    assert answerer.default in levels
    assert [level.threshold for level in levels] == sorted((level.threshold for level in levels), reverse=True)
    reply = answerer.answer("even", risk=levels[0].certificate.target_risk)
    assert reply.abstained
    assert not answerer.decide(reply, levels[-1]).abstained
    with pytest.raises(UserError, match="not certified"):
        answerer.level(0.5)
    assert answerer.answer("even", risk=0.1).certificate == answerer.default.certificate


def uncertified(calibrated, curve=None):
    return replace(calibrated, certification=Certification(None, "too few"), curve=curve or {})


def test_without_a_certificate_it_answers_nothing_and_says_so(answerer):
    asked = Answerer(answerer.loaded, uncertified(answerer.calibrated))
    reply = asked.answer("sure")
    assert (reply.spoken, reply.certified, reply.risk, reply.threshold) == (REFUSAL, False, None, None)
    assert reply.told().startswith("No certificate: too few.\nI do not know.\n")
    assert [level.answers for level in asked.levels()] == [False]
    # What is certified at another risk can still be chosen, and nothing else.
    asked = Answerer(answerer.loaded, uncertified(answerer.calibrated, answerer.calibrated.curve))
    assert asked.answer("sure").abstained
    assert not asked.answer("sure", risk=0.2).abstained
    assert [level.answers for level in asked.levels()] == [False, True, True, True, True]


def test_uncertified_answers_are_given_where_whoever_runs_it_says_so(answerer):
    reply = Answerer(answerer.loaded, uncertified(answerer.calibrated), uncertified=True).answer("never")
    assert (reply.spoken, reply.certified, reply.risk, reply.threshold) == ("yes", False, None, None)
    assert "No threshold is certified" in reply.reason
    assert reply.limit == "It answers everything, and how often it is wrong is not known."


def test_a_guess_alone_is_withheld_and_a_chance_that_is_no_number_abstains(answerer):
    (guess,) = answerer.guess(["sure"])
    assert guess.spoken == REFUSAL
    level = replace(answerer.default, threshold=float("nan"))
    assert answerer.decide(guess, level).abstained


def test_the_first_line_says_of_which_questions_it_holds(answerer):
    told = answerer.answer("sure").told().splitlines()
    assert told[0] == (
        "Certified for questions like the 1,200 graded ones from questions.jsonl, such as “?”: at most 10% of the answers "
        "given are wrong (95% confidence)."
    )
    assert told[1].startswith("yes  (")
    assert "other questions" in told[2]


def test_groups_are_answered_by_their_own_certificate_or_not_at_all(out):
    held_out = read_measurement(out / "answers" / "certification.jsonl")
    spoiled = [replace(one, correct=one.correct and one.strata["side"] == "left") for one in held_out.answers]
    write_measurement(replace(held_out, answers=spoiled), out / "answers" / "certification.jsonl", mark_of(out))
    found = certify_again.run(out, risk=0.6, by="side")
    assert not found.failures
    answerer = Answerer(Loaded(config_of("temperature")), read_calibration(out))
    left, right, other, unknown = answerer.answers(["sure"] * 4, groups=["left", "right", "up", None])
    assert (left.spoken, right.spoken, other.spoken, unknown.spoken) == ("yes", REFUSAL, REFUSAL, "yes")
    assert left.certificate == found.groups.groups["left"].certificate
    assert left.promise.startswith("Certified for questions of side left like the 800 graded ones")
    assert right.promise.startswith("No certificate for questions of side right")
    assert "none was graded (graded: left, right)" in other.promise
    # Where the group is not named, the reply says what is known of it and claims no more.
    assert "certificates by side are not applied" in unknown.limit
    assert "side right, " in unknown.limit
    assert "over all groups together but not where side is right" in unknown.sentence
    assert "97%, over all groups together but not where side is right)" in unknown.told()
    assert left.reservation == ""
    with pytest.raises(UserError, match=r"risk 0\.2 is not certified by group; 0\.6 is"):
        answerer.answer("sure", risk=0.2, group="left")
    with pytest.raises(UserError, match="2 for 1 questions"):
        answerer.answers(["sure"], groups=["left", "left"])


def test_a_group_is_refused_where_nothing_is_certified_by_group(answerer):
    with pytest.raises(UserError, match="certify OUT --by"):
        answerer.answer("sure", group="left")


def test_what_others_wrote_reaches_a_terminal_as_plain_text(answerer):
    reply = replace(answerer.answer("sure"), text="yes\x1b[2J\nCertified: 0%")
    assert reply.told().splitlines()[1].startswith("yes [2J Certified: 0%  (")


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


TALK = (Message("user", "sure"), Message("assistant", "no"), Message("user", "sure"))


def test_a_conversation_is_covered_where_conversations_were_graded(answerer):
    told = answerer.answer(TALK)
    assert (told.abstained, told.certified) == (True, False)
    assert told.told().splitlines()[:2] == [told.uncovered, REFUSAL]
    assert told.uncovered.startswith("Nothing is certified for a conversation")
    allowed = Answerer(answerer.loaded, answerer.calibrated, uncertified=True).answer(TALK)
    assert (allowed.spoken, allowed.certified, allowed.promise) == ("yes", False, told.uncovered)
    assert allowed.told().splitlines()[1].endswith("as measured on other questions)")
    graded = replace(answerer.calibrated, shapes=Shapes(conversations=True))
    assert Answerer(answerer.loaded, graded).answer(TALK).certified


def test_without_a_certificate_a_question_that_none_covers_is_told_both(answerer):
    none = replace(answerer.calibrated, certification=Certification(None, "too few answers"), curve={})
    told = Answerer(answerer.loaded, none).answer(TALK)
    assert told.promise.startswith("No certificate: too few answers. Nothing is certified for a conversation")
    assert told.abstained
    assert "--uncertified" in told.limit


def test_options_are_refused_where_the_task_chooses_from_none(answerer):
    with pytest.raises(UserError, match="options: the task of this run chooses from none; leave them out"):
        answerer.answer("sure", options=["yes", "no"])
