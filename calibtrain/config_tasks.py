"""The task in the config: what an answer is and when it is right, one section a kind (docs/tasks.md)."""

from __future__ import annotations

from typing import ClassVar, Literal

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


TaskConfig = ShortAnswerTask
"""Every kind; `kind` says which."""
