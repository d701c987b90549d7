from collections import Counter

import pytest

from calibtrain.confidence.stated import read_statement
from calibtrain.data import pairs as pairs_module
from calibtrain.data.pairs import FEW, add_rejected, own_wrong_answer, with_confidence_statements, with_rejected
from calibtrain.errors import UserError
from calibtrain.records import Message, Record, unit_hash
from calibtrain.tasks.number import Number
from calibtrain.tasks.short_answer import ShortAnswer


def question(text, chosen, *aliases, continent="Europe"):
    return Record((Message("user", text),), chosen, accepted=(chosen, *aliases), strata={"continent": continent})


LYON = question("Lyon?", "France")
COUNTRIES = ["France", "Spain", "Italy", "Poland"]


def test_the_first_wrong_sample_is_rejected():
    assert with_rejected(LYON, ["france", "", " Belgium ", "Spain"], []).rejected == "Belgium"
    assert with_rejected(LYON, ["the France."], COUNTRIES).rejected in COUNTRIES[1:]
    assert own_wrong_answer(LYON, ["FRANCE", " "]) is None


def test_a_chain_that_ends_in_the_right_number_is_never_rejected():
    chains = ["2 + 2 = 4\n#### 4.0", "it is\n#### 5", "#### 6"]
    record = Number().asked(Record((Message("user", "2 + 2?"),), "two and two\n#### 4"))
    assert with_rejected(record, chains, [], Number()).rejected == chains[1]
    assert add_rejected([record], [chains], Number())[0][0].chosen == "two and two\n#### 4"


def test_aliases_are_right_and_never_rejected():
    chicago = question("Chicago?", "United States", "USA")
    assert own_wrong_answer(chicago, ["USA", "u.s.a."]) is None
    assert with_rejected(chicago, ["USA"], ["USA", "Mexico"]).rejected == "Mexico"


def test_without_accepted_answers_the_chosen_one_grades():
    record = Record((Message("user", "q"),), "yes")
    assert with_rejected(record, ["Yes", "no"], []).rejected == "no"


def test_the_fallback_is_a_pure_function_of_the_question():
    drawn = {i: with_rejected(question(f"q{i}", "France"), [], COUNTRIES).rejected for i in range(60)}
    assert set(drawn.values()) == set(COUNTRIES[1:])
    for i, text in drawn.items():
        assert with_rejected(question(f"q{i}", "France"), ["france"], COUNTRIES[::-1]).rejected == text


def test_no_wrong_answer_at_all():
    with pytest.raises(UserError, match="no wrong answer to reject"):
        with_rejected(LYON, ["France"], ["France", " "])


def test_fallbacks_come_from_the_same_strata_and_are_counted():
    records = [
        LYON,
        question("Porto?", "Portugal"),
        question("Kobe?", "Japan", continent="Asia"),
        question("Pune?", "India", continent="Asia"),
        question("Suva?", "Fiji", continent="Oceania"),
    ]
    pairs, fallbacks = add_rejected(records, [["Spain"], ["Portugal"], [], ["Japan"], ["Fiji"]])
    assert [pair.rejected for pair in pairs[:4]] == ["Spain", "France", "India", "Japan"]
    assert pairs[4].rejected in {"France", "Portugal", "Japan", "India"}  # nothing wrong in Oceania
    assert fallbacks == 3


def test_the_cost_of_pairs_does_not_grow_faster_than_the_rows(monkeypatch):
    calls = Counter()

    class Graded(ShortAnswer):
        def right(self, text, record):
            calls["graded"] += 1
            return super().right(text, record)

    def hashed(*parts):
        calls["hashed"] += 1
        return unit_hash(*parts)

    monkeypatch.setattr(pairs_module, "unit_hash", hashed)
    task, found = Graded(), {}
    for count in (300, 3000):
        records = [question(f"q{i}", f"answer {i}") for i in range(count)]
        calls.clear()
        pairs, fallbacks = add_rejected(records, [[] for _ in records], task)
        found[count] = dict(calls)
        assert fallbacks == count
        assert all(pair.rejected != pair.chosen for pair in pairs)
        assert len({pair.rejected for pair in pairs}) > count / 2
        calls.clear()
        assert add_rejected(records, [["wrong"] for _ in records], task)[1] == 0
        assert calls == {"graded": count}
        assert [pair.rejected for pair in add_rejected(records[::-1], [[] for _ in records], task)[0]][::-1] == [
            pair.rejected for pair in pairs
        ]
    assert all(calls <= 1.1 * count * 2 for count, one in found.items() for calls in one.values())


@pytest.mark.parametrize("count", [FEW - 3, FEW + 10])
def test_the_one_wrong_answer_of_many_is_found(count):
    record = question("q", *(f"{i}" for i in range(count)))
    texts = [*record.accepted, " ", ""]
    with pytest.raises(UserError, match="no wrong answer to reject"):
        with_rejected(record, [], texts)
    assert with_rejected(record, [], [*texts[:7], "other", *texts[7:]]).rejected == "other"


def test_what_few_alternatives_give_stays():
    drawn = [with_rejected(question(f"q{i}", "France"), [], COUNTRIES).rejected for i in range(6)]
    assert drawn == ["Spain", "Italy", "Poland", "Italy", "Italy", "Poland"]


@pytest.mark.parametrize("keep", [True, False])
def test_confidence_statements_prefer_a_sure_right_and_an_unsure_wrong_answer(keep):
    pairs = [with_rejected(question(f"{i}?", "France"), ["Spain"], []) for i in range(40)]
    made = with_confidence_statements([*pairs, LYON], keep=keep)
    assert made[-1] is LYON  # no pair: it is told of when it is dropped
    each = 3 if keep else 2
    assert len(made) == 40 * each + 1
    said = set()
    for i, pair in enumerate(pairs):
        *plain, good, bad = made[each * i : each * (i + 1)]
        assert plain == ([pair] if keep else [])
        for record, answer, order in ((good, "France", 1), (bad, "Spain", -1)):
            better, worse = (read_statement(text) for text in (record.chosen, record.rejected))
            assert better.answer == worse.answer == answer
            high, low = (better.confidence, worse.confidence)[::order]
            assert high >= 0.7
            assert low <= 0.3
            said |= {high, low}
    assert said == {0.0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0}
    assert made == with_confidence_statements([*pairs, LYON], keep=keep)
