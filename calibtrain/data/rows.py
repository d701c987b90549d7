"""One row of a data set, whatever its shape, as a Record.

Recognised shapes (extra columns are left alone):
    question, answers                       graded question; the first answer is the one to learn
    prompt, completion                      supervised fine-tuning
    prompt, chosen, rejected                preference pair, of strings or of chat messages
    prompt, completion, label               unpaired preference: whether the completion is desirable
    messages                                conversation; its last assistant turn is the completion
    instruction, input, output              Alpaca's; also with chosen, rejected or answers instead of output
`label` (true or false) is read where it is mapped, or an objective asks for it, and is left alone elsewhere.
`answers` may stand beside any of them and makes the row gradable. `question` and `prompt` mean the same.

Text is text, whatever it looks like, and an object where an answer is meant is its JSON. CSV alone has no other way to
hold a list: there a cell that is a JSON list of messages, or of answers, is that list.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibtrain.data.strata import strata_of
from calibtrain.data.values import json_text, missing, plain, printable, short, text_of, unreadable
from calibtrain.errors import UserError
from calibtrain.records import Message, Record

FIELDS = ("prompt", "completion", "chosen", "rejected", "messages", "question", "answers", "label", "options")
ALPACA = ("input", "system", "history")
"""What Alpaca's files hold beside `instruction` and `output`."""
ANSWERS = ("completion", "chosen", "rejected")
"""Fields of which a JSON object is an answer's text, unless it is a message."""
READABLE = frozenset({*FIELDS, *ALPACA, "instruction", "output"})
"""Names of columns that are read without being mapped."""
SHAPES = "question + answers, prompt + completion, prompt + chosen + rejected, messages, or instruction + output"
ROLES = ("system", "user", "assistant")
_PREFERENCE_NEEDS_BOTH = "`rejected` stands without `chosen`: a preference pair needs both"
_LIKE_MESSAGES = re.compile(r"\s*(?:array\()?\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")
_ONE_PRINTED = re.compile(r"\s*\{\s*'(?:role|content|from|value)'\s*:.*\}\s*", re.DOTALL)
_PRINTED = (
    "holds a list as Python prints it, which is no JSON; before to_csv, apply json.dumps to the column, or save the data "
    "with to_json(path, orient='records', lines=True) or to_parquet"
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which column holds which field, of the columns that were found."""

    columns: Mapping[str, str]
    strata: tuple[str, ...] = ()
    cells: bool = False  # a list may stand in text: CSV
    options: tuple[str, ...] = ()  # a column each
    fields: tuple[str, ...] = ()  # handed on as they are
    context: tuple[str, ...] = ()  # passages, a column or a list of them each

    @property
    def read(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (*self.columns.values(), *self.strata, *self.options, *self.fields, *self.context)


def find_layout(
    found: Sequence[str],
    columns: Mapping[str, str | Sequence[str]],
    place: str,
    cells: bool = False,
    labelled: bool = False,
) -> Layout:
    """Layout of a data set with the columns `found`, in whatever row they stand.

    `labelled`: answers are wanted with a label, or as pairs, or as graded questions to find wrong answers to. Raises
    UserError unless `columns` maps known fields to columns that exist and some shape can be read.
    """
    columns = {
        field: [named] if field == "context" and isinstance(named, str) else named for field, named in columns.items()
    }
    lists = {name: tuple(named) for name, named in columns.items() if not isinstance(named, str)}
    mapped = {ours: theirs for ours, theirs in columns.items() if isinstance(theirs, str)}
    listed = ", ".join(printable(str(column)) for column in found) or "none"
    for ours in mapped:
        if ours not in FIELDS:
            fields = ", ".join((*FIELDS, "strata", "fields", "context"))
            raise UserError(f"{place}: columns maps {ours!r}, which is no field; the fields are {fields}")
    for ours, theirs in [*mapped.items(), *((name, one) for name, named in lists.items() for one in named)]:
        if theirs not in found:
            raise UserError(f"{place}: columns.{ours} names {theirs!r}; the columns found are {listed}")
    held = {field: mapped.get(field, field) for field in FIELDS if mapped.get(field, field) in found}
    held = _with_alpaca(held, found)
    if "label" in held and not (labelled or "label" in mapped):
        del held["label"]
    if labelled and not held.keys() & {"label", "rejected", "answers"}:
        raise UserError(
            f"{place}: the columns found are {listed}; an objective that learns from unpaired answers needs a `label` (true "
            "or false) beside each, or chosen and rejected ones: map yours with data.source.columns, "
            "e.g. {label: your_column}"
        )
    asks = held.keys() & {"prompt", "question"}
    if not ("messages" in held or "chosen" in held or (asks and held.keys() & {"completion", "answers"})):
        raise UserError(
            f"{place}: the columns found are {listed}; accepted are {SHAPES}. "
            "Map yours with data.source.columns, e.g. {question: your_column}"
        )
    if "options" in lists:
        held.pop("options", None)
    more = {name: lists.get(name, ()) for name in ("strata", "options", "fields", "context")}
    return Layout(held, cells=cells, **more)


def _with_alpaca(held: dict[str, str], found: Sequence[str]) -> dict[str, str]:
    """The columns with Alpaca's where the question is its `instruction`, mapped or left alone."""
    if "instruction" in found and not held.keys() & {"prompt", "question", "messages"}:
        held = {**held, "prompt": "instruction"}
    if "instruction" not in (held.get("prompt"), held.get("question")):
        return held
    if "output" in found and not held.keys() & {"completion", "chosen", "answers"}:
        held = {**held, "completion": "output"}
    beside = {name: name for name in ALPACA if name in found and name not in held.values()}
    return {**held, **beside}


def record_from_row(row: Mapping[str, Any], layout: Layout, place: str) -> Record:
    """Record of one row; `place` ("file.jsonl:17") names it in messages. Raises UserError for one that cannot serve."""
    values = {field: plain(row.get(layout.columns[field])) for field in layout.columns}
    values = {field: None if missing(value) else value for field, value in values.items()}
    accepted = _answers(values.pop("answers", None), layout.cells, place)
    options = _answers(_option_texts(values.pop("options", None)), layout.cells, place)
    options += tuple(one for column in layout.options for one in _answers(plain(row.get(column)), False, place))
    label = values.pop("label", None)
    opened = {field: _opened(value, field, layout.cells, place) for field, value in values.items()}
    prompt, chosen, rejected = _conversation({field: opened.get(field) for field in (*FIELDS, *ALPACA)}, place)
    if "label" in layout.columns and chosen is not None and rejected is None and not _desirable(label, place):
        chosen, rejected = None, chosen
    elif chosen is None and accepted:
        chosen = accepted[0]
    if chosen is None and rejected is None:
        raise UserError(f"{place}: the row has no answer ({SHAPES})")
    for name, text in (("answer", chosen), ("rejected answer", rejected)):
        if text is not None and not text.strip():
            raise UserError(f"{place}: the {name} is empty")
    if not prompt[-1].content.strip():
        raise UserError(f"{place}: the question is empty")
    fields = {column: plain(row.get(column)) for column in layout.fields}
    strata = strata_of(row, layout.strata, place)
    context = _passages(row, layout, place)
    record = Record(prompt, chosen, rejected, accepted, strata, place, options, context, fields)
    _check_characters(record)
    return record


def _option_texts(value: Any) -> Any:
    """Of options that come with their letters, {"text": [...], "label": [...]}, the texts."""
    return value["text"] if isinstance(value, Mapping) and isinstance(value.get("text"), list) else value


def _passages(row: Mapping[str, Any], layout: Layout, place: str) -> tuple[str, ...]:
    """The texts to answer by; a row may have none."""
    found = []
    for column in layout.context:
        value = plain(row.get(column))
        if layout.cells and isinstance(value, str):
            value = _list_in_cell(value, place)
        for one in [] if missing(value) else value if isinstance(value, list) else [value]:
            if not isinstance(one, str):
                raise UserError(f"{place}: column {column!r} holds {short(one)}; a context is text, or a list of texts")
            found.append(one)
    return tuple(one for one in found if one.strip())


def _desirable(label: Any, place: str) -> bool:
    """What a label says: true or false, as JSON, Python, CSV or a column of 0 and 1 write it."""
    text = str(label).strip().lower()
    if text in ("true", "1", "1.0"):
        return True
    if text in ("false", "0", "0.0"):
        return False
    raise UserError(
        f"{place}: label holds {short(label)}; it says whether the answer is desirable, true or false"
        if label is not None
        else f"{place}: the row has no label, true or false, which says whether its answer is desirable"
    )


def _check_characters(record: Record) -> None:
    texts = [("prompt", message.content) for message in record.prompt]
    texts += [("answer", record.chosen or ""), ("rejected answer", record.rejected or "")]
    texts += [("accepted answer", text) for text in record.accepted]
    texts += [("option", text) for text in record.options]
    texts += [("context", text) for text in record.context]
    texts += [(f"stratum {printable(key)!r}", text) for key, text in record.strata.items()]
    for name, text in texts:
        if not text.isascii() and (half := unreadable(text)):
            raise UserError(
                f"{record.origin}: the {name} holds {half}, half of a character (a lone surrogate), which no tokenizer "
                "can read; the text was cut inside an emoji: mend or drop the row"
            )


def _opened(value: Any, field: str, cells: bool, place: str) -> Any:
    """Text, or the list of messages that the value is; whatever else it is comes back as it is."""
    if not isinstance(value, str):
        said = field in ANSWERS and not (isinstance(value, dict) and "role" in value)
        text = (json_text(value) if said else None) or text_of(value)
        return value if text is None else text
    if _ONE_PRINTED.fullmatch(value):
        raise UserError(f"{place}: {field} {_PRINTED.replace('a list', 'a message')}")
    if not _LIKE_MESSAGES.match(value):
        return value
    try:
        turns = json.loads(value)
    except ValueError as error:
        if value.rstrip().endswith(("]", "])", "dtype=object)")):
            raise UserError(f"{place}: {field} {_PRINTED}") from error
        return value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return value
    if cells or field == "messages":
        return turns
    if all({"role", "content"} <= turn.keys() for turn in turns):
        raise UserError(f"{place}: {field} is text that holds a list of messages; give the list itself, not as text")
    return value


def _conversation(values: Mapping[str, Any], place: str) -> tuple[tuple[Message, ...], str | None, str | None]:
    """Prompt, chosen and rejected answer, the latter two None where the row has none."""
    prompt = _prompt(values, place)
    chosen, rejected = values["chosen"], values["rejected"]
    if chosen is not None:
        chosen_prompt, answer = _split_answer(chosen, prompt, "chosen", place)
        if rejected is None:
            return _ending_with_user(chosen_prompt, place), answer, None
        rejected_prompt, wrong = _split_answer(rejected, prompt, "rejected", place)
        if chosen_prompt != rejected_prompt:
            raise UserError(f"{place}: chosen and rejected answer different prompts")
        return _ending_with_user(chosen_prompt, place), answer, wrong
    if rejected is not None:
        raise UserError(f"{place}: {_PREFERENCE_NEEDS_BOTH}")
    if values["completion"] is not None:
        completion_prompt, answer = _split_answer(values["completion"], prompt, "completion", place)
        return _ending_with_user(completion_prompt, place), answer, None
    if values["messages"] is not None:
        turns = _turns(values["messages"], "messages", place)
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
        if last is None:
            raise UserError(f"{place}: messages has no assistant turn, so no answer")
        return _ending_with_user(turns[:last], place), turns[last].content, None
    return _ending_with_user(prompt, place), None, None


def _prompt(values: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """Turns of the prompt or question column; Alpaca's system, history and input stand around its instruction."""
    question = values["question"] if values["prompt"] is None else values["prompt"]
    question_input = values["input"]
    if question_input is not None:
        if not isinstance(question_input, str) or not isinstance(question or "", str):
            raise UserError(f"{place}: input is added to the instruction: both must be text")
        if question_input.strip():
            question = f"{question}\n{question_input}" if question else question_input
    prompt = () if question is None else _turns(question, "prompt", place)
    return (*_earlier(values, place), *prompt) if prompt else ()


def _earlier(values: Mapping[str, Any], place: str) -> list[Message]:
    turns = []
    if values["system"] is not None:
        if not isinstance(values["system"], str):
            raise UserError(f"{place}: system must be text, not {type(values['system']).__name__}")
        turns.append(Message("system", values["system"]))
    history = values["history"]
    if history is None:
        return turns
    pairs = history if isinstance(history, list) else [history]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"{place}: history is a list of [question, answer] pairs of text, got {short(pair)}")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def _split_answer(value: Any, prompt: tuple[Message, ...], name: str, place: str) -> tuple[tuple[Message, ...], str]:
    """Prompt and answer of a string, of one assistant message, or of a whole conversation that repeats the prompt."""
    if isinstance(value, str):
        return prompt, value
    turns = _turns(value, name, place)
    if turns[-1].role != "assistant":
        raise UserError(f"{place}: {name} ends with a {turns[-1].role} turn; its last message must be the assistant's")
    # A conversation that opens with the answer alone continues the prompt column.
    return (turns[:-1] or prompt), turns[-1].content


def _turns(value: Any, name: str, place: str) -> tuple[Message, ...]:
    """Messages of a plain string (one user turn) or of a list of {role, content}."""
    if isinstance(value, str) and name != "messages":
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        kind = "a list of messages" if name == "messages" else "text or a list of messages"
        raise UserError(f"{place}: {name} must be {kind}, not {short(value)}")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str) or turn.get("role") not in ROLES:
            raise UserError(
                f"{place}: each message of {name} is {{role: {'|'.join(ROLES)}, content: text}}, got {short(turn)}"
            )
        if turn.get("tool_calls"):
            raise UserError(
                f"{place}: a message of {name} has tool_calls, which cannot be trained; leave such rows out"
            )
        turns.append(Message(turn["role"], turn["content"]))
    return tuple(turns)


