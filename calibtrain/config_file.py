"""YAML and `a.b=c` overrides in, RunConfig out; every mistake is named with its key, its line and how to mend it."""

from __future__ import annotations

import contextlib
import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from calibtrain.config import RunConfig
from calibtrain.errors import UserError, printable, short

KeyPath = tuple[str | int, ...]

INPUT_PATHS: tuple[KeyPath, ...] = (
    ("data", "source", "path"),
    ("data", "source", "sources", "*", "source", "path"),
    ("data", "questions", "path"),
    ("data", "questions", "sources", "*", "source", "path"),
    ("data", "prompt_template"),
    ("training", "deepspeed"),
    ("model", "source"),
    ("task", "schema_file"),
    ("rollouts", "reward_model"),
    ("rollouts", "sources", "*", "path"),
)
"""Files that a config reads: relative to the YAML file that names them, on the command line to the working directory.
"*" is every item of a list.

What a run writes (output_dir) and continues from (training.resume) is relative to the working directory in both.
"""
HUB_NAMES: tuple[KeyPath, ...] = (("model", "source"), ("rollouts", "reward_model"), ("path",))
"""Of these, what may be a hub name; the last is an item's of rollouts.sources."""

SHOWN = 20
"""So many problems are told at once."""


@dataclass
class _Document:
    """Plain values with the place of each key."""

    values: dict[str, Any]
    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overridden: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """Where the value at `path`, or the section around it, was written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.overridden:
                return f"command line, {short(self.overridden[path[:length]])}"
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config: a YAML file, or the name of a shipped one (`demo`), with `a.b=c` overrides (values are YAML).

    Raises UserError that lists every problem with its key path and its file and line.
    """
    document = _read(_locate(path))
    for override in overrides:
        _override(document, override)
    document.problems += _unwritable(document.values, (), document)
    if document.problems:
        raise _error(document.problems)
    try:
        return RunConfig.model_validate(document.values)
    except ValidationError as error:
        raise _error(_describe(error.errors(include_url=False), document)) from None


def dump_config(config: RunConfig, path: Path) -> None:
    """Write every value of the config as YAML, so that `load_config(path)` gives the same config."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_config(config), encoding="utf-8")


def render_config(config: RunConfig) -> str:
    """The config as YAML text, every value of it."""
    return yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True, width=100)


def without_keys(config: RunConfig) -> RunConfig:
    """The config without what a launched server is given, where keys may stand: of what others are to read."""
    engine = config.rollouts.engine.model_copy(update={"environment": {}, "arguments": ()})
    return config.model_copy(update={"rollouts": config.rollouts.model_copy(update={"engine": engine})})


def without_answers(config: RunConfig) -> RunConfig:
    """Without keys, and without the questions and answers that prompts show: of what leaves the machine."""
    data = config.data.model_copy(update={"examples": ()})
    return without_keys(config).model_copy(update={"data": data})


def shipped_configs() -> list[str]:
    """Names of the configs that come with calibtrain."""
    return sorted(item.name.removesuffix(".yaml") for item in _shipped().iterdir() if item.name.endswith(".yaml"))


def _shipped() -> Path:
    return Path(str(resources.files("calibtrain.configs")))


def _locate(path: str | Path) -> Path:
    """The file itself, or the shipped config of that name."""
    given = Path(path)
    if given.is_file():
        return given
    if str(path) in shipped_configs():
        return _shipped() / f"{path}.yaml"
    names = shipped_configs()
    stem = given.name.removesuffix(".yaml").removesuffix(".yml")
    kind = "is a directory, not a YAML file" if given.is_dir() else "no such file"
    near = difflib.get_close_matches(stem, names, n=1)
    hint = f"Did you mean the shipped config `{near[0]}`? " if near else ""
    raise UserError(f"{path}: {kind}. {hint}Shipped configs, by name: {', '.join(names)}.")


def _error(problems: list[str]) -> UserError:
    head = "The config has a problem:" if len(problems) == 1 else f"The config has {len(problems)} problems:"
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return UserError("\n".join([head, *(f"  {problem}" for problem in (*problems[:SHOWN], *more))]))


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> _Document:
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, this file holds a {type(values).__name__}")
    document = _Document(values=values, name=str(path))
    if root is not None:
        _record_lines(root, (), document)
    for key_path in INPUT_PATHS:
        _make_absolute(document.values, key_path, path.parent)
    return document


def _record_lines(node: yaml.Node, path: KeyPath, document: _Document) -> None:
    """Remember the line of every key; a key written twice is a problem, YAML itself would keep the last one."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*path, str(key_node.value))
            line = key_node.start_mark.line + 1
            if key in document.lines:
                document.problems.append(
                    f"{_dotted(key)} ({document.name}:{line}): written twice, first in line {document.lines[key]}; "
                    "delete one of them"
                )
            document.lines[key] = line
            _record_lines(value_node, key, document)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            item_path: KeyPath = (*path, index)
            document.lines[item_path] = item.start_mark.line + 1
            _record_lines(item, item_path, document)


