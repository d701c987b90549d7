"""What stands around a question: a system text, examples, passages to answer by, and a template of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibtrain.config_data import DataConfig
from calibtrain.errors import UserError
from calibtrain.records import Message, Record

if TYPE_CHECKING:
    import jinja2

CONTEXT = "Context: {}"
BETWEEN_PASSAGES = "\n\n"
VARIABLES = ("question", "context", "options", "fields", "system", "examples", "messages")
"""What a template of the user's own may read."""


class _AnyField(dict[str, str]):
    """Columns of a row that nobody knows yet: each holds something."""

    def __missing__(self, name: str) -> str:
        return "x"


PROBE = Record(
    prompt=(Message("user", "Which one?"),), context=("This.",), options=("This", "That"), fields=_AnyField()
)
"""A question to try a template on."""


@dataclass(frozen=True)
class Prompts:
    """The prompt's parts beside the record. `source` is Jinja text, `whole` whether it makes the whole prompt."""

    system: str = ""
    examples: tuple[Record, ...] = ()
    source: str | None = None
    whole: bool = False
    room: int | None = None
    """Tokens that a prompt may have before its context is cut; None: any number."""

    def turns(self, record: Record, shots: Sequence[Record] = ()) -> list[Message]:
        """The conversation up to where the model answers: system text, examples with their answers, the record's turns.

        A turn of role `context` is passages for the user turn behind it. Raises UserError where the template fails.
        """
        shown = (*self.examples, *shots)
        # What a system turn says stands before everything, also before the examples.
        own = [message.content for message in record.prompt if message.role == "system"] if self.system or shown else []
        system = [text for text in (self.system, *own) if text]
        turns = [Message("system", BETWEEN_PASSAGES.join(system))] if system else []
        for shot in shown:
            turns += [turn for turn in self._asked(shot) if turn.role != "system"]
            turns.append(Message("assistant", shot.chosen or ""))
        return turns + [turn for turn in self._asked(record) if not (own and turn.role == "system")]

    def _asked(self, record: Record) -> list[Message]:
        *earlier, last = record.prompt
        if last.role != "user":  # a tool's result: what was asked stands before it
            return list(record.prompt)
        if self.source is not None:
            return [*earlier, Message("user", self.rendered(record))]
        context = [Message("context", BETWEEN_PASSAGES.join(record.context))] if record.context else []
        return [*earlier, *context, last]

    def rendered(self, record: Record, shots: Sequence[Record] = ()) -> str:
        """The user's template for one record. Raises UserError that names what it lacks."""
        import jinja2

        self._check_shown(record)
        shown = [
            {"question": one.question, "answer": one.chosen or "", "context": list(one.context)}
            for one in (*self.examples, *shots)
        ]
        values: dict[str, Any] = {
            "question": record.question,
            "context": list(record.context),
            "options": list(record.options),
            "fields": record.fields,
            "system": self.system,
            "examples": shown,
            "messages": [{"role": one.role, "content": one.content} for one in record.prompt[:-1]],
        }
        try:
            return self._template.render(values)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            place = record.origin or record.question
            raise UserError(f"{place}: data.prompt_template: {error}") from error

    def _check_shown(self, record: Record) -> None:
        """Raise UserError for what a row brings and the template would leave out, which nobody would see."""
        # A template that picks from the row's columns may well show them its own way.
        brings = {"context": bool(record.context) and "fields" not in self.reads}
        brings["messages"] = self.whole and len(record.prompt) > 1
        for name, given in brings.items():
            if given and name not in self.reads:
                what = "passages" if name == "context" else "turns before the question"
                raise UserError(
                    f"{record.origin or record.question}: data.prompt_template: the row has {what} and the template "
                    f"does not show them: write {{{{ {name} }}}} into it, or leave them out of data.source.columns"
                )

    @cached_property
    def reads(self) -> frozenset[str]:
        """Variables that the user's template reads."""
        from jinja2 import meta

        return frozenset(meta.find_undeclared_variables(_environment().parse(self.source or "")))

    @cached_property
    def _template(self) -> jinja2.Template:
        return _environment().from_string(self.source or "")

    def check(self) -> None:
        """Raise UserError for a template that cannot be read, or leaves out what the config gives it to show."""
        import jinja2

        if self.source is None:
            return
        try:
            unknown = self.reads - set(VARIABLES)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"data.prompt_template, line {error.lineno}: {error.message}") from error
        if unknown:
            raise UserError(
                f"data.prompt_template: reads {', '.join(sorted(unknown))}; there are {', '.join(VARIABLES)}, and a column "
                "that `fields` lists is {{ fields.NAME }}"
            )
        needed = {"question": True, "system": self.whole and self.system, "examples": self.whole and self.examples}
        for name, given in needed.items():
            if given and name not in self.reads:
                key = {"question": "data.prompt_template", "system": "data.system", "examples": "data.few_shot"}[name]
                raise UserError(f"{key}: the prompt template does not show it: write {{{{ {name} }}}} into it")

    @property
    def facts(self) -> dict[str, Any]:
        """What of it makes prompts differ, for the template's hash; empty where nothing is set."""
        shown = [[one.question, one.chosen, list(one.context)] for one in self.examples]
        facts = {"system": self.system, "examples": shown, "template": self.source}
        return {name: value for name, value in facts.items() if value}


def prompts_of(data: DataConfig, answer_tokens: int) -> Prompts:
    """The prompt's parts as a config has them. `answer_tokens` are kept free. Raises UserError for what cannot serve."""
    examples = tuple(
        Record((Message("user", one.question),), chosen=one.answer, context=one.context) for one in data.examples
    )
    source = None if data.prompt_template is None else _source(data.prompt_template)
    room = max(1, data.max_length - answer_tokens)
    prompts = Prompts(data.system, examples, source, data.template == "jinja", room)
    prompts.check()
    return prompts


def with_less_context(record: Record, kept: Sequence[str]) -> Record:
    """The record with these passages, of which empty ones are left out."""
    return replace(record, context=tuple(one for one in kept if one.strip()))


def context_merged(messages: Sequence[Message]) -> list[Message]:
    """Passages before the text of the user turn that follows them, for chat."""
    merged: list[Message] = []
    held = ""
    for message in messages:
        if message.role == "context":
            held = CONTEXT.format(message.content.strip()) + "\n\n"
        else:
            merged.append(Message(message.role, held + message.content) if held else message)
            held = ""
    return merged


def _source(given: str) -> str:
    """The template's text: itself, or the file that it names."""
    if "{{" in given or "{%" in given or "\n" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.prompt_template: {given} cannot be read ({error}); it is a file, or the template itself with "
            "{{ question }} in it"
        ) from error


def _environment() -> jinja2.Environment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
