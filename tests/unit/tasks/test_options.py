"""Choice and label: how data names the right option, what is asked and what is read in a reply."""

import json
from dataclasses import replace

import pytest

from calibtrain.config import RunConfig
from calibtrain.config_tasks import ChoiceTask, LabelTask
from calibtrain.data.pairs import add_rejected
from calibtrain.data.sources import load_records
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks.choice import Choice
from calibtrain.tasks.kinds import task_of
from calibtrain.tasks.label import Label

OPTIONS = ("Japan", "Kenya", "France")
LABELS = Label(LabelTask(labels=("positive", "negative", "not sure")))


def record(answer="Japan", options=OPTIONS, **fields):
    return Record(
        (Message("user", "Where is Osaka?"),),
        answer,
        accepted=(answer,),
        options=options,
        origin="rows.jsonl:3",
        **fields,
    )


def test_letters_list_the_options_and_texts_do_not_unless_they_are_written_freely():
    asked = Choice().asked(record(rejected="France"))
    assert asked.question == "Where is Osaka?\nA. Japan\nB. Kenya\nC. France"
    assert (asked.chosen, asked.rejected, asked.accepted) == ("A", "C", ("A",))
    assert Choice().options(asked) == ("A", "B", "C")
    texts = Choice(ChoiceTask(show="texts"))
    assert texts.asked(record("B")).question == "Where is Osaka?"
    assert texts.asked(record("B")).accepted == ("Kenya",)
    assert texts.options(texts.asked(record())) == OPTIONS
    free = Choice(ChoiceTask(show="texts", answer_by="generation"))
    assert free.asked(record()).question == "Where is Osaka?\n- Japan\n- Kenya\n- France"
    assert free.options(free.asked(record())) == ()
    assert free.choices(free.asked(record())) == OPTIONS


@pytest.mark.parametrize("task", [Choice(), Choice(ChoiceTask(show="texts", shuffle=True)), LABELS])
def test_asking_twice_is_once(task):
    one = record("positive" if task is LABELS else "Kenya")
    asked = task.asked(one)
    assert task.asked(asked) == asked
    assert asked != one


@pytest.mark.parametrize(
    ("how", "said", "place"),
    [
        ("text_or_letter", "Kenya", 1),
        ("text_or_letter", "kenya.", 1),
        ("text_or_letter", "B", 1),
        ("text_or_letter", "(C)", 2),
        ("letter", "c", 2),
        ("text", "France", 2),
        ("index_from_0", "2", 2),
        ("index_from_1", "2", 1),
        ("index_from_1", "C", 2),
    ],
)
def test_the_right_option_by_every_name_that_data_has_for_it(how, said, place):
    asked = Choice(ChoiceTask(answers_are=how)).asked(record(said))
    assert asked.accepted == ("ABC"[place],)


@pytest.mark.parametrize(
    ("how", "answer", "options", "words"),
    [
        ("text_or_letter", "Spain", OPTIONS, "none of the options"),
        ("text_or_letter", "2", OPTIONS, "index_from_0 or index_from_1"),
        ("text_or_letter", "D", OPTIONS, "none of the options"),
        ("text_or_letter", "A", ("B", "A"), "text of one option and the letter of another"),
        ("index_from_0", "3", OPTIONS, "counted from 0"),
        ("index_from_1", "0", OPTIONS, "counted from 1"),
        ("index_from_1", "Kenya", OPTIONS, "counted from 1"),
        ("text", "B", OPTIONS, "none of the options"),
        ("text", "Japan", (), "without options"),
        ("text", "Japan", ("Japan",), "the only option"),
        ("text", "Japan", ("Japan", "Kenya", "Japan "), "given twice"),
        ("text", "1", tuple(map(str, range(27))), "task.show: texts"),
    ],
)
def test_what_cannot_be_asked_is_named(how, answer, options, words):
    with pytest.raises(UserError, match=words) as told:
        Choice(ChoiceTask(answers_are=how)).asked(record(answer, options))
    assert "rows.jsonl:3" in str(told.value)


