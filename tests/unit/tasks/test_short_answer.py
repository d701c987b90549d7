"""Ways to match a short answer."""

import time

import pytest
from pydantic import ValidationError

from calibtrain.config import RunConfig
from calibtrain.config_tasks import ShortAnswerTask
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks import pattern_process
from calibtrain.tasks.short_answer import ShortAnswer, token_f1
from calibtrain.tasks.task import is_right


def record(*accepted):
    return Record((Message("user", "Which?"),), chosen=accepted[0], accepted=accepted, origin="rows.jsonl:7")


@pytest.mark.parametrize(
    ("match", "accepted", "right", "wrong"),
    [
        ("normalized_match", "Japan", ["the japan.", "<think>Kenya</think> Japan"], ["Japan or Kenya", ""]),
        ("exact_match", "Japan", [" Japan"], ["japan"]),
        ("contains", "New York", ["It is in new york, I think", "New-York"], ["New Yorkshire", "York New", "", "New"]),
        ("regex", r"(?i)(city of )?osaka\.?", ["Osaka", "City of Osaka."], ["in Osaka", "", "Osaka\nOsaka"]),
        ("token_f1", "the quick brown fox", ["quick brown fox", "a brown quick fox runs"], ["fox", "", "the"]),
    ],
)
def test_right_by_each_way_to_match(match, accepted, right, wrong):
    task = ShortAnswer(ShortAnswerTask(match=match, f1=0.8 if match == "token_f1" else None))
    for text in right:
        assert is_right(task, text, record("something else", accepted)), text
    for text in wrong:
        assert not is_right(task, text, record("something else", accepted)), text


def test_f1_counts_words_as_often_as_they_stand():
    assert token_f1("a b b c", "b b d") == pytest.approx(2 * 2 / (3 + 3))  # "a" is an article
    assert token_f1("the", "the") == 0.0


def test_a_pattern_that_does_not_compile_is_named_by_its_row():
    task = ShortAnswer(ShortAnswerTask(match="regex"))
    with pytest.raises(UserError, match=r"rows.jsonl:7: the accepted answer '\(a' is no regular expression"):
        task.asked(record("fine", "(a"))
    assert task.asked(record("fine")) == record("fine")
    assert ShortAnswer().asked(record("(a")) == record("(a")


def test_a_catastrophic_pattern_ends(monkeypatch):
    monkeypatch.setattr(pattern_process, "SECONDS", 0.3)
    start = time.perf_counter()
    assert not pattern_process.matches_whole("(a+)+", "a" * 40 + "b")
    assert pattern_process.last_group("(a+)+b", "a" * 40) is None
    assert time.perf_counter() - start < 10
    assert pattern_process.matches_whole("a+", "a" * 40)
    assert not pattern_process.matches_whole("a+", "a" * (pattern_process.LONGEST + 1))
    assert pattern_process.last_group("(a)(?:b)", "x" * pattern_process.LONGEST + "ab") == (
        pattern_process.LONGEST,
        pattern_process.LONGEST + 1,
    )


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"match": "token_f1"}, "go together"),
        ({"f1": 0.5}, "go together"),
        ({"match": "token_f1", "f1": 0.0}, "greater than 0"),
        ({"lines": "two"}, "'one' or 'many'"),
        ({"kind": "number", "pattern": "(a"}, "no regular expression"),
        ({"kind": "number", "pattern": "(a)(b)"}, "2 groups"),
        ({"kind": "number", "answer_in": ["pattern"]}, "go together"),
        ({"kind": "number", "answer_in": []}, "at least 1"),
        ({"kind": "math", "answer_in": ["boxed", "boxed"]}, "twice"),
        ({"kind": "math", "rel": 0.1}, "Extra inputs"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(section, said):
    with pytest.raises(ValidationError, match=said):
        RunConfig.model_validate({"task": {"kind": "short_answer", **section}})


def test_defaults_of_each_kind_survive_writing():
    for section, tokens in (
        ({"kind": "short_answer", "lines": "many"}, 12),
        ({"kind": "number", "pattern": "=> (.*)"}, 256),
        ({"kind": "math"}, 512),
    ):
        config = RunConfig.model_validate({"task": section, "evaluation": {"stop": ["\nQ:"]}})
        assert config.evaluation.max_new_tokens == tokens
        assert RunConfig.model_validate(config.resolved()) == config
    assert RunConfig.model_validate({"task": {"kind": "number", "pattern": "=> (.*)"}}).task.answer_in == ("pattern",)
