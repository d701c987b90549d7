"""Graders and extractors of the user's, those that work and those that do not."""

import sys

import numpy as np
import pytest

from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks.kinds import task_of

MODULE = """
import re
import numpy as np
def same(answer, record):
    return np.bool_(answer == record["accepted"][0])
def none(answer, record):
    return None
def text(answer, record):
    return "yes"
def number(answer, record):
    return 1.0
def raises(answer, record):
    if answer == "bad":
        raise ValueError("cannot\\nread it")
    return True
def boxed(reply):
    found = re.search(r"<(.*?)>", reply)
    return found and found[1]
def span(reply):
    return (3, 5)
def far(reply):
    return (3, 500)
def upper(reply):
    return reply.upper()
def breaks(reply):
    raise KeyError("x")
def three(reply):
    return 3
"""
RECORD = Record((Message("user", "What is it?"),), accepted=("ab",), origin="rows.jsonl:7")


@pytest.fixture(autouse=True)
def graders(tmp_path, monkeypatch):
    (tmp_path / "own_functions.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    yield
    sys.modules.pop("own_functions", None)


def task(grader="same", extractor=None, **settings):
    section = {"kind": "custom", "grader": f"own_functions:{grader}", **settings}
    section |= {"extractor": f"own_functions:{extractor}"} if extractor else {}
    return task_of(RunConfig.model_validate({"task": section}).task)


def graded(made, *replies, record=RECORD):
    found = made.grades([made.read(one, record) for one in replies], [record] * len(replies))
    return [one.correct for one in found]


def test_a_grader_says_what_is_right():
    made = task()
    assert graded(made, "ab", "cd", "") == [True, False, False]
    assert all(type(one) is bool for one in graded(made, "ab"))
    made.settle()
    assert graded(task("none"), "ab") == [None]
    task("none").settle()  # it may not know


@pytest.mark.parametrize(
    ("extractor", "reply", "found"),
    [
        ("boxed", "so <ab> it is", ("ab", 4, 6, True)),
        ("boxed", "no idea", ("", 0, 0, False)),
        ("boxed", "<ab> so ab", ("ab", 8, 10, True)),
        ("span", "it ab", ("ab", 3, 5, True)),
        ("upper", "it is", ("IT IS", 0, 5, True)),  # written otherwise: all of the reply says it
    ],
)
def test_an_extractor_finds_the_answer(extractor, reply, found):
    reading = task(extractor=extractor).read(reply, RECORD)
    assert (reading.text, reading.start, reading.stop, reading.found) == found


@pytest.mark.parametrize(
    ("grader", "words"),
    [
        ("text", "returns str 'yes', which is none of True, False and None"),
        ("number", "returns float 1.0"),
        ("raises", "raises ValueError (cannot read it)"),
    ],
)
def test_a_grader_that_fails_costs_no_answer_and_is_told_with_the_row(grader, words):
    made = task(grader)
    found = graded(made, "ab", "bad", "ab")
    assert found == ([True, None, True] if grader == "raises" else [None] * 3)
    with pytest.raises(UserError) as error:
        made.settle()
    assert words in str(error.value)
    assert "rows.jsonl:7 ('What is it?')" in str(error.value)
    assert f"task.grader own_functions:{grader}: {found.count(None)} of 3 answers" in str(error.value)
    assert "\n" not in str(error.value)
    made.settle()  # told once
    graded(made, "ab", "bad")
    other = task(grader)
    other.take(made.handed())  # of a process that lets this one tell
    made.settle()
    with pytest.raises(UserError, match="of 2 answers"):
        other.settle()


@pytest.mark.parametrize(
    ("extractor", "words"),
    [("breaks", "raises KeyError"), ("far", "returns (3, 500), which is no span"), ("three", "returns int 3")],
)
def test_an_extractor_that_fails_is_told(extractor, words):
    made = task(extractor=extractor)
    assert graded(made, "it ab") == [None]  # a fault of the reader is no wrong answer
    with pytest.raises(UserError, match=r"task\.extractor own_functions") as error:
        made.settle()
    assert words in str(error.value)


def test_accepted_answers_are_needed_unless_the_config_says_no():
    free = Record((Message("user", "Say something."),))
    assert not task().gradable(free)
    assert graded(task(), "ab", record=free) == [None]
    made = task("raises", needs_answers=False, lines="many")
    assert made.gradable(free)
    assert made.several_lines
    assert graded(made, "ab", record=free) == [True]


def test_a_grader_must_be_there_when_the_config_is_read():
    with pytest.raises(UserError, match=r"task.grader: own_functions:absent"):
        task("absent")


def test_numpy_is_what_the_grader_returned():
    sys.modules.pop("own_functions", None)
    assert isinstance(task().grader("ab", {"accepted": ["ab"]}), np.bool_)
