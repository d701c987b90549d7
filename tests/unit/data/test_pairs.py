import pytest

from calibtrain.confidence.stated import read_statement
from calibtrain.data.pairs import add_rejected, own_wrong_answer, with_confidence_statements, with_rejected
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks.number import Number


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