SHAPES = {  # as data sets on the Hub have them
    "mmlu": (
        [{"question": "Q?", "choices": ["w", "x", "y", "z"], "answer": 2}],
        {"options": "choices", "answers": "answer"}, "index_from_0", ["y"],
    ),
    "hellaswag": (
        [{"ctx": "Q", "endings": ["w", "x", "y", "z"], "label": "3", "ind": 4}],
        {"question": "ctx", "options": "endings", "answers": "label"}, "index_from_0", ["z"],
    ),
    "arc": (
        [
            {"question": "Q1?", "choices": {"text": ["w", "x"], "label": ["A", "B"]}, "answerKey": "B"},
            {"question": "Q2?", "choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        ],
        {"options": "choices", "answers": "answerKey"}, "index_from_1", ["x", "y"],
    ),
    "winogrande": (
        [{"sentence": "Q _", "option1": "w", "option2": "x", "answer": "2"}],
        {"question": "sentence", "options": ["option1", "option2"], "answers": "answer"}, "index_from_1", ["x"],
    ),
    "medmcqa": (
        [{"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 0}],
        {"options": ["opa", "opb", "opc", "opd"], "answers": "cop"}, "index_from_0", ["w"],
    ),
    "commonsense_qa": (
        [{"question": "Q?", "choices": {"label": ["A", "B"], "text": ["w", "x"]}, "answerKey": "A"}],
        {"options": "choices", "answers": "answerKey"}, "text_or_letter", ["w"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_that_multiple_choice_comes_in(name, tmp_path):
    rows, columns, how, right = SHAPES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": {"kind": "file", "path": str(path), "columns": columns}}
    task = {"kind": "choice", "show": "texts", "answers_are": how}
    config = RunConfig.model_validate({"data": data, "task": task})
    records = [task_of(config.task).asked(one) for one in load_records(config.data.source, 0)]
    assert sorted(one.accepted[0] for one in records) == sorted(right)
    assert all(one.chosen == one.accepted[0] for one in records)


def test_numbers_that_are_texts_are_not_places():
    asked = Choice().asked(record("2", ("1", "2", "3")))
    assert asked.accepted == ("B",)


def test_the_drawn_order_is_the_questions_whatever_the_order_in_the_data():
    task = Choice(ChoiceTask(shuffle=True))
    rows = [replace(record(), prompt=(Message("user", f"Question {i}"),)) for i in range(60)]
    asked = [task.asked(one) for one in rows]
    turned = [task.asked(replace(one, options=OPTIONS[::-1])) for one in rows]
    assert asked == turned
    places = [one.accepted[0] for one in asked]
    assert min(places.count(letter) for letter in "ABC") > 10
    for one in asked:
        assert one.options["ABC".index(one.accepted[0])] == "Japan"


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. Kenya", "B"),
        ("The answer is B.", "B"),
        ("Answer: C", "C"),
        ("Kenya", "B"),
        ("kenya", "B"),
        ("D", None),
        ("A city in Asia", None),
        ("the answer is a city", None),
        ("", None),
        ("b", "B"),
        ("**B**", "B"),
        ("(b)", "B"),
        ("Answer: **B**", "B"),
        ("A: no. Answer: B", "B"),
        ("Not option A, but option B.", "B"),
        ("because of a city", None),
    ],
)
def test_a_letter_is_read_where_a_reply_names_one(reply, letter):
    task = Choice(ChoiceTask(answer_by="generation"))
    found = task.read(reply, task.asked(record()))
    assert found.found == (letter is not None)
    if letter:
        assert found.text == letter
        assert "B" not in reply or reply[found.start : found.stop][0] == "B" or found.stop == len(reply)


def test_a_letter_says_its_option_to_people():
    task = Choice(ChoiceTask(shuffle=True))
    asked = task.asked(record("Japan"))
    assert task.says(asked.accepted[0], asked) == "Japan"
    assert task.says("no option", asked) == "no option"
    texts = Choice(ChoiceTask(show="texts"))
    assert texts.says("Kenya", texts.asked(record())) == "Kenya"


def test_labels_are_named_once_and_read_but_for_case():
    asked = LABELS.asked(Record((Message("user", "Good film"),), "Positive", accepted=("Positive",)))
    assert asked.question == "Good film\nAnswer with one of: positive, negative, not sure."
    assert asked.accepted == ("positive",)
    assert LABELS.read("Not sure!", asked).text == "not sure"
    assert not LABELS.read("maybe", asked).found
    bare = Label(LabelTask(labels=("a", "b"), instruction=None))
    assert bare.asked(Record((Message("user", "x"),), "a")).question == "x"
    with pytest.raises(UserError, match=r"r:1: the answer 'great' is none of task\.labels: positive"):
        LABELS.asked(Record((Message("user", "x"),), "great", origin="r:1"))
    for bad in (["a"], ["a", "a "], ["a", ""], ["a", "b\nc"]):
        with pytest.raises(ValueError, match="labels"):
            RunConfig.model_validate({"task": {"kind": "label", "labels": bad}})


@pytest.mark.parametrize("show", ["letters", "texts"])
def test_a_rejected_answer_is_another_option(show):
    task = Choice(ChoiceTask(show=show))
    rows = [task.asked(replace(record(), prompt=(Message("user", f"Question {i}"),))) for i in range(20)]
    said = {"letters": "(C) because", "texts": "kenya"}[show]
    own = [[said, "nonsense"] if i % 2 else ["nonsense", ""] for i in range(20)]
    pairs, fallbacks = add_rejected(rows, own, task)
    assert fallbacks == 10
    for i, pair in enumerate(pairs):
        assert pair.rejected in task.choices(pair)
        assert pair.rejected != pair.chosen
        assert not i % 2 or pair.rejected == {"letters": "C", "texts": "Kenya"}[show]
