"""The task in the config: what an answer is and when it is right, one section a kind (docs/tasks.md)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from calibtrain.config_base import Section


class TaskSection(Section):
    """Base of the kinds."""

    TOKENS: ClassVar[int] = 12
    """evaluation.max_new_tokens where the config does not say it."""


class ShortAnswerTask(TaskSection):
    """A few words on one line, compared as a whole with the accepted answers."""

    kind: Literal["short_answer"] = "short_answer"
    match: Literal["normalized_match", "exact_match"] = "normalized_match"
    """`normalized_match` ignores case, accents, punctuation and a leading "the"."""


with warnings.catch_warnings():
    # `schema` is what people call it; pydantic's own of that name is deprecated and used nowhere here.
    warnings.filterwarnings("ignore", message='Field name "schema"')

    class JsonTask(TaskSection):
        """JSON of a schema, or a tool call: each of its values is right or wrong by itself, and has its own confidence."""

        TOKENS: ClassVar[int] = 128
        kind: Literal["json"]
        schema: dict[str, Any] | None = None  # type: ignore[assignment]
        """JSON Schema (2020-12) of an answer, or with `tool` of a call's arguments; its references stay within it."""
        schema_file: Path | None = None
        """File that holds the schema, in its place."""
        match: Literal["normalized_match", "exact_match"] = "normalized_match"
        """How texts are compared; numbers are compared as numbers, and nothing else is equal to a number."""
        compare: tuple[str, ...] | None = None
        """Fields that decide whether an answer is right, as `name` or `address.city`, `stops[].name`; null: all of them."""
        unordered: tuple[str, ...] = ()
        """Arrays whose order does not matter, as `tags` or `stops[].tags`."""
        tool: bool = False
        """Whether an answer calls a tool: {"name": ..., "arguments": {...}}, alone or within <tool_call>."""
        tools: str = "tools"
        """With `tool`: the column, one of data.source.columns.fields, that may hold a question's tool definitions."""

        @model_validator(mode="after")
        def _one_schema(self) -> JsonTask:
            if self.schema is not None and self.schema_file is not None:
                raise ValueError("schema and schema_file exclude each other; leave one of them out")
            if self.schema is None and self.schema_file is None and not self.tool:
                raise ValueError(
                    "kind: json needs a schema: write it under `schema`, or name its file as `schema_file`"
                )
            return self


class ClaimsTask(TaskSection):
    """A paragraph of claims, each right or wrong by itself; those in doubt are withheld one by one."""

    TOKENS: ClassVar[int] = 192
    kind: Literal["claims"]
    split: str = "sentences"
    """`sentences`, or `package.module:function`: text -> list of str, pieces of the text in its order."""
    match: Literal["normalized_match", "exact_match"] = "normalized_match"
    """How a claim is compared with the sentences of the accepted answers, one of which it must be as a whole."""
    grader: str | None = None
    """`package.module:function` in place of `match`: (claim, record as a mapping) -> True, False, or None for unknown."""


TaskConfig = Annotated[ShortAnswerTask | JsonTask | ClaimsTask, Field(discriminator="kind")]
"""Every kind; `kind` says which."""
