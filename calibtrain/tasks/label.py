"""Classification: the reply is one of a fixed set of class names."""

from __future__ import annotations

from calibtrain.config_tasks import LabelTask
from calibtrain.errors import UserError
from calibtrain.records import Record
from calibtrain.tasks.options import OptionsTask, said_option, with_line, with_replies


class Label(OptionsTask):
    """Every question may be put the same line that names the classes."""

    options_are = "classes"

    def __init__(self, config: LabelTask) -> None:
        self.config = config
        super().__init__(config.answer_by, config.score)
        self.labels = config.labels
        # Not format(): an instruction may hold other braces.
        self.line = (config.instruction or "").strip().replace("{labels}", ", ".join(self.labels))
        self.mark = (config.kind, config.answer_by, config.score, self.line, *self.labels)

    def asked(self, record: Record) -> Record:
        """With the line that names the classes, and the right one as it names it."""
        found = with_replies(record, lambda said: self._label(said, record))
        if not self.line or record.question.endswith("\n" + self.line):
            return found
        return with_line(found, self.line)

    def choices(self, record: Record) -> tuple[str, ...]:
        """The class names."""
        return self.labels

    def _label(self, said: str, record: Record) -> str:
        label = said_option(said, self.labels)
        if label is None:
            place = record.origin or record.question
            raise UserError(f"{place}: the answer {said!r} is none of task.labels: {', '.join(self.labels)}")
        return label
