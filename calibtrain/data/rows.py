"""One row of a data set, whatever its shape, as a Record.

Recognised shapes (extra columns are left alone):
    question, answers                       graded question; the first answer is the one to learn
    prompt, completion                      supervised fine-tuning
    prompt, chosen, rejected                preference pair, of strings or of chat messages
    messages                                conversation; its last assistant turn is the completion
`answers` may stand beside any of them and makes the row gradable. `question` and `prompt` mean the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from calibtrain.data.records import Message, Record
from calibtrain.errors import UserError

FIELDS = ("prompt", "completion", "chosen", "rejected", "messages", "question", "answers")
SHAPES = "question + answers, prompt + completion, prompt + chosen + rejected, or messages"
ROLES = ("system", "user", "assistant")
_PREFERENCE_NEEDS_BOTH = "`rejected` stands without `chosen`: a preference pair needs both"


def check_columns(found: Sequence[str], columns: Mapping[str, str], place: str) -> None:
    """Raise UserError unless `columns` maps known fields to columns that exist and some shape can be read."""
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            raise UserError(f"{place}: columns maps {ours!r}, which is no field; the fields are {', '.join(FIELDS)}")
        if theirs not in found:
            raise UserError(f"{place}: columns.{ours} names {theirs!r}; the columns found are {', '.join(found)}")
    names = {field for field in FIELDS if columns.get(field, field) in found}
    asks = names & {"prompt", "question"}
    readable = "messages" in names or "chosen" in names or (asks and names & {"completion", "answers"})
    if not readable:
        raise UserError(
            f"{place}: the columns found are {', '.join(found) or 'none'}; accepted are {SHAPES}. "
            "Map yours with data.source.columns, e.g. {question: your_column}"
        )


def record_from_row(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Record:
    """Record of one row; `place` ("file.jsonl:17") names it in messages. Raises UserError for one that cannot serve."""
    values = {field: row.get(columns.get(field, field)) for field in FIELDS}
    accepted = _answers(values["answers"], place)
    prompt, chosen, rejected = _conversation(values, place)
    if chosen is None and accepted:
        chosen = accepted[0]
    if chosen is None:
        raise UserError(f"{place}: the row has no answer ({SHAPES})")
    for name, text in (("answer", chosen), ("rejected answer", rejected)):
        if text is not None and not text.strip():
            raise UserError(f"{place}: the {name} is empty")
    if not prompt[-1].content.strip():
        raise UserError(f"{place}: the question is empty")
    return Record(prompt=prompt, chosen=chosen, rejected=rejected, accepted=accepted, origin=place)


def _conversation(values: Mapping[str, Any], place: str) -> tuple[tuple[Message, ...], str | None, str | None]:
    """Prompt, chosen and rejected answer, the latter two None where the row has none."""
    question = values["prompt"] if not _missing(values["prompt"]) else values["question"]
    prompt = () if _missing(question) else _turns(question, "prompt", place)
    chosen, rejected = values["chosen"], values["rejected"]
    if not _missing(chosen):
        chosen_prompt, answer = _split_answer(chosen, prompt, "chosen", place)
        if _missing(rejected):
            return _ending_with_user(chosen_prompt, place), answer, None
        rejected_prompt, wrong = _split_answer(rejected, prompt, "rejected", place)
        if chosen_prompt != rejected_prompt:
            raise UserError(f"{place}: chosen and rejected answer different prompts")
        return _ending_with_user(chosen_prompt, place), answer, wrong
    if not _missing(rejected):
        raise UserError(f"{place}: {_PREFERENCE_NEEDS_BOTH}")
    if not _missing(values["completion"]):
        completion_prompt, answer = _split_answer(values["completion"], prompt, "completion", place)
        return _ending_with_user(completion_prompt, place), answer, None
    if not _missing(values["messages"]):
        turns = _turns(values["messages"], "messages", place)
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
        if last is None:
            raise UserError(f"{place}: messages has no assistant turn, so no answer")
        return _ending_with_user(turns[:last], place), turns[last].content, None
    return _ending_with_user(prompt, place), None, None


def _split_answer(value: Any, prompt: tuple[Message, ...], name: str, place: str) -> tuple[tuple[Message, ...], str]:
    """Prompt and answer of a string, of one assistant message, or of a whole conversation that repeats the prompt."""
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return prompt, value
    turns = _turns(value, name, place)
    if turns[-1].role != "assistant":
        raise UserError(f"{place}: {name} ends with a {turns[-1].role} turn; its last message must be the assistant's")
    # A conversation that opens with the answer alone continues the prompt column.
    return (turns[:-1] or prompt), turns[-1].content


def _turns(value: Any, name: str, place: str) -> tuple[Message, ...]:
    """Messages of a plain string (one user turn), of a list of {role, content}, or of that list as a JSON string."""
    if isinstance(value, str):
        if not value.lstrip().startswith("[{"):
            return (Message("user", value),)
        try:
            value = json.loads(value)
        except ValueError:
            return (Message("user", value),)
    if not isinstance(value, Sequence) or not value:
        raise UserError(f"{place}: {name} must be text or a list of messages, not {type(value).__name__}")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str) or turn.get("role") not in ROLES:
            raise UserError(
                f"{place}: each message of {name} is {{role: {'|'.join(ROLES)}, content: text}}, got {_short(turn)}"
            )
        turns.append(Message(turn["role"], turn["content"]))
    return tuple(turns)


def _ending_with_user(prompt: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    if not prompt:
        raise UserError(f"{place}: the row has no question or prompt")
    if prompt[-1].role != "user":
        raise UserError(f"{place}: the prompt ends with a {prompt[-1].role} turn; the answer must follow a user turn")
    return prompt


def _answers(value: Any, place: str) -> tuple[str, ...]:
    """Accepted answers of a string, a number, a list of them, or a JSON list in a string (what a CSV cell can hold)."""
    if _missing(value):
        return ()
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{place}: answers starts like a JSON list but is none ({error})") from error
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise UserError(f"{place}: answers holds {_short(one)}; each must be text or a number")
    answers = tuple(str(one).strip() for one in values)
    if not all(answers):
        raise UserError(f"{place}: answers holds an empty answer")
    return answers


def _missing(value: Any) -> bool:
    """None (or NaN, which pandas writes for it), an empty string or an empty list."""
    if value is None or value != value:
        return True
    return isinstance(value, str | Sequence) and len(value) == 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
