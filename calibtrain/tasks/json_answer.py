"""JSON of a schema, or a call of a tool: right as a whole where it equals an accepted one, and each of its values by itself.

The likelihood of an answer is that of its values, given the keys and brackets around them: how a model lays an object out
(spaces, line breaks, the order of keys) says nothing about whether it is right, and would only dilute what does. That of
the whole reply is another source. A string's closing quote is read with it, and so is what follows a number, without which
12 would be credited with the probability of 125.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from calibtrain.config_tasks import JsonTask
from calibtrain.errors import UserError
from calibtrain.records import Record
from calibtrain.tasks.json_compare import Comparison
from calibtrain.tasks.json_schema import Check, checker, read_schema
from calibtrain.tasks.json_text import Path, Value, at, find, name_of, parse, values
from calibtrain.tasks.matching import normalize, without_thinking
from calibtrain.tasks.task import Grade, Part, Reading, Task

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool as {"name", "arguments"}, and where in the JSON that stands."""

    value: dict[str, Any]
    prefix: Path = ()


class JsonAnswer(Task):
    """Right is what equals an accepted object in the fields of `compare`, and keeps to the schema."""

    several_lines = True
    objects = True

    def __init__(self, config: JsonTask) -> None:
        self.config = config
        schema = read_schema(config.schema_file) if config.schema_file else config.schema
        self.schema = None if config.tool else schema
        self.written = schema if config.schema_file else None
        self.place = f"task.schema_file: {config.schema_file}" if config.schema_file else "task.schema"
        self.check: Check = (lambda value: None) if schema is None else checker(schema, self.place)
        self.opening = "[" if isinstance(schema, dict) and schema.get("type") == "array" and not config.tool else "{"
        text = normalize if config.match == "normalized_match" else str.strip
        self.compare = Comparison(text, config.compare, config.unordered)
        _check_names(config, schema)

    def identity(self) -> Any:
        """With what the schema's file says."""
        return [super().identity(), self.written]

    def asked(self, record: Record) -> Record:
        """The record, its answers checked; one that brings only a reply to learn is graded by that.

        Raises UserError that names the record for an answer that is no JSON, or violates the schema.
        """
        for name, text in (("answer to learn", record.chosen), *(("accepted answer", one) for one in record.accepted)):
            if text is not None:
                self._check_gold(name, text, record)
        if not record.accepted and record.chosen is not None:
            return replace(record, accepted=(record.chosen,))
        return record

    def read(self, reply: str, record: Record) -> Reading:
        """The JSON in a reply: the whole, that of a fence, or the first that is balanced. Not found: none that can serve."""
        nothing = Reading("", 0, 0, found=False)
        start, stop = 0, len(reply)
        if self.config.tool and (calls := list(_CALL.finditer(reply))):
            if len(calls) > 1:
                return nothing
            start, stop = calls[0].span(1)
        found = find(reply[start:stop], self.opening)
        if found is None:
            return nothing
        start, stop = start + found.start, start + found.stop
        text = reply[start:stop]
        answer = self._answer(found.value)
        if answer is None:
            return Reading(text, start, stop, found=False)
        parts = self._parts(text, found.value, answer.prefix, start)
        spans = tuple((one.start, max(one.stop, one.read_to)) for one, counts in parts if counts)
        kept = self._violation(answer.value, record) is None
        return Reading(text, start, stop, kept, tuple(one for one, _ in parts), spans)

    def right(self, text: str, record: Record) -> bool:
        """Whether the object is one of the accepted ones."""
        said = self._meaning(text)
        return said is not None and said in [self._meaning(one) for one in record.accepted]

    def grades(self, readings: Sequence[Reading], records: Sequence[Record]) -> list[Grade]:
        """Of the whole and of every value, by the accepted object of which most values are said."""
        return [self._grade(one, record) for one, record in zip(readings, records, strict=True)]

    def key(self, text: str, record: Record) -> str:
        """What it means, in the fields that count, whatever its layout."""
        meaning = self._meaning(text)
        return normalize(text) if meaning is None else json.dumps(meaning, ensure_ascii=False)

    def _grade(self, reading: Reading, record: Record) -> Grade:
        if not self.gradable(record):
            return Grade(None, (None,) * len(reading.parts))
        correct = reading.found and self.right(reading.text, record)
        if not reading.parts:
            return Grade(correct)
        said = self._answer(parse(reading.text))
        golds = [gold for gold in map(self._gold, record.accepted) if gold is not None]
        assert said is not None
        graded = [self.compare.grades(said.value, gold.value) for gold in golds]
        best = max(range(len(graded)), key=lambda i: sum(graded[i].values()))
        places = [place for place, _ in self._values(reading.text, said.prefix)]
        return Grade(correct, tuple(self._part(place, said, golds[best], graded[best]) for place in places))

    def _part(self, place: Path, said: Call, gold: Call, graded: dict[Path, bool]) -> bool | None:
        if not self.compare.counts(place):
            return None
        if place in graded:
            return graded[place]
        try:  # arguments that are JSON in a text have one place
            mine, wanted = (self.compare.meaning(at(one.value, place), place) for one in (said, gold))
        except (KeyError, IndexError, TypeError):
            return False
        return bool(mine == wanted)

    def _parts(self, text: str, value: Any, prefix: Path, offset: int) -> list[tuple[Part, bool]]:
        """The values of an answer, and whether each counts."""
        found = []
        for place, one in self._values(text, prefix):
            said, written = at(value, one.path), text[one.start : one.stop]
            # A string ends with its quote; a number goes on unless something else follows.
            read_to = 0 if written[0] in '"{[' else offset + one.stop + 1
            part = Part(
                name_of(place),
                said if isinstance(said, str) else written,
                offset + one.start,
                offset + one.stop,
                read_to,
            )
            found.append((part, self.compare.counts(place)))
        return found

    def _values(self, text: str, prefix: Path) -> Iterator[tuple[Path, Value]]:
        """The values of an answer with their places in it: of a tool call its name and arguments alone."""
        for one in values(text):
            place = one.path[len(prefix) :]
            if one.path[: len(prefix)] == prefix and (not self.config.tool or place[:1] in (("name",), ("arguments",))):
                yield place, one

    def _meaning(self, text: str) -> Any:
        """What a JSON text is compared by; None where it is no answer."""
        gold = self._gold(text)
        return None if gold is None else self.compare.meaning(gold.value)

    def _gold(self, text: str) -> Call | None:
        try:
            return self._answer(parse(_bare(text)))
        except ValueError:
            return None

    def _answer(self, value: Any) -> Call | None:
        """The object that is compared: of a tool call its name and arguments, however they are wrapped."""
        if not self.config.tool:
            return Call(value)
        prefix: Path = ()
        if isinstance(value, dict) and isinstance(value.get("function"), dict):
            prefix, value = ("function",), value["function"]
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or "arguments" not in value:
            return None
        arguments = value["arguments"]
        if isinstance(arguments, str):  # OpenAI's API writes them as JSON in a text
            try:
                arguments = parse(arguments)
            except ValueError:
                return None
        if not isinstance(arguments, dict):
            return None
        return Call({"name": value["name"], "arguments": arguments}, prefix)

    def _violation(self, value: Any, record: Record) -> str | None:
        """What of an answer is not as the schema, or the tools of its question, have it."""
        if not self.config.tool:
            return self.check(value)
        if (tools := self._tools(record)) is not None:
            check = tools.get(value["name"])
            if check is None:
                return f"there is no tool {value['name']!r:.80}; there are {', '.join(sorted(tools)) or 'none'}"
            if problem := check(value["arguments"]):
                return problem
        return self.check(value["arguments"])

    def _tools(self, record: Record) -> dict[str, Check] | None:
        """The checks of a question's tools by their names; None where it brings none."""
        given = record.fields.get(self.config.tools)
        if given is None or given == "":
            return None
        place = f"{record.origin or record.question}: {self.config.tools}"
        try:
            text = given if isinstance(given, str) else json.dumps(given, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: no list of tool definitions ({error})") from error
        return _tool_checks(text, place)

    def _check_gold(self, name: str, text: str, record: Record) -> None:
        place = record.origin or record.question
        try:
            value = parse(_bare(text))
        except ValueError as error:
            raise UserError(f"{place}: the {name} is no JSON ({error}): {text[:60]!r}; mend or drop the row") from error
        answer = self._answer(value)
        if answer is None:
            raise UserError(
                f'{place}: the {name} is no tool call {{"name": ..., "arguments": {{...}}}}: {text[:60]!r}; '
                "mend or drop the row"
            )
        if problem := self._violation(answer.value, record):
            raise UserError(f"{place}: the {name} violates the schema: {problem}; mend the row, or the schema")


@lru_cache(maxsize=1024)
def _tool_checks(text: str, place: str) -> dict[str, Check]:
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: no JSON ({error}); it is a list of tool definitions") from error
    found = {}
    for tool in tools if isinstance(tools, list) else [tools]:
        tool = tool.get("function", tool) if isinstance(tool, dict) else {}
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise UserError(f'{place}: a tool is {{"name": ..., "parameters": schema}}, got {str(tool)[:60]!r}')
        found[tool["name"]] = checker(tool.get("parameters") or {}, f"{place}, tool {tool['name']!r}")
    return found


def _bare(text: str) -> str:
    """A gold answer as it is written in data: thinking before it and Hermes' tags around it are no part of it."""
    text = without_thinking(text).strip()
    found = _CALL.fullmatch(text)
    return found[1].strip() if found else text


def _check_names(config: JsonTask, schema: Any) -> None:
    """UserError for fields to compare that the schema's properties do not have."""
    known = (
        {"name", "arguments"} if config.tool else set(schema.get("properties", ()) if isinstance(schema, dict) else ())
    )
    for key, names in (("compare", config.compare), ("unordered", config.unordered)):
        for name in names or ():
            first = re.split(r"[.\[]", name, maxsplit=1)[0]
            if known and first and first not in known:
                raise UserError(f"task.{key}: {name!r}: no such field; the fields are {', '.join(sorted(known))}")