def _unwritable(values: Any, path: KeyPath, document: _Document) -> list[str]:
    """A problem for every text with a character that no file and no tokenizer takes."""
    if isinstance(values, str) and ("\0" in values or values != printable(values)):
        return [f"{_dotted(path)} ({document.place(path)}): {short(values)} holds what is no character of a text"]
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [problem for key, value in items for problem in _unwritable(value, (*path, key), document)]


def _make_absolute(values: Any, path: KeyPath, base: Path) -> None:
    for depth, key in enumerate(path[:-1]):
        if key == "*":
            for item in values if isinstance(values, list) else ():
                _make_absolute(item, path[depth + 1 :], base)
            return
        values = values.get(key) if isinstance(values, dict) else None
    given = values.get(path[-1]) if isinstance(values, dict) else None
    if not isinstance(given, str) or (path in HUB_NAMES and not given.startswith((".", "~"))):
        return  # `owner/name` is a hub name, or a directory below the working directory when there is one
    if path == ("data", "prompt_template") and any(mark in given for mark in ("{{", "{%", "\n")):
        return  # the template itself
    with contextlib.suppress(ValueError, RuntimeError):  # no name that a file can have, or the home of nobody
        values[path[-1]] = str((base / Path(given).expanduser()).resolve())


# --- overrides -------------------------------------------------------------------------------------------------------


def _override(document: _Document, text: str) -> None:
    """Apply one `a.b=c` or `list.0.key=c`; problems are added to the document's."""
    name, equals, value_text = text.partition("=")
    if not equals or not name.strip() or any(not part for part in name.strip().split(".")):
        document.problems.append(f"{text!r} (command line): an override is `key.path=value`, e.g. training.epochs=2")
        return
    try:
        value = yaml.safe_load(value_text) if value_text else ""
    except yaml.YAMLError:
        document.problems.append(f"{text!r} (command line): {value_text!r} is not a YAML value; put it in quotes")
        return
    path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in name.strip().split("."))
    parent: Any = document.values
    for depth, key in enumerate(path):
        here = path[:depth]
        if isinstance(parent, list):
            if not isinstance(key, int) or key >= len(parent):
                document.problems.append(
                    f"{text!r} (command line): `{_dotted(here)}` is a list of {len(parent)}; "
                    + (f"use an index 0..{len(parent) - 1}" if parent else f"give it whole: '{_dotted(here)}=[...]'")
                )
                return
        elif not isinstance(parent, dict):
            document.problems.append(f"{text!r} (command line): `{_dotted(here)}` holds a value, not a section")
            return
        if depth == len(path) - 1:
            parent[key] = value
        elif isinstance(parent, dict) and parent.get(key) is None:
            parent[key] = _empty(path[: depth + 1])
        parent = parent[key]
    for known in [known for known in document.lines if known[: len(path)] == path]:
        del document.lines[known]
    document.overridden[path] = text
    for key_path in INPUT_PATHS:
        if len(path) <= len(key_path) and all(a in (b, "*") for a, b in zip(key_path, path, strict=False)):
            _make_absolute(document.values, key_path, Path.cwd())


def _empty(path: KeyPath) -> dict[str, Any] | list[Any]:
    """What stands for a section that the file leaves out: a choice keeps the default's name, a list is empty."""
    default: Any = RunConfig()
    for key in path:
        default = getattr(default, str(key), None)
    if isinstance(default, tuple):
        return []
    tag = next((name for name in ("name", "kind") if _is_literal(type(default), name)), None)
    return {tag: getattr(default, tag)} if tag else {}


# --- messages --------------------------------------------------------------------------------------------------------


