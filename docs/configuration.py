"""Write docs/configuration.md from the config tree: `python docs/configuration.py`. A test fails when it is stale."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from calibtrain.config import RunConfig

HEAD = """# Configuration

Every key of a config file, with its default. Made from `calibtrain/config.py` by `python docs/configuration.py`.

Keys may be changed on the command line: `training.epochs=2`, `penalties.0.weight=0.5`, `objective={name: sft}`.
Values are YAML. An unknown key is an error. Files that a config reads count from the YAML file, or from the working
directory when they are named on the command line; `output_dir` and `training.resume` always count from the latter.
"""


def sections(annotation: Any) -> list[type[BaseModel]]:
    """Config sections inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in sections(argument)]


def kind(annotation: Any) -> str:
    """A type in words a person reads."""
    if get_origin(annotation) is Annotated:
        return kind(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(argument) for argument in get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"list of {kind(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Path: "path"}
    return "section" if sections(annotation) else names[annotation]


def rows(model: type[BaseModel]) -> list[str]:
    """One table row a field."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        limits = [
            f"{sign} {value:g}"
            for item in field.metadata
            for key, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
            if (value := getattr(item, key, None)) is not None
        ]
        default = field.default
        if default is PydanticUndefined:
            shown = "required"
        elif isinstance(default, BaseModel):
            shown = next((f"`{getattr(default, tag)}`" for tag in ("name", "kind") if tag in type(default).model_fields
                          and len(sections(field.annotation)) > 1), "")  # fmt: skip
        else:
            shown = f"`{'null' if default is None else list(default) if isinstance(default, tuple) else default}`"
        values = " ".join([kind(field.annotation), *limits]).replace("|", "\\|")
        meaning = (field.description or "").replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{name}` | {values} | {shown} | {meaning} |")
    return lines


def render() -> str:
    """The whole page."""
    parts = [HEAD]

    def add(model: type[BaseModel], path: str) -> None:
        tag = next((get_args(f.annotation)[0] for n, f in model.model_fields.items()
                    if n in ("name", "kind") and get_origin(f.annotation) is Literal), None)  # fmt: skip
        title = f"`{path}`" + (f": {tag}" if tag else "") if path else "The top"
        parts.append("\n".join([f"## {title}", "", (model.__doc__ or "").strip(), "", *rows(model), ""]))
        for name, field in model.model_fields.items():
            for inner in sections(field.annotation):
                add(inner, f"{path}.{name}".lstrip("."))

    add(RunConfig, "")
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "configuration.md").write_text(
        render(), "utf-8"
    )
