"""Expressions: equal by math-verify, in threads, and never for ever."""

import threading
import time

import pytest

from calibtrain.config_tasks import MathTask
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks import math as task_file
from calibtrain.tasks import math_process
from calibtrain.tasks.bounded import Worker
from calibtrain.tasks.math import Math

PROMPT = (Message("user", "What is it?"),)


def right(answer, *accepted, task=None):
    return (task or Math()).right(answer, Record(PROMPT, accepted=accepted))


@pytest.mark.parametrize(
    ("accepted", "equal", "other"),
    [
        ("\\frac{1}{2}", ["0.5", "\\dfrac12", "$\\frac{2}{4}$", "1/2"], ["2", "\\frac{1}{3}"]),
        ("x^2+2x+1", ["(x+1)^2", "1 + 2x + x^2"], ["(x-1)^2"]),
        ("\\{1,2\\}", ["\\{2,1\\}"], ["\\{1\\}"]),
        ("[0,1)", ["\\left[0, 1\\right)"], ["[0,1]"]),
        ("\\text{East}", ["East", "\\text{ East }"], ["West"]),
        ("x=5", ["5"], ["6"]),
        ("2\\sqrt{2}", ["\\sqrt{8}"], ["2.8"]),
    ],
)
def test_equal_expressions(accepted, equal, other):
    for text in equal:
        assert right(text, "7", accepted), text
    for text in other:
        assert not right(text, "7", accepted), text


def test_it_works_outside_the_main_thread():
    found = {}

    def grade(i):
        found[i] = right(f"{i}x+{i}", f"{i}(x+1)"), right(f"{i}x", f"{i}(x+2)")

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(2, 6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == dict.fromkeys(range(2, 6), (True, False))


@pytest.mark.parametrize("text", ["9^{9^{9^{9^{9}}}}", "(((((9!)!)!)!)!)!", "\\frac{" * 60, "x" * 10_000])
def test_strangers_text_takes_bounded_time(text):
    task = Math(MathTask(seconds=1.0))
    assert right("1", "1", task=task)
    start = time.perf_counter()
    assert not right(text, "12345.5", task=task)
    assert time.perf_counter() - start < 4
    assert right("\\frac{2}{8}", "0.25", task=task)  # and the next one is compared


def test_python_in_an_answer_is_not_run(tmp_path):
    mark = tmp_path / "mark"
    for text in (f"__import__('pathlib').Path('{mark}').touch()", f"$open('{mark}','w')$"):
        assert not right(text, "1")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}} and \\boxed{ x^{2} } ok", "x^{2}"),
        ("The answer is $\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("the answer is: 42. I hope", "42"),
        ("Answer: x = 3.5\nDone 9", "x = 3.5"),
        ("work\n#### \\sqrt{2}", "\\sqrt{2}"),
        ("it is 3 or 4", "4"),
        ("\\boxed{}\nThe answer is \\(a+b\\)", "a+b"),
        ("\\boxed{\\text{a \\} b}}", "\\text{a \\} b}"),
    ],
)
def test_the_final_expression_of_a_reply(reply, answer):
    reading = Math().read(reply, Record(PROMPT))
    assert reading.text == reply[reading.start : reading.stop] == answer


def test_accepted_expressions_and_solutions():
    task = Math()
    for text, gold in (
        ("Then $1+1=2$.\nSo $\\boxed{2}$.", "2"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("$x = 5$", "x = 5"),
        ("\\text{the first one of them}", "\\text{the first one of them}"),
        ("There were 3 of them, so they paid 12 dollars", "12"),
    ):
        asked = task.asked(Record(PROMPT, chosen=text))
        assert asked.accepted == (gold,)
        assert task.asked(asked) == asked
    with pytest.raises(UserError, match="holds no answer"):
        task.asked(Record(PROMPT, chosen="nobody can tell what this may be"))


def test_keys_tell_spellings_alike_without_algebra():
    task, record = Math(), Record(PROMPT)
    assert task.key("1{,}000", record) == task.key("1000.0", record) == "1000"
    assert task.key("\\dfrac{a}{b}", record) == task.key("$\\frac{a}{b}$", record)
    assert task.key("\\left( 1, 2 \\right)", record) == task.key("(1,2)", record)
    assert task.key("2x", record) != task.key("2", record)
    assert task.key("X", record) != task.key("x", record)


def test_without_math_verify_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(task_file, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        Math()


def test_a_process_that_cannot_start_says_why(monkeypatch):
    with pytest.raises(UserError, match="no_such_module"):
        Worker("no_such_module").ask(1, 1.0)


def test_a_process_that_was_ended_starts_again():
    math_process._WORKER.close()
    math_process.equal.cache_clear()
    assert math_process.equal("1", "1.0", 5.0)
