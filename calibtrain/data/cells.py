"""What one cell of a row says: a text or messages, accepted answers, a label, a weight."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from calibtrain.data.values import json_text, missing, plain, text_of
from calibtrain.errors import UserError, short

SAID = ("completion", "chosen", "rejected")
"""Fields of which a JSON object is an answer's text, unless it is a message."""
_OBJECT = (
    "; an object is an answer where task.kind is json or custom: write its texts into a column of their own, or set it"
)
_LIKE_MESSAGES = re.compile(r"\s*(?:array\()?\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")
_ONE_PRINTED = re.compile(r"\s*\{\s*'(?:role|content|from|value)'\s*:.*\}\s*", re.DOTALL)
_PRINTED = (
    "holds a list as Python prints it, which is no JSON; before to_csv, apply json.dumps to the column, or save the data "
    "with to_json(path, orient='records', lines=True) or to_parquet"
)


def opened(value: Any, field: str, cells: bool, place: str) -> Any:
    """Text, or the list of messages that the value is; whatever else it is comes back as it is."""
    if not isinstance(value, str):
        said = field in SAID and not (isinstance(value, dict) and {"role", "from"} & value.keys())
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


def answers_of(value: Any, cells: bool, place: str, field: str = "answers", objects: bool = False) -> tuple[str, ...]:
    """Accepted answers (or options) of a scalar or a list of them, without the whitespace around them.

    An object is its JSON with `objects`, else the texts of TriviaQA's {value, aliases}. Raises UserError for any other.
    """
    if cells and isinstance(value, str):
        value = _list_in_cell(value, place)
    if missing(value):
        return ()
    if isinstance(value, dict) and "answer_start" not in value:  # SQuAD's {text, answer_start} is no answer
        value = (json_text(value) if objects else _value_and_aliases(value)) or value
    answers = []
    for one in value if isinstance(value, list) else [value]:
        text = text_of(one)
        if text is None:
            advice = ' (say true and false in words, e.g. "yes")' if isinstance(one, bool) else ""
            if isinstance(one, dict):
                advice = _OBJECT if field == "answers" and not objects else ""
            raise UserError(f"{place}: {field} holds {short(one)}; each must be text or a number{advice}")
        answers.append(text.strip())
    if not all(answers):
        raise UserError(f"{place}: {field} holds an empty {'answer' if field == 'answers' else 'text'}")
    return tuple(answers)


def _value_and_aliases(value: Mapping[str, Any]) -> list[str] | None:
    """TriviaQA's answer: the value, and what else it is called."""
    said, others = value.get("value"), value.get("aliases")
    if not isinstance(said, str) or not isinstance(others, list) or not all(isinstance(one, str) for one in others):
        return None
    return [*dict.fromkeys(text for text in map(str.strip, (said, *others)) if text)]


def option_texts(value: Any) -> Any:
    """Of options that come with letters or numbers, {"text": [...], "label": [...]}, the texts in the order of these."""
    if not (isinstance(value, Mapping) and isinstance(value.get("text"), list)):
        return value
    texts, labels = value["text"], value.get("label")
    if not isinstance(labels, list) or len(labels) != len(texts):
        return texts
    named = [str(label).strip() for label in labels]
    numbers = all(one.isdecimal() and len(one) < 10 for one in named)  # as text, 10 would stand before 2
    keys: list[Any] = [int(one) for one in named] if numbers else named
    return [texts[place] for place in sorted(range(len(texts)), key=keys.__getitem__)]


def options_in(columns: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Options of a column each; a row may have fewer than others, but none between two: its letters would be others."""
    found = {column: answers_of(value, False, place, column) for column, value in columns.items()}
    last = max((i for i, one in enumerate(found.values()) if one), default=-1)
    if gap := next((column for i, (column, one) in enumerate(found.items()) if not one and i < last), None):
        raise UserError(
            f"{place}: column {gap!r} is empty, and an option stands behind it: which letter would that have?"
        )
    return tuple(text for one in found.values() for text in one)


def passages_of(cells_of: Mapping[str, Any], cells: bool, place: str) -> tuple[str, ...]:
    """The texts to answer by, of columns with their values; a row may have none."""
    found = []
    for column, value in cells_of.items():
        value = plain(value)
        if cells and isinstance(value, str):
            value = _list_in_cell(value, place)
        for one in [] if missing(value) else value if isinstance(value, list) else [value]:
            if not isinstance(one, str):
                raise UserError(f"{place}: column {column!r} holds {short(one)}; a context is text, or a list of texts")
            found.append(one)
    return tuple(one for one in found if one.strip())


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


def desirable(label: Any, place: str) -> bool:
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


def weight_of(value: Any, place: str) -> float:
    """How much a row counts in training: a number that is not negative, 1 where there is none."""
    if missing(value):
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"{place}: weight holds {short(value)}; it is a number, 0 or more")
    return weight


def name_of(value: Any, place: str) -> str:
    """The user's own id of a row; "" where there is none."""
    if missing(value):
        return ""
    text = text_of(value)
    if text is None:
        raise UserError(f"{place}: id holds {short(value)}; it is text or a number")
    return text.strip()
