"""What is asked: a question, a conversation or a choice; and whether its shape is one that was graded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from calibtrain.data.values import unreadable
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks.task import Task

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Question:
    """What is put to the model: messages of which the last is a user's, and options to choose the answer from."""

    messages: tuple[Message, ...]
    options: tuple[str, ...] = ()

    @property
    def system(self) -> str:
        """The system prompt; "" without one."""
        return self.messages[0].content.strip() if self.messages and self.messages[0].role == "system" else ""

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages without the system prompt."""
        return self.messages[1:] if self.messages and self.messages[0].role == "system" else self.messages


Asked = str | Sequence[Message] | Question
"""How a question may be given: as text, as messages, or with its options."""


def question_of(asked: Asked, options: Sequence[str] = ()) -> Question:
    """The question in any of its forms, with these options where it has none. UserError for one that cannot be asked."""
    if isinstance(asked, str):
        asked = Question((Message("user", asked),), tuple(options))
    elif not isinstance(asked, Question):
        asked = Question(tuple(asked), tuple(options))
    messages = tuple(Message(_role(one.role), one.content.strip()) for one in asked.messages)
    found = Question(
        tuple(one for one in messages if one.content or one.role != "system"), tuple(map(str.strip, asked.options))
    )
    turns = found.turns
    if any(one.role == "system" for one in turns):
        raise UserError("a system prompt stands before all other messages, once")
    if not turns or turns[-1].role != "user":
        raise UserError("the last message must be a user's question")
    for before, after in pairwise(turns):
        if before.role == after.role:
            raise UserError(f"two messages of the {after.role} follow each other; join them into one")
    if not turns[-1].content:
        raise UserError("the question is empty")
    if not all(one.content for one in turns):
        raise UserError("a message before the question is empty; leave it out")
    if not all(found.options) or len(set(found.options)) != len(found.options):
        raise UserError("options: one of them is empty or given twice")
    return found


def check_text(question: Question, control_tokens: Sequence[str]) -> None:
    """UserError for text that no tokenizer can read, or that the model would read as a control token."""
    last = len(question.messages) - 1
    texts = [("the question" if i == last else "a message", one.content) for i, one in enumerate(question.messages)]
    for what, text in [*texts, *(("an option", one) for one in question.options)]:
        if half := unreadable(text):
            raise UserError(f"{what} holds {half}, half of a character, which no tokenizer can read")
        for token in control_tokens:
            if token in text:
                raise UserError(f"{what} contains {token!r}, which the model reads as a control token; leave it out")


def record_of(question: Question, task: Task) -> Record:
    """The record that the task makes of it. UserError where the task cannot ask it, or takes no options."""
    bare = Record(prompt=question.messages)
    if not question.options:
        return task.asked(bare)
    record = task.asked(Record(prompt=question.messages, options=question.options))
    if task.options(record):
        return record
    try:
        unread = task.asked(bare).prompt == record.prompt
    except UserError:  # without options it cannot be asked: so it takes them
        unread = False
    if unread:
        raise UserError("options: the task of this run chooses from none; leave them out")
    return record


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the graded questions look like, which a certificate covers; as it is by default: one question and no more."""

    system: str | None = ""  # the system prompt that all have, "" for none; None: they have different ones
    conversations: bool = False  # some have messages before the question
    options: bool = False  # some have options
    context: bool = False  # all have passages to answer by

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Shapes:
        """Of `as_dict()` values; what is missing is as it is by default. TypeError for other keys."""
        return cls(**values)

    def completed(self, question: Question) -> Question:
        """With the system prompt that all graded questions have, where it has none."""
        if question.system or not self.system:
            return question
        return Question((Message("system", self.system), *question.messages), question.options)

    def uncovered(self, question: Question) -> str:
        """Why no certificate covers it, as a sentence; "" where one does."""
        if self.system is not None and question.system != self.system:
            own = "under the run's own" if self.system else "without one"
            return f"Nothing is certified under this system prompt: the graded questions were asked {own}."
        if len(question.turns) > 1 and not self.conversations:
            return "Nothing is certified for a conversation: the graded questions had no messages before them."
        if question.options and not self.options:
            return "Nothing is certified for a choice from options: the graded questions had none."
        if self.context:
            return "Nothing is certified for a question without passages: the graded questions had some to answer by."
        return ""


def shapes_of(records: Sequence[Record]) -> Shapes:
    """Shapes of graded questions."""
    questions = [Question(record.prompt, record.options) for record in records]
    systems = {one.system for one in questions}
    return Shapes(
        systems.pop() if len(systems) == 1 else None if systems else "",
        any(len(one.turns) > 1 for one in questions),
        any(one.options for one in questions),
        bool(records) and all(record.context for record in records),
    )


def _role(role: str) -> str:
    role = "system" if role == "developer" else role  # OpenAI's later name of it
    if role not in ROLES:
        raise UserError(f"a message of role {role[:40]!r} is not understood; roles are: {', '.join(ROLES)}")
    return role
