"""A few words on one line, compared as a whole with the accepted answers."""

from __future__ import annotations

from calibtrain.config_tasks import ShortAnswerTask
from calibtrain.records import Record
from calibtrain.tasks.matching import grade
from calibtrain.tasks.task import Task


class ShortAnswer(Task):
    """Right is what matches one of the accepted answers by `match`."""

    def __init__(self, config: ShortAnswerTask | None = None) -> None:
        self.config = config or ShortAnswerTask()

    def right(self, text: str, record: Record) -> bool:
        """Whether `text` is one of the accepted answers, as a whole."""
        return grade(text, record.accepted, self.config.match)


SHORT_ANSWER = ShortAnswer()
"""As the config has it by default."""
