"""What may be asked, and which shapes a certificate covers."""

import pytest

from calibtrain.errors import UserError
from calibtrain.pipeline.question import Question, Shapes, check_text, question_of, record_of, shapes_of
from calibtrain.records import Message, Record
from calibtrain.tasks.short_answer import SHORT_ANSWER

USER, SAID, AGAIN = Message("user", "a?"), Message("assistant", "b"), Message("user", "c?")
SYSTEM = Message("system", "Be brief.")


def test_a_question_has_three_forms():
    assert question_of(" a? ") == question_of([USER]) == question_of(Question((USER,))) == Question((USER,))
    talk = question_of([Message("developer", "Be brief."), USER, SAID, AGAIN])
    assert talk.system == "Be brief."
    assert talk.turns == (USER, SAID, AGAIN)
    assert question_of([Message("system", " "), USER]).system == ""
    assert question_of("a?", ["x ", "y"]).options == ("x", "y")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "the last message must be a user's"),
        ([USER, SAID], "the last message must be a user's"),
        ([SYSTEM], "the last message must be a user's"),
        ([USER, AGAIN], "two messages of the user follow each other"),
        ([USER, SYSTEM, AGAIN], "stands before all other messages"),
        ([Message("tool", "x"), USER], "role 'tool' is not understood; roles are"),
        ([USER, Message("assistant", " "), AGAIN], "a message before the question is empty"),
        ([USER, SAID, Message("user", "\n")], "the question is empty"),
    ],
)
def test_what_no_model_can_be_asked_is_told(messages, words):
    with pytest.raises(UserError, match=words):
        question_of(messages)


@pytest.mark.parametrize("options", [["a", ""], ["a", "a "]])
def test_options_are_there_and_differ(options):
    with pytest.raises(UserError, match="one of them is empty or given twice"):
        question_of("a?", options)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (Question((Message("user", "a <|end|>"),)), "the question contains '<|end|>'"),
        (Question((Message("system", "<|end|>"), USER)), "a message contains"),
        (Question((USER, Message("assistant", "\ud83d"), AGAIN)), "a message holds .* half of a character"),
        (Question((USER,), ("x", "<|end|>")), "an option contains"),
    ],
)
def test_control_tokens_are_refused_wherever_they_stand(question, words):
    with pytest.raises(UserError, match=words):
        check_text(question, ("<|end|>",))


def test_a_task_that_chooses_from_no_options_takes_none():
    with pytest.raises(UserError, match="chooses from none"):
        record_of(Question((USER,), ("x", "y")), SHORT_ANSWER)
    assert record_of(Question((USER,)), SHORT_ANSWER) == Record(prompt=(USER,))


@pytest.mark.parametrize("needs", [True, False], ids=["cannot be asked without", "writes them into the question"])
def test_a_task_that_reads_options_takes_them(needs):
    class Choice(type(SHORT_ANSWER)):
        def asked(self, record):
            if needs and not record.options:
                raise UserError("no options")
            text = record.question + "".join(f"\n- {one}" for one in record.options)
            return Record(prompt=(Message("user", text),), options=record.options)

    record = record_of(Question((USER,), ("x", "y")), Choice())
    assert record.options == ("x", "y")
    assert record.question == "a?\n- x\n- y"


PLAIN, TALK = Record(prompt=(USER,)), Record(prompt=(USER, SAID, AGAIN))
UNDER, OTHER = Record(prompt=(SYSTEM, USER)), Record(prompt=(Message("system", "Be long."), USER))


@pytest.mark.parametrize(
    ("graded", "asked", "words"),
    [
        ([PLAIN], [USER], ""),
        ([PLAIN], [USER, SAID, AGAIN], "Nothing is certified for a conversation"),
        ([PLAIN, TALK], [USER, SAID, AGAIN], ""),
        ([PLAIN], [SYSTEM, USER], "graded questions were asked without one"),
        ([UNDER, UNDER], [SYSTEM, USER], ""),
        ([UNDER], [USER], ""),  # it is put before the question
        ([UNDER], [Message("system", "Be long."), USER], "asked under the run's own"),
        ([UNDER, OTHER], [Message("system", "Be rude."), USER], ""),
        ([], [USER], ""),
    ],
)
def test_a_certificate_covers_the_shapes_that_were_graded(graded, asked, words):
    shapes = shapes_of(graded)
    assert Shapes.from_dict(shapes.as_dict()) == shapes
    told = shapes.uncovered(shapes.completed(question_of(asked)))
    assert words in told
    assert bool(words) == bool(told)


def test_options_are_covered_where_they_were_graded():
    with_options = Question((USER,), ("x", "y"))
    assert "choice from options" in shapes_of([PLAIN]).uncovered(with_options)
    assert shapes_of([Record(prompt=(USER,), options=("p", "q"))]).uncovered(with_options) == ""


def test_the_graded_system_prompt_is_put_before_the_question():
    assert shapes_of([UNDER]).completed(question_of("a?")).messages == (SYSTEM, USER)
