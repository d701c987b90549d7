"""Who says what a sampled answer earns: reward models, formats, functions of the user's, judges (docs/rewards.md)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

from calibtrain.config import RunConfig
from calibtrain.config_rewards import FormatSource, FunctionSource, JudgeSource, ModelSource, RewardSource
from calibtrain.config_tasks import JudgeTask
from calibtrain.data.reward_text import FILE, RewardText, read_reward_template
from calibtrain.data.templates import Template
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.models.arithmetic import torch_dtype
from calibtrain.models.reward_scorer import RewardScorer, reward_file, reward_tokenizer
from calibtrain.records import Record
from calibtrain.tasks.imported import described, load_function
from calibtrain.tasks.judge import Judge
from calibtrain.tasks.task import Reading, Task
from calibtrain.tasks.ungraded import one_line, place
from calibtrain.training.deepspeed_config import deepspeed_dict

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply as its readers see it, with its question."""

    record: Record
    text: str  # all that was said, without reasoning
    answer: (
        str  # without the confidence that it states, where that has a score of its own: no taste for it is paid twice
    )


class Source(Protocol):
    """What is asked of replies. Neither call raises on one rank alone: what is wrong is told by `problem`."""

    def __call__(self, replies: Sequence[Reply]) -> list[float]:
        """A number for each reply of this rank, NaN for none. Collective."""

    def problem(self) -> str | None:
        """What went wrong on this rank since the last call, in one line."""


class FormatReader:
    """Whether a reply has a form."""

    def __init__(self, config: FormatSource, task: Task) -> None:
        self.task = task
        self.pattern = None if config.pattern is None else re.compile(config.pattern)

    def __call__(self, replies: Sequence[Reply]) -> list[float]:
        """1 or 0."""
        if self.pattern is not None:
            return [float(self.pattern.search(one.text) is not None) for one in replies]
        return [float(self.task.read(one.answer, one.record).found) for one in replies]

    def problem(self) -> str | None:
        """None."""
        return None


class Function:
    """A function of the user's, of three lists: questions, replies, and what is known of each question."""

    def __init__(self, config: FunctionSource, key: str) -> None:
        self.what = f"{key} {config.function}"
        self.function: Callable[..., Any] = load_function(config.function, key)
        self._problem: str | None = None

    def __call__(self, replies: Sequence[Reply]) -> list[float]:
        """What the function gives; NaN everywhere where it fails."""
        nothing = [math.nan] * len(replies)
        if not replies:
            return nothing
        try:
            given = self.function(
                [one.record.question for one in replies],
                [one.text for one in replies],
                [described(one.record) for one in replies],
            )
            return self._numbers(given, replies)
        except UserError as error:
            self._problem = str(error)
        except Exception as error:  # whatever a function of the user's does
            where = place(replies[0].record)
            said = one_line(str(error), 120)
            self._problem = (
                f"{self.what} raises {type(error).__name__} ({said}), of {len(replies)} replies from {where} on"
            )
        return nothing

    def problem(self) -> str | None:
        """The last one, once."""
        found, self._problem = self._problem, None
        return found

    def _numbers(self, given: Any, replies: Sequence[Reply]) -> list[float]:
        values = given.tolist() if hasattr(given, "tolist") else given
        if not isinstance(values, list | tuple) or len(values) != len(replies):
            told = f"{len(values)} values" if isinstance(values, list | tuple) else type(values).__name__
            raise UserError(
                f"{self.what} returns {told} for {len(replies)} replies; return a list with a number for each"
            )
        for value, reply in zip(values, replies, strict=True):
            if value is not None and (not isinstance(value, Real) or math.isinf(value)):
                said = one_line(repr(value), 60)
                raise UserError(f"{self.what} returns {said} at {place(reply.record)}; return a finite number or None")
        return [math.nan if value is None else float(value) for value in values]


class JudgeReader:
    """A judge's verdict on whole replies."""

    def __init__(self, config: JudgeSource, key: str) -> None:
        self.judge = Judge(JudgeTask(kind="judge", judge=config.judge), key)

    def __call__(self, replies: Sequence[Reply]) -> list[float]:
        """1 or 0; NaN where a verdict cannot be read."""
        readings = [Reading(one.answer, 0, len(one.answer), found=bool(one.answer)) for one in replies]
        grades = self.judge.grades(readings, [one.record for one in replies])
        return [math.nan if grade.correct is None else float(grade.correct) for grade in grades]

    def problem(self) -> str | None:
        """Verdicts that are missing, or too many that cannot be read."""
        try:
            self.judge.settle()
        except UserError as error:
            return str(error)
        return None


