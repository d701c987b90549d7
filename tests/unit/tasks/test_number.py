"""Numbers: which a text is, where a reply says it, and when two are the same."""

import random
import time
from fractions import Fraction

import pytest

from calibtrain.config_tasks import NumberTask
from calibtrain.data.replies import read_reply
from calibtrain.data.templates import Template
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks.math import Math
from calibtrain.tasks.number import Number
from calibtrain.tasks.numerals import number_of, numbers_in
from tests.tiny import tiny_tokenizer

PROMPT = (Message("user", "How many?"),)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, 1000) for text in ("1,000", "1000", "1e3", "1000.0", "$1,000.00", "1000 apples", "1{,}000")),
        ("10 \\times 10^{2}", 1000),
        ("1.000.000", 1_000_000),
        *((text, -5) for text in ("-5", "-$5", "$-5", "\u22125", "x=-5", "(-5)", "**-5**")),
        *((text, Fraction(3, 4)) for text in ("3/4", "\\frac{3}{4}", "\\dfrac34", "0.75", ".75", "\\frac{3}{4} km")),
        *((text, Fraction(3, 2)) for text in ("1 1/2", "1\\frac{1}{2}", "1.5", "1.50")),
        *((text, 1234) for text in ("1 234", "1\u00a0234", "1\u2009234", "1\u202f234.0", "1'234", "1\\,234", "1,\\!234")),
        *((text, 1234567) for text in ("1 234 567", "1,234,567", "12,34,567", "1~234~567 km")),
        *((text, 1_500_000) for text in ("1.5 million", "$1.5 million", "1.5\\text{ million}", "1,500 thousand")),
        ("1 1/2 Million", 1_500_000),
        *((text, 300) for text in ("3 hundred", "3 hundreds", "3 hundred percent", "300 millionaires")),
        *((text, None) for text in ("1,5 million", "2 million 500 thousand")),
        ("30^\\circ", 30),
        ("42 km2", 42),
        ("...42.", 42),
        ("50%", 50),
        ("答案是42", 42),
        *((text, None) for text in ("", "none", "5-10", "10 20", "10^2", "v2.0.1", "1/0", "1e999999999", "9" * 100, "x2")),
        *((text, None) for text in ("3,5", "3{,}5", "1.234,56", "12 345,67", "1,2,3", "(1,2)", "1,000,00", "12:30")),
    ],
)  # fmt: skip
def test_the_number_that_a_text_is(text, value):
    assert number_of(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, Fraction(7, 2)) for text in ("3,5", "3,50 kg", "3{,}5", "7/2", "3 1/2")),
        *((text, Fraction("1234.5")) for text in ("1.234,5", "1 234,5", "1\u202f234,5", "1234,5", "-1.234,5")),
        *((text, None) for text in ("3.5", "1,234.5", "3,5 und 4", "")),
        ("1.234", 1234),
        ("4,5 billion", 4_500_000_000),
        ("4,5e3", 4500),
        ("es sind 5.", 5),
    ],
)
def test_decimals_behind_a_comma(text, value):
    assert number_of(text, comma=True) == (-value if text.startswith("-") else value)


def test_replies_are_read_by_the_decimal_mark():
    for decimal, reply, found in (
        ("point", "The answer is 3,5.", ""),
        ("point", "Of 12 the answer is 3,5 of 7", ""),  # and neither 12 nor 7
        ("point", "3 and 4, so 1 234 in all", "1 234"),
        ("comma", "Das macht 3,5.", "3,5"),
        ("comma", "Die Antwort: \\boxed{1.234,5}", "1.234,5"),
        ("comma", "so 3.5", ""),
    ):
        reading = Number(NumberTask(decimal=decimal)).read(reply, Record(PROMPT))
        assert (reading.text, reading.found) == (found, bool(found))
    task = Number(NumberTask(decimal="comma"))
    record = task.asked(Record(PROMPT, accepted=("3,5",)))
    assert [task.right(text, record) for text in ("3,50", "7/2", "4,5", "5")] == [True, True, False, False]
    assert task.key("3,50", record) == "7/2"


