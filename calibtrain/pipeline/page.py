"""What the pages written by a job share: one template environment, how a number is written, a file whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calibtrain.abstention.words import percent
from calibtrain.errors import UserError


def render(template: str, context: dict[str, Any], **filters: Callable[..., Any]) -> str:
    """A page of `templates/` as text. All values are escaped: names, questions and configs are other people's text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("calibtrain.pipeline", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(share=share, number=number, percent=percent, **filters)
    return environment.get_template(template).render(**context)


def write(path: Path, html: str) -> Path:
    """Write a page whole or not at all. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)
    return path


def share(value: float | None, digits: int = 1) -> str:
    """0.123 as "12.3%"; a dash for None and what is not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%".replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """0.1234 as "0.123"; a dash for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def read_content(path: Path, known: int, again: str) -> dict[str, Any]:
    """A JSON object of the format that is `known`; else UserError, which ends with `again`: how to make it anew."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {again}") from error
    if not isinstance(content, dict) or content.get("format") != known:
        raise UserError(f"{path}: not of format {known}, which this version reads; {again}")
    return content
