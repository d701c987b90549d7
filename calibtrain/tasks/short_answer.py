"""A few words, compared with the accepted answers: as a whole, as words within, by a pattern, or by their overlap."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from calibtrain.config_tasks import ShortAnswerTask
from calibtrain.errors import UserError
from calibtrain.records import Record
from calibtrain.tasks.matching import grade, normalize, without_thinking
from calibtrain.tasks.pattern_process import matches_whole
from calibtrain.tasks.task import Task

ARTICLES = frozenset(("a", "an", "the"))


class ShortAnswer(Task):
    """Right is what matches one of the accepted answers by `match`."""

    def __init__(self, config: ShortAnswerTask | None = None) -> None:
        self.config = config or ShortAnswerTask()
        self.several_lines = self.config.lines == "many"

    def asked(self, record: Record) -> Record:
        """The record as it is. Raises UserError for an accepted answer that is no pattern where patterns are wanted."""
        for pattern in record.accepted if self.config.match == "regex" else ():
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(
                    f"{record.origin or record.question}: the accepted answer {pattern!r} is no regular expression "
                    f"({error}); mend it, or set another task.match"
                ) from error
        return record

    def identity(self) -> Any:
        """None as it is by default, as it was before there were other kinds."""
        return None if self.config == ShortAnswerTask() else super().identity()

    def right(self, text: str, record: Record) -> bool:
        """Whether `text` matches one of the accepted answers; an empty one never does."""
        match = self.config.match
        if match == "normalized_match" or match == "exact_match":
            return grade(text, record.accepted, match)
        answer = without_thinking(text).strip()
        if match == "regex":
            return bool(answer) and any(matches_whole(pattern, answer) for pattern in record.accepted)
        if match == "contains":
            return any(contains(answer, without_thinking(one)) for one in record.accepted)
        bound = self.config.f1 or 1.0
        return any(token_f1(answer, without_thinking(one)) >= bound for one in record.accepted)


def contains(text: str, accepted: str) -> bool:
    """Whether the words of `accepted` stand in a row in `text`, both normalised; an empty one never does."""
    wanted = normalize(accepted)
    return bool(wanted) and f" {wanted} " in f" {normalize(text)} "


def token_f1(text: str, accepted: str) -> float:
    """F1 of the words of two texts, each as often as it stands there, without articles; 0 where either has none.

    SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250), on this house's normalisation: a hyphen parts two words, and 3.5 keeps
    its point.
    """
    said, wanted = (
        Counter(word for word in normalize(one).split() if word not in ARTICLES) for one in (text, accepted)
    )
    common = (said & wanted).total()
    return 2.0 * common / (said.total() + wanted.total()) if common else 0.0


SHORT_ANSWER = ShortAnswer()
"""As the config has it by default."""