@pytest.mark.parametrize(
    ("accepted", "message"),
    [
        *(
            (text, "holds several numbers .*; write the one that counts, mark it .*another task.kind")
            for text in ("12:30", "2 hours 30 minutes", "2024-05-01", "(1, 2)", "10-12", "5 ± 0.1")
        ),
        *(
            (text, r"writes '.*3.*,5', which under task.decimal: point is no one number; .*set task.decimal: comma")
            for text in ("3,5", "1.233,5", "12 343,5", "3,5 kg", "0.5 * 7\nmakes 3,5", "#### 3,5")
        ),
        ("so 4\n#### 3,5 of 10", "holds no answer"),
    ],
)
def test_accepted_answers_that_say_no_one_number_are_refused(accepted, message):
    with pytest.raises(UserError, match=rf"rows.jsonl:3: the accepted answer .* {message}"):
        Number().asked(Record(PROMPT, accepted=(accepted,), origin="rows.jsonl:3"))


def test_the_last_number_of_a_solution_counts():
    long = (
        "There are 3 boxes of 4 eggs, and another 2 boxes of 6 eggs, of which Mia, who is 7, breaks every single one "
    )
    long += "on her way home: 0"
    for accepted, gold in (("3 * 4 = 12", "12"), ("3 of 4\nleave 1 234", "1 234"), (long, "0"), ("1,2,3\nare 3", "3")):
        assert Number().asked(Record(PROMPT, accepted=(accepted,))).accepted == (gold,)


def test_percent_as_declared():
    assert [number_of(text, hundredth=True) for text in ("50%", "50\\%", "50 percent", "0.5")] == [Fraction(1, 2)] * 4


@pytest.mark.parametrize(
    "text",
    [
        *("1" * 20000, "1,000" * 5000, "1 1/" * 5000, "\\frac{1" * 5000, "$-" * 9000, "1.000" * 5000, "1,000," * 5000),
        *("111 " * 5000 + "111^2", "111," * 5000 + "11^2", "1\\,000" * 5000 + "0", "3,5" * 5000),
    ],
)
def test_long_texts_take_little_time(text):
    start = time.perf_counter()
    list(numbers_in(text))
    for mark in ("#### ", "answer is ", "\\boxed{"):
        Number().read(mark * 3000 + text, Record(PROMPT))
    assert time.perf_counter() - start < 3


def test_whatever_a_stranger_writes_is_read():
    draw = random.Random(0)
    pieces = [*"120", "९", "²", "½", *".,-+ \n$€%{}/e^'(=\\", "\u2212", "\u2013", "\u00a0", "\ud800", "km", "percent"]
    pieces += ["\\frac", "\\boxed{", "####", "answer is ", "×10^{-"]
    tasks = [Number(), Number(NumberTask(percent="hundredth", answer_in=("last_number", "boxed"))), Math()]
    for _ in range(1500):
        reply = "".join(draw.choices(pieces, k=draw.randrange(1, 25)))
        for task in tasks:
            reading = task.read(reply, Record(PROMPT))
            assert reading.text == reply[reading.start : reading.stop]
            assert reading.found == bool(reading.text)
            task.key(reading.text, Record(PROMPT))
            task.key(reply, Record(PROMPT))
            if reading.found and isinstance(task, Number):
                assert task.right(reading.text, Record(PROMPT, accepted=(reading.text,)))


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("5 * 200 = 1000\n#### 1,000", "1,000"),
        ("So 3.\n#### $18 per day\n", "$18"),
        ("The answer is 12 since 2 * 6 = 12, of 40.", "12"),
        ("**Answer:** 7 apples, not 8", "7"),
        ("\\boxed{3} no, \\boxed{x = \\frac{1}{2}}. 99", "\\frac{1}{2}"),
        ("\\boxed{\\text{about } 10 \\text{ km}}", "10"),
        ("\\boxed{42", "42"),  # never closed: the last number of the reply
        ("#### none\nso 4 or 5", "5"),
        ("the answer is unclear.\n1, 2 or 3.", "3"),
        ("On July 4, 12 people came.", "12"),
    ],
)
def test_the_final_answer_of_a_reply(reply, answer):
    reading = Number().read(reply, Record(PROMPT))
    assert (reading.text, reading.found) == (answer, True)
    assert reply[reading.start : reading.stop] == answer


