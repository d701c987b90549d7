"""A model that refuses is made to answer: what it refused although it was right shows."""

from dataclasses import replace

import pytest
import torch

from calibtrain.confidence import forced
from calibtrain.confidence.likelihood import answer_questions
from calibtrain.config import EvaluationConfig
from calibtrain.data.refusal import REFUSALS
from calibtrain.data.templates import Template
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.records import Message, Record
from tests.tiny import tiny_model, tiny_tokenizer

RECORDS = [Record(prompt=(Message("user", f"What is {i}?"),), accepted=("right",)) for i in range(6)]
SETTINGS = EvaluationConfig(batch_size=4, max_new_tokens=5)


@pytest.fixture(scope="module")
def model():
    return LossModel(Policy(tiny_model(initializer_range=0.3))).eval()


def test_refusals_are_whole_answers():
    assert all(map(forced.is_refusal, REFUSALS))
    assert forced.is_refusal("i do not know")
    assert not forced.is_refusal("I do not know, but Paris.")
    assert not forced.is_refusal("Paris")
    assert not forced.is_refusal("")


def test_a_banned_beginning_gives_the_likeliest_other_answer(model):
    template = Template("plain", tiny_tokenizer())
    free = answer_questions(model, template, RECORDS, SETTINGS)
    first = [int(free.features.targets[free.features.sequence_ids == i][0]) for i in range(len(RECORDS))]
    banned = answer_questions(model, template, RECORDS, SETTINGS, not_first=tuple(set(first)))
    for i, record in enumerate(RECORDS):
        with torch.no_grad():
            ids = torch.tensor([template.prompt_ids(record)])
            logprobs = model.policy.causal_model(input_ids=ids).logits[0, -1].log_softmax(-1)
        own = logprobs.clone()
        own[list(set(first))] = float("-inf")
        mine = banned.features.targets[banned.features.sequence_ids == i]
        assert int(mine[0]) == int(own.argmax())
        assert banned.answers[i].token_logprobs[0] == pytest.approx(float(logprobs[mine[0]]), abs=1e-4)


def test_over_refusal_is_what_was_refused_although_right(model, monkeypatch):
    """Of six, three are refused; forced, two of them would be right, of the others one is."""
    template = Template("plain", tiny_tokenizer())
    calls = []

    def told(model, template, records, settings, *, not_first=(), **_):
        calls.append([record.question for record in records])
        found = answer_questions(model, template, records, settings)
        texts = ["I do not know.", "right", "wrong", "I am not sure.", "I cannot say.", "wrong"]
        if not_first:
            assert template.completion_ids("I do not know.")[0] in not_first
            texts = ["right", "right", "wrong"]
        answers = [
            replace(one, text=text, correct=text == "right") for one, text in zip(found.answers, texts, strict=True)
        ]
        return replace(found, answers=answers)

    monkeypatch.setattr(forced, "answer_questions", told)
    found = forced.forced_answers(model, template, RECORDS, SETTINGS)
    assert calls[1] == [RECORDS[i].question for i in (0, 3, 4)]
    assert found.refused.tolist() == [True, False, False, True, True, False]
    assert [answer.text for answer in found.forced] == ["right", "right", "wrong", "right", "wrong", "wrong"]
    statistics = found.statistics
    assert (statistics.refusal_rate, statistics.hallucination_rate) == (0.5, pytest.approx(2 / 6))
    assert statistics.over_refusal == pytest.approx(2 / 3)
    assert found.over_refusal[:2] == (2, 3)


def test_who_never_refuses_is_asked_once(model):
    found = forced.forced_answers(model, Template("plain", tiny_tokenizer()), RECORDS, SETTINGS)
    assert not found.refused.any()
    assert found.forced is found.given.answers
