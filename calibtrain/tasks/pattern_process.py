"""Regular expressions of the user's on untrusted text, in a process of its own (`bounded`): `re` knows no time limit."""

from __future__ import annotations

import re

from calibtrain.tasks.bounded import Overdue, Worker, serve

LONGEST = 20_000
"""Characters of a text that are matched; of a longer one the last."""
SECONDS = 2.0
"""A pattern that takes longer on one text does not match it."""

_WORKER = Worker("pattern_process")


def matches_whole(pattern: str, text: str) -> bool:
    """Whether `pattern` is the whole of `text`; False for a text above LONGEST, and where that takes above SECONDS."""
    if len(text) > LONGEST:
        return False
    try:
        return bool(_WORKER.ask(["whole", pattern, text], SECONDS))
    except Overdue:
        return False


def last_group(pattern: str, text: str) -> tuple[int, int] | None:
    """Characters [start, stop) of the only group of the last match in `text`; None without one within SECONDS."""
    skipped = max(0, len(text) - LONGEST)
    try:
        found = _WORKER.ask(["last", pattern, text[skipped:]], SECONDS)
    except Overdue:
        return None
    return None if found is None else (found[0] + skipped, found[1] + skipped)


def _work(asked: list[str]) -> bool | tuple[int, int] | None:
    what, pattern, text = asked
    if what == "whole":
        return re.fullmatch(pattern, text) is not None
    found = None
    for match in re.finditer(pattern, text):
        if match[1] is not None:
            found = match.span(1)
    return found


if __name__ == "__main__":
    serve(_work)