def test_places_are_tried_in_their_order():
    reply = "\\boxed{1} #### 2\nThe answer is 3.\nResult => 4; 5"
    for places, pattern, answer in (
        (("hashes", "boxed"), None, "2"),
        (("boxed",), None, "1"),
        (("answer_is",), None, "3"),
        (("last_number",), None, "5"),
        (("pattern", "boxed"), "=> (\\d)", "4"),
    ):
        section = NumberTask(answer_in=places, pattern=pattern)
        assert Number(section).read(reply, Record(PROMPT)).text == answer
    assert not Number(NumberTask(answer_in=("hashes",))).read("42", Record(PROMPT)).found


def test_accepted_answers_may_be_numbers_or_whole_solutions():
    task = Number()
    asked = task.asked(Record(PROMPT, chosen="6*3=<<6*3=18>>18\n#### 18"))
    assert asked.accepted == ("18",)
    assert asked.chosen == "6*3=<<6*3=18>>18\n#### 18"
    assert task.asked(asked) == asked
    assert task.asked(Record(PROMPT, accepted=("1,000 km", "so it is 7"))).accepted == ("1,000", "7")
    assert task.asked(Record(PROMPT)) == Record(PROMPT)  # asked by someone, not graded
    plain = Number(NumberTask(answer_in=("hashes",))).asked(Record(PROMPT, accepted=("18",)))
    assert plain.accepted == ("18",)
    other = Number(NumberTask(answer_in=("boxed",))).asked(Record(PROMPT, accepted=("6*3\n#### 18",)))
    assert other.accepted == ("18",)
    with pytest.raises(UserError, match=r"rows.jsonl:3: the accepted answer 'no idea' holds no answer"):
        task.asked(Record(PROMPT, chosen="no idea", origin="rows.jsonl:3"))


def test_equality_keys_and_tolerance():
    record = Record(PROMPT, accepted=("1,000", "2.5"))
    task = Number()
    assert [task.right(text, record) for text in ("1e3", "$1000.00", "5/2", "1001", "", "many")] == [True] * 3 + [
        False
    ] * 3
    assert task.key("1e3", record) == task.key("$1,000.0", record) == "1000"
    assert task.key("5/2", record) == task.key("2.50", record)
    loose = Number(NumberTask(rel=0.01, abs=0.2))
    assert [loose.right(text, record) for text in ("1010", "1010.1", "2.7", "2.71")] == [True, False, True, False]
    percent = Number(NumberTask(percent="hundredth"))
    assert percent.right("50%", Record(PROMPT, accepted=("0.5",)))
    assert not task.right("50%", Record(PROMPT, accepted=("0.5",)))


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_the_tokens_of_the_answer_are_those_of_its_characters(kind):
    template = Template(kind, tiny_tokenizer(), task=Number())
    ids = template.completion_ids("Osaka has 5 and\n日本 7\n#### 12 in all")
    reply = read_reply(template, ids, Record(PROMPT))
    assert template.tokenizer.decode(ids[slice(*reply.span)]).strip() == "12"
    at_the_end = read_reply(template, template.completion_ids("so 5\n#### 12"), Record(PROMPT))
    assert at_the_end.span[1] == len(template.completion_ids("so 5\n#### 12"))  # with the end token
