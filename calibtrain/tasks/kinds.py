"""Every kind of task by its section of the config. A new kind is a section, a file, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from calibtrain.config_tasks import (
    ChoiceTask,
    ClaimsTask,
    CustomTask,
    JsonTask,
    JudgeTask,
    LabelTask,
    MathTask,
    NumberTask,
    ShortAnswerTask,
)
from calibtrain.tasks.choice import Choice
from calibtrain.tasks.claims import Claims
from calibtrain.tasks.custom import Custom
from calibtrain.tasks.json_answer import JsonAnswer
from calibtrain.tasks.judge import Judge
from calibtrain.tasks.label import Label
from calibtrain.tasks.math import Math
from calibtrain.tasks.number import Number
from calibtrain.tasks.short_answer import ShortAnswer
from calibtrain.tasks.task import Task

KINDS: dict[type[Any], Callable[[Any], Task]] = {
    ShortAnswerTask: ShortAnswer,
    ChoiceTask: Choice,
    LabelTask: Label,
    NumberTask: Number,
    MathTask: Math,
    JsonTask: JsonAnswer,
    ClaimsTask: Claims,
    CustomTask: Custom,
    JudgeTask: Judge,
}


def task_of(config: object) -> Task:
    """The task of a config's `task` section. Raises UserError where what it names cannot be had."""
    return KINDS[type(config)](config)
