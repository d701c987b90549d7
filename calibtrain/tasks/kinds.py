"""Every kind of task by its section of the config. A new kind is a section, a file, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from calibtrain.config_tasks import CustomTask, JudgeTask, ShortAnswerTask
from calibtrain.tasks.custom import Custom
from calibtrain.tasks.judge import Judge
from calibtrain.tasks.short_answer import ShortAnswer
from calibtrain.tasks.task import Task

KINDS: dict[type[Any], Callable[[Any], Task]] = {
    ShortAnswerTask: ShortAnswer,
    CustomTask: Custom,
    JudgeTask: Judge,
}


def task_of(config: object) -> Task:
    """The task of a config's `task` section. Raises UserError where what it names cannot be had."""
    return KINDS[type(config)](config)