class ModelReader:
    """A reward model's score of question and reply."""

    def __init__(self, config: ModelSource, key: str, run: RunConfig, world: World) -> None:
        zero = deepspeed_dict(run, world.size)["zero_optimization"] if run.training.zero_stage == 3 else None
        self.text = model_text(config, key)
        self.scorer = RewardScorer(config, key, torch_dtype(run.model), world, zero)
        self.key, self.told = key, not world.is_main
        self._problem: str | None = None

    def __call__(self, replies: Sequence[Reply]) -> list[float]:
        """Scores. Collective where the model is sharded."""
        sequences: list[list[int]] = []
        for one in replies:
            try:
                ids, cut = self.text(one.record, one.answer, self.scorer.room)
            except UserError as error:
                self._problem, ids, cut = f"{self.key}: {error}", [0], False
            sequences.append(ids)
            if cut and not self.told:
                self.told = True
                logger.warning(
                    "%s: %s with its reply is longer than %d tokens; of such questions the reward model reads the end",
                    self.key,
                    place(one.record),
                    self.scorer.room,
                )
        scores = self.scorer(sequences)
        if lost := sum(not math.isfinite(one) for one in scores):
            self._problem = (
                f"{self.key}: {lost} of {len(scores)} scores are not finite numbers: it overflows in model.dtype"
            )
        return scores

    def problem(self) -> str | None:
        """A question that its chat template refuses, or scores that are no numbers."""
        found, self._problem = self._problem, None
        return found


def model_text(config: ModelSource, key: str) -> RewardText:
    """How a reward model reads. Raises UserError where it has no tokenizer, or none for the template of its training."""
    return RewardText(reward_tokenizer(config, key), read_reward_template(reward_file(config, FILE)))


def source_key(run: RunConfig, index: int) -> str:
    """The config key of a source's own key, for messages."""
    if run.rollouts.sources is None:
        return "rollouts.reward_model"
    kind = run.rollouts.sources[index].kind
    return f"rollouts.sources.{index}." + {"model": "path"}.get(kind, kind)


def models_of(run: RunConfig) -> list[tuple[str, ModelSource]]:
    """(config key, source) of each reward model of the run."""
    sources = enumerate(run.rollouts.paid_by)
    return [(source_key(run, index), one) for index, one in sources if isinstance(one, ModelSource)]


def source_names(sources: Sequence[RewardSource]) -> list[str]:
    """A name for each source's numbers: its kind, with its place among several of the kind."""
    kinds = [one.kind for one in sources]
    return [
        kind if kinds.count(kind) == 1 else f"{kind}_{kinds[: place + 1].count(kind)}"
        for place, kind in enumerate(kinds)
    ]


def build_sources(run: RunConfig, template: Template, world: World) -> list[Source]:
    """Those sources of the run that are asked, in its order. Collective: a reward model may be sharded."""
    built: list[Source] = []
    for index, config in enumerate(run.rollouts.paid_by):
        key = source_key(run, index)
        if isinstance(config, ModelSource):
            built.append(ModelReader(config, key, run, world))
        elif isinstance(config, FormatSource):
            built.append(FormatReader(config, template.task))
        elif isinstance(config, FunctionSource):
            built.append(Function(config, key))
        elif isinstance(config, JudgeSource):
            built.append(JudgeReader(config, key))
    return built


def check_sources(run: RunConfig, questions: Sequence[Record]) -> None:
    """Raise UserError, before any model is loaded, for a source that could not be asked of these questions."""
    for index, config in enumerate(run.rollouts.paid_by):
        key = source_key(run, index)
        if isinstance(config, ModelSource):
            text = model_text(config, key)
            for record in questions[:8]:
                text(record, "This one", config.max_length)
        elif isinstance(config, FunctionSource):
            Function(config, key)
        elif isinstance(config, JudgeSource):
            judge = Judge(JudgeTask(kind="judge", judge=config.judge), key)
            judge.ready(questions)
