"""Paragraphs of claims: how they are split and graded, by the house's rules and by a user's functions."""

import sys
from types import SimpleNamespace

import pytest

from calibtrain.config import RunConfig
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks.kinds import task_of

GOLD = Record(
    (Message("user", "Tell of France."),),
    accepted=("Paris is the capital of France.", "It lies in Europe. Its currency is the euro."),
    origin="rows.jsonl:3",
)


def task(**keys):
    return task_of(RunConfig(task={"kind": "claims", **keys}).task)


@pytest.fixture
def user(monkeypatch):
    """A module of the user's."""

    def make(**functions):
        monkeypatch.setitem(sys.modules, "users_own", SimpleNamespace(**functions))

    return make


def graded(task, reply, gold=GOLD):
    reading = task.read(reply, gold)
    (grade,) = task.grades([reading], [gold])
    assert [reply[one.start : one.stop] for one in reading.parts] == [one.text for one in reading.parts]
    return grade.correct, grade.parts


@pytest.mark.parametrize(
    ("reply", "whole", "parts"),
    [
        ("Paris is the capital of France. It lies in Europe.", True, (True, True)),
        ("its currency is the EURO", True, (True,)),
        ("Paris is the capital of France. It lies in Asia.", False, (True, False)),
        ("It is not so that Paris is the capital of France.", False, (False,)),
        ("It lies in Europe. Its currency is the euro.", True, (True, True)),
        ("", False, ()),
        (" ... ", False, ()),
    ],
)
def test_a_claim_is_one_of_the_accepted_sentences(reply, whole, parts):
    assert graded(task(), reply) == (whole, parts)
    assert task().right(reply, GOLD) == whole
    assert task().read(reply, GOLD).found == bool(parts)


def test_without_facts_nothing_is_known():
    assert graded(task(), "It lies in Asia.", Record(GOLD.prompt)) == (None, (None,))
    assert task().key("Bo is up. Al is in.", GOLD) == task().key("AL is in. Bo is UP. Al is in", GOLD)
    assert task().several_lines
    assert task().drops_parts


def test_a_users_grader_decides(user):
    seen = []

    def grader(claim, told):
        seen.append((claim, told["question"], told["accepted"]))
        return {"Yes": True, "No": False}.get(claim.split()[0])

    user(grade=grader)
    one = task(grader="users_own:grade")
    bare = Record(GOLD.prompt)
    assert one.gradable(bare)
    assert graded(one, "Yes it is. Yes too.", bare) == (True, (True, True))
    assert graded(one, "Yes it is. Maybe it is.", bare) == (None, (True, None))
    assert graded(one, "Maybe it is. No it is not.", bare) == (False, (None, False))
    assert seen[0] == ("Yes it is.", "Tell of France.", [])
    user(grade=lambda claim, told: "yes")
    with pytest.raises(UserError, match=r"task.grader: users_own:grade \(rows.jsonl:3\) returns 'yes'"):
        graded(task(grader="users_own:grade"), "It is.")
    user(grade=lambda claim, told: 1 / 0)
    with pytest.raises(UserError, match=r"rows.jsonl:3.*raises ZeroDivisionError"):
        graded(task(grader="users_own:grade"), "It is.")


def test_a_users_splitter_cuts(user):
    user(split=lambda text: [one for one in text.split(";") if one.strip()])
    assert graded(task(split="users_own:split"), "Paris is the capital of France; it is in Asia;") == (
        False,
        (True, False),
    )
    for bad in (lambda text: ["other"], lambda text: [text, text], lambda text: [""], lambda text: [3]):
        user(split=bad)
        with pytest.raises(UserError, match=r"task.split: users_own:split returns"):
            graded(task(split="users_own:split"), "It is.")
    user(split=lambda text: 1 / 0)
    with pytest.raises(UserError, match="raises ZeroDivisionError"):
        graded(task(split="users_own:split"), "It is.")
    with pytest.raises(UserError, match=r"task.split"):
        task(split="words")