def _ending_with_user(prompt: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    if not prompt:
        raise UserError(f"{place}: the row has no question or prompt")
    if prompt[-1].role != "user":
        raise UserError(f"{place}: the prompt ends with a {prompt[-1].role} turn; the answer must follow a user turn")
    return prompt


def _answers(value: Any, cells: bool, place: str) -> tuple[str, ...]:
    """Accepted answers of a scalar or a list of them, without the whitespace around them."""
    if cells and isinstance(value, str):
        value = _list_in_cell(value, place)
    if missing(value):
        return ()
    if isinstance(value, dict) and "answer_start" not in value:  # SQuAD's {text, answer_start} is no answer
        value = json_text(value) or value
    answers = []
    for one in value if isinstance(value, list) else [value]:
        text = text_of(one)
        if text is None:
            advice = ' (say true and false in words, e.g. "yes")' if isinstance(one, bool) else ""
            raise UserError(f"{place}: answers holds {short(one)}; each must be text or a number{advice}")
        answers.append(text.strip())
    if not all(answers):
        raise UserError(f"{place}: answers holds an empty answer")
    return tuple(answers)


def _list_in_cell(cell: str, place: str) -> Any:
    """The JSON list that a CSV cell is, or its text: an interval like [0, 1) is no list."""
    if not cell.lstrip().startswith("["):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        pass
    try:
        printed = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return cell
    if isinstance(printed, list) and any(isinstance(one, str) for one in printed):
        raise UserError(f"{place}: answers {_PRINTED}")
    return cell
