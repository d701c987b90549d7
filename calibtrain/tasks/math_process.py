"""Whether two mathematical expressions are equal, by math-verify, in a process of its own (`bounded`).

math-verify bounds its time by SIGALRM, which fails outside a main thread and does not interrupt large integers; here the
process is ended instead. Only LaTeX is parsed, by a grammar: its parser of bare expressions is sympy's, which evaluates them
as Python.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

from calibtrain.tasks.bounded import Overdue, Worker, serve

LONGEST = 400
"""Characters of an expression; longer ones are equal where they are the same text."""
MEMORY = 2 << 30

_WORKER = Worker("math_process")


@lru_cache(maxsize=4096)
def equal(gold: str, answer: str, seconds: float) -> bool:
    """Whether `answer` is `gold`; False where that cannot be told within `seconds`. UserError without math-verify."""
    if max(len(gold), len(answer)) > LONGEST:
        return False
    try:
        return bool(_WORKER.ask([gold, answer], seconds))
    except Overdue:
        return False


def _parsed(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    inner = text.strip().strip("$").strip()
    return list(
        parse(f"\\boxed{{{inner}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)  # type: ignore[arg-type]
    )


def _work(asked: list[str]) -> bool:
    from math_verify import verify

    gold, answer = asked
    return bool(verify(_parsed(gold), _parsed(answer), timeout_seconds=None))  # type: ignore[arg-type]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _work(["1", "1"])  # its grammar is loaded before the clock runs
    serve(_work, memory=MEMORY)
