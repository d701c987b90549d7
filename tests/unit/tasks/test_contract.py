"""What a task reads in a reply becomes tokens, log-probs and a grade, whatever its kind."""

import math

import pytest
import torch

from calibtrain.confidence.generation import Generation
from calibtrain.confidence.likelihood import graded_answers
from calibtrain.config import EvaluationConfig, RunConfig
from calibtrain.data.replies import read_reply
from calibtrain.data.templates import Template
from calibtrain.records import Message, Record
from calibtrain.tasks.short_answer import SHORT_ANSWER
from calibtrain.tasks.task import Part, Reading, Task, is_right
from tests.tiny import tiny_tokenizer

RECORD = Record(
    prompt=(Message("user", "In which country is the city of Osaka?"),), chosen="Japan", accepted=("Japan",)
)


class LastWord(Task):
    """The last word of several lines is the answer; each word is a part."""

    several_lines = True
    stop = ("END",)

    def read(self, reply, record):
        words, place = [], 0
        for word in reply.split():
            place = reply.index(word, place)
            words.append(Part(f"word {len(words)}", word, place, place + len(word)))
            place += len(word)
        if not words:
            return Reading("", 0, 0, found=False)
        return Reading(words[-1].text, words[-1].start, words[-1].stop, parts=tuple(words))

    def right(self, text, record):
        return text in record.accepted


def generation(template, text, end=True):
    ids = template.tokenizer(text, add_special_tokens=False)["input_ids"] + [template.end_id] * end
    count = len(ids)
    return Generation(
        tuple(ids), tuple(-0.1 * (i + 1) for i in range(count)), torch.arange(count * 2.0).view(count, 2), end
    )


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("thought", ["", "<think>\nOsaka? Kenya\n</think>\n\n"])
def test_an_answers_tokens_are_those_that_say_it(kind, end, thought):
    template = Template(kind, tiny_tokenizer(), task=LastWord())
    made = generation(template, f" {thought}It is\nin Japan", end)
    (answer,) = graded_answers([RECORD], [made], template, EvaluationConfig()).answers
    assert (answer.text, answer.reply, answer.correct, answer.found) == ("Japan", "It is\nin Japan", True, True)
    assert "".join(answer.tokens).strip() == "Japan"
    count = len(answer.tokens)
    assert answer.token_logprobs == made.logprobs[-count:]
    assert answer.reply_logprob == math.fsum(made.logprobs)
    assert [part.text for part in answer.parts] == ["It", "is", "in", "Japan"]
    assert answer.parts[-1].logprob == math.fsum(answer.token_logprobs)


def test_words_behind_the_answer_are_not_its_tokens():
    template = Template("chat", tiny_tokenizer(), task=LastWord())
    template.task.read = lambda reply, record: Reading("Japan", reply.index("Japan"), reply.index("Japan") + 5)
    made = generation(template, "In Japan, of course")
    (answer,) = graded_answers([RECORD], [made], template, EvaluationConfig()).answers
    assert "".join(answer.tokens).strip(" ,") == "Japan"
    assert "" not in answer.tokens


def test_nothing_found_is_wrong_and_the_whole_reply_is_read():
    template = Template("chat", tiny_tokenizer(), task=LastWord())
    made = generation(template, "")
    (answer,) = graded_answers([RECORD], [made], template, EvaluationConfig()).answers
    assert (answer.found, answer.correct, answer.token_logprobs) == (False, False, made.logprobs)


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_several_lines_end_at_a_stop(kind):
    template = Template(kind, tiny_tokenizer(), task=LastWord())
    said = generation(template, " one\ntwo END three\n\nQuestion: four", end=False).tokens
    assert template.decode_answer(said) == "one\ntwo"
    cut = generation(template, " one\ntwo", end=False).tokens
    assert template.goes_on(cut)
    assert not template.goes_on(said)
    newline = generation(template, "\n", end=False).tokens
    assert template.goes_on(newline)
    ends = {template.tokenizer.decode([token])[-1:] for token in template.stop_ids}
    assert "D" in ends
    assert Template(kind, tiny_tokenizer()).hash != template.hash


def test_the_whole_reply_is_a_short_answer_with_its_end_token():
    template = Template("chat", tiny_tokenizer())
    made = generation(template, "Japan")
    reply = read_reply(template, made.tokens, RECORD)
    assert reply.span == (0, len(made.tokens))
    assert reply.parts == ()
    assert is_right(SHORT_ANSWER, "the japan", RECORD)
    assert not is_right(SHORT_ANSWER, "", RECORD)


def test_an_earlier_runs_grading_is_read_as_its_task():
    config = RunConfig.model_validate({"evaluation": {"grading": "exact_match", "batch_size": 3}})
    assert (config.task.match, config.evaluation.batch_size) == ("exact_match", 3)
    assert RunConfig.model_validate(config.resolved()) == config
