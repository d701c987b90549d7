"""Lines of the files we read and write."""

from __future__ import annotations


def lines_of(text: str) -> list[str]:
    r"""Lines ended by "\n" alone, without it; the last need not be ended.

    str.splitlines also breaks at U+2028, U+0085, form feeds and more, which JSON strings may hold as they are.
    """
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]
