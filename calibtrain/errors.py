"""What ends a command in order: a mistake that a user can mend (exit code 2), a run that was asked to stop (75)."""

from __future__ import annotations

from typing import Any

LINE_LENGTH = 1000
"""Characters of a line of a message; what a file holds may be longer."""


class UserError(Exception):
    """A mistake in a config, a file or a call; the message names the place and says how to mend it."""


class Unreachable(UserError):
    """A server that does not answer, or not yet: what was asked of it may be asked again once it does."""


class EngineFailure(UserError):
    """What samples, grades or rewards for a training run is lost; the same on every rank, so that what was learnt can be
    kept.
    """


PREEMPTED = 75
"""Exit code of a run that stopped as it was asked to: EX_TEMPFAIL, try again."""


class Preempted(Exception):
    """The run was asked to stop (SIGTERM) after `step` and has kept its state; the message says how to go on."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


def printable(text: str) -> str:
    """The text for a message: what cannot be written as UTF-8 is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def short(value: Any) -> str:
    """The value's repr, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def told(message: str) -> str:
    """A message as it is shown: no line beyond LINE_LENGTH, and nothing in it that a terminal would obey."""
    lines = []
    for line in printable(message).split("\n"):
        cut = (
            line
            if len(line) <= LINE_LENGTH
            else f"{line[:LINE_LENGTH]} ... ({len(line) - LINE_LENGTH} more characters)"
        )
        lines.append("".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in cut))
    return "\n".join(lines)
