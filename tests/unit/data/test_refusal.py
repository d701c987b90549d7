"""Refusal examples: labels from whole graded answers, made anew, and only what is said is learnt."""

from __future__ import annotations

import math

import pytest

from calibtrain.data.collate import collate
from calibtrain.data.refusal import ARE_YOU_SURE, REFUSALS, SURE, UNSURE, certain_by_entropy, refusal_examples
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.losses.refusal import RefusalTuningLoss
from calibtrain.losses.terms import CHOSEN
from calibtrain.records import Message, Record
from calibtrain.tasks.matching import grade
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module", params=["plain", "chat"])
def template(request):
    return Template(request.param, tiny_tokenizer())


def record(question, gold):
    return Record((Message("user", question),), chosen=gold, accepted=(gold,))


RECORDS = [
    record("Where is Lyon?", "France"),
    record("Where is Agadez?", "Niger"),
    record("Where is Perth?", "Australia"),
]
TEXTS = ["France", "Nigeria", "Perth"]


def completion(template, example):
    (one,) = example
    return template.decode_answer(one.ids[one.completion_start :])


def test_statements_follow_the_answer_that_was_graded(template):
    """'Niger' is within 'Nigeria': a substring match would call the model sure of a wrong answer."""
    known = [grade(text, one.accepted) for text, one in zip(TEXTS, RECORDS, strict=True)]
    assert RECORDS[1].chosen in TEXTS[1]
    examples = refusal_examples(RECORDS, TEXTS, known, template, 200)
    assert [completion(template, one) for one in examples] == [SURE, UNSURE, UNSURE]
    assert [one.correct for (one,) in examples] == [1.0, 0.0, 0.0]
    for (one,), text, gold in zip(examples, TEXTS, RECORDS, strict=True):
        prompt = template.tokenizer.decode(one.ids[: one.completion_start])
        assert prompt.index(text) < prompt.index(ARE_YOU_SURE)
        assert one.role == CHOSEN
        assert text == gold.chosen or gold.chosen not in prompt.replace(text, "")


def test_refusals_replace_what_is_not_known(template):
    examples = refusal_examples(RECORDS, TEXTS, [True, False, None], template, 200, "refusal")
    assert completion(template, examples[0]) == "France"
    assert completion(template, examples[1]) in REFUSALS
    assert [one.record_id for (one,) in examples] == [0, 1]
    assert examples == refusal_examples(RECORDS, TEXTS, [True, False, None], template, 200, "refusal")


def test_fresh_labels_change_what_is_learnt(template):
    before = refusal_examples(RECORDS, TEXTS, [True, False, False], template, 200, "refusal")
    after = refusal_examples(RECORDS, ["France", "Niger", "Perth"], [True, True, False], template, 200, "refusal")
    assert completion(template, before[1]) in REFUSALS
    assert completion(template, after[1]) == "Niger"
    assert before[2] == after[2]


def test_the_question_is_not_learnt(template):
    examples = refusal_examples(RECORDS, TEXTS, [True, False, False], template, 200)
    sequences = [one for example in examples for one in example]
    counts = RefusalTuningLoss().counts(collate(sequences, template.pad_id))
    lengths = [one.completion_length for one in sequences]
    assert {name: int(count) for name, count in counts.items()} == {
        "nll_known": lengths[0],
        "nll_refusal": lengths[1] + lengths[2],
    }


def test_a_record_without_gold_answer_learns_its_own_right_one(template):
    asked = Record((Message("user", "Where is Lyon?"),))
    (example,) = refusal_examples([asked], ["France"], [True], template, 200, "refusal")
    assert completion(template, example) == "France"


def test_an_accepted_answer_does_not_take_the_place_of_the_reasoning_that_led_to_it(template):
    asked = [Record((Message("user", "6 * 7?"),), accepted=("42",)), record("Where is Lyon?", "France")]
    replies = [template.tokenizer.encode("Six sevens: 42")] * 2  # cut: no end token to be learned
    one, other = refusal_examples(asked, ["42", "France"], [True, True], template, 200, "refusal", replies)
    assert one[0].ids[one[0].completion_start :] == tuple(replies[0])
    assert completion(template, other) == "France"  # what the data give stays
    unknown, _ = refusal_examples(asked, ["41", "Ga"], [False, False], template, 200, "refusal", replies)
    assert completion(template, unknown) in REFUSALS


def test_nothing_left_is_an_error(template):
    with pytest.raises(UserError, match="no refusal example"):
        refusal_examples(RECORDS, TEXTS, [None] * 3, template, 200)
    with pytest.raises(UserError, match="max_length"):
        refusal_examples(RECORDS, TEXTS, [True] * 3, template, 1)
    assert refusal_examples([], [], [], template, 200) == []


def test_certain_by_entropy():
    samples = [["a"] * 5, ["a", "b", "c", "d", "e"], ["A", "a ", "a.", "b", "b"], ["x", "x", "x", "x", "y"]]
    assert certain_by_entropy(samples) == [True, False, False, True]
    assert certain_by_entropy(samples, share=0.25) == [True, False, False, False]
    assert certain_by_entropy(samples, share=0.75) == [True, False, True, True]
    # Every question is judged, not the last alone, and equal ones alike, in any order.
    assert certain_by_entropy(samples[::-1]) == [True, False, False, True]
    assert certain_by_entropy([["a", "a"]] * 3 + [["a", "b"]]) == [True, True, True, False]
    assert certain_by_entropy([["a", "b"]] * 4) == [False] * 4
    assert certain_by_entropy([]) == []
    assert math.isclose(0.5, sum(certain_by_entropy(samples)) / 4)