def _is_literal(model: type, name: str) -> bool:
    known = getattr(model, "model_fields", {}).get(name)
    return known is not None and get_origin(known.annotation) is Literal


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Config sections that a field may hold, through unions, Annotated and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _choices(annotation: Any) -> list[str]:
    """Allowed values of a Literal, also inside a union."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [choice for argument in get_args(annotation) for choice in _choices(argument)]
    return []


def _walk(loc: KeyPath, values: Any) -> tuple[KeyPath, list[type[BaseModel]], Any]:
    """Strip pydantic's own words (union tags, type names) off an error's location.

    Returns the user's key path, the sections that the last key belongs to, and the annotation of the last key.
    """
    path: list[str | int] = []
    owners: list[type[BaseModel]] = []
    candidates: list[type[BaseModel]] = [RunConfig]
    annotation: Any = RunConfig
    for part in loc:
        if isinstance(part, int):
            path.append(part)
            values = values[part] if isinstance(values, list) and part < len(values) else None
            continue
        tags = {
            str(get_args(model.model_fields[tag].annotation)[0]): model
            for model in candidates
            for tag in ("name", "kind")
            if _is_literal(model, tag)
        }
        if len(candidates) > 1 and part in tags:
            candidates = [tags[part]]
            continue
        known = [model.model_fields[part] for model in candidates if part in model.model_fields]
        if not candidates or (not known and not (isinstance(values, dict) and part in values)):
            break  # "tuple[str, ...]", "literal['auto']", ...
        path.append(part)
        owners = candidates
        annotation = known[0].annotation if known else None
        candidates = [model for entry in known for model in _models(entry.annotation)]
        values = values.get(part) if isinstance(values, dict) else None
    return tuple(path), owners, annotation


def _describe(errors: Iterable[ErrorDetails], document: _Document) -> list[str]:
    """One line for each key that has a problem, in the order of the tree."""
    lines: dict[KeyPath, str] = {}
    listed: set[KeyPath] = set()  # sections whose keys have been named
    found = list(errors)
    within = {error["loc"][:length] for error in found for length in range(len(error["loc"]))}
    for error in found:
        if error["type"] == "too_short" and error["loc"] in within:
            continue  # without the items that are wrong
        path, owners, annotation = _walk(error["loc"], document.values)
        if path not in lines:
            where = f"{_dotted(path)} ({document.place(path)})" if path else document.place(path)
            if error["type"] == "extra_forbidden":
                known = sorted({name for model in owners for name in model.model_fields})
                message = _unknown_key(path, known, tell=path[:-1] not in listed)
                listed.add(path[:-1])
            else:
                message = _message(error, annotation)
            lines[path] = f"{where}: {message}"
    return list(lines.values())


def _message(error: ErrorDetails, annotation: Any) -> str:
    kind, value = error["type"], error["input"]
    if kind == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if kind == "invalid_key":
        return "keys are text; put it in quotes if it is meant"
    if kind == "missing":
        return "is missing; this key has no default"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = error["ctx"]["discriminator"].strip("'")
        tags = [str(get_args(model.model_fields[tag].annotation)[0]) for model in _models(annotation)]
        given = value.get(tag) if isinstance(value, Mapping) else None
        if given is None:
            return f"needs `{tag}`: one of {', '.join(tags)}"
        return f"`{tag}: {printable(str(given))[:60]}` is none of {', '.join(tags)}{_nearest(str(given), tags)}"
    choices = _choices(annotation)
    if choices:
        rest = ", or a path" if annotation is not None and Path in get_args(annotation) else ""
        rest = ", or a list of names" if any(get_origin(a) is tuple for a in get_args(annotation)) else rest
        return f"{short(value)} is none of {', '.join(choices)}{rest}{_nearest(str(value), choices)}"
    if _models(annotation) and not isinstance(value, Mapping | list | tuple):
        return f"is a section of its own keys, got {short(value)}"
    if kind == "too_short":
        return f"holds {error['ctx']['min_length']} at least, got {short(value)}"
    if kind == "tuple_type":
        return f"is a list, got {short(value)}"
    message = error["msg"].removeprefix("Input should be ")
    return f"should be {message[0].lower()}{message[1:]}, got {short(value)}" + (
        "; put it in quotes" if kind == "string_type" else ""
    )


def _unknown_key(path: KeyPath, known: list[str], tell: bool) -> str:
    """The sections that have it, or else a key that it is near to; and, where asked to `tell`, all that are known there."""
    key = str(path[-1])
    sections = {name: _keys(field.annotation) for name, field in RunConfig.model_fields.items() if name != path[0]}
    having = [f"`{name}`" for name, keys in sections.items() if key in keys]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    few = 0 < len(having) < 3  # others than `name`
    hint = f"; it is a key of {' and '.join(having)}" if few else f"; did you mean `{near[0]}`?" if near else ""
    every = f"{' ' if hint.endswith('?') else '; '}Known here: {', '.join(known)}" if known and tell else ""
    return f"unknown key{hint}{every}"


def _keys(annotation: Any) -> set[str]:
    return {name for model in _models(annotation) for name in model.model_fields}


def _nearest(value: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else ""


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)
