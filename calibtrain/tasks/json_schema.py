"""JSON Schemas (2020-12) of the user's: checked once, then kept to; nothing outside them is ever fetched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from calibtrain.errors import UserError

Check = Callable[[Any], str | None]
"""What of a value violates the schema, in one line; None where it keeps to it."""


def read_schema(path: Path) -> Any:
    """The JSON of a schema's file. Raises UserError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"task.schema_file: {path}: cannot be read as JSON ({error})") from error


def checker(schema: Any, place: str) -> Check:
    """Check of values against a schema; `place` names it in messages.

    Raises UserError for what is no schema, and for references that lead out of it or nowhere.
    """
    try:
        import referencing
        import referencing.exceptions
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
        from referencing.jsonschema import DRAFT202012
    except ImportError as error:
        raise UserError(
            "task.kind: json checks schemas with jsonschema, which is not installed: pip install 'calibtrain[tasks]'"
        ) from error
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        where = "".join(f"[{key!r}]" for key in error.absolute_path)
        raise UserError(f"{place}: no JSON Schema: {where}{': ' if where else ''}{_line(error.message)}") from error
    except RecursionError as error:
        raise UserError(f"{place}: no JSON Schema: nested too deep") from error
    resource = referencing.Resource.from_contents(schema, default_specification=DRAFT202012)
    resolver = referencing.Registry().with_resource("", resource).resolver()
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise UserError(f"{place}: refers to {reference!r}, and nothing is fetched; write that part into $defs")
        try:
            resolver.lookup(reference)
        except referencing.exceptions.Unresolvable as error:
            raise UserError(f"{place}: refers to {reference!r}, which is not in it") from error
    validator = Draft202012Validator(schema, registry=referencing.Registry())

    def check(value: Any) -> str | None:
        try:
            error = next(validator.iter_errors(value), None)
        except RecursionError:
            return "the schema refers to itself without end"
        if error is None:
            return None
        where = "".join(f"[{key!r}]" for key in error.absolute_path)
        return f"{where}{': ' if where else ''}{_line(error.message)}"

    return check


def _references(schema: Any) -> Iterator[str]:
    """Every reference in a schema. A property that is called $ref holds a schema, not text."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            elif key not in ("const", "enum", "default", "examples"):
                yield from _references(value)
    elif isinstance(schema, list):
        for one in schema:
            yield from _references(one)


def _line(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= 200 else text[:199] + "…"
