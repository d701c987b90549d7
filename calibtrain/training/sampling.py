"""How the answers of a round come about: the policy is asked, its replies are read and graded."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from calibtrain.confidence.answering import Answerer
from calibtrain.confidence.stated import read_stated_reply
from calibtrain.config import RunConfig
from calibtrain.data.encode import fit_prompt
from calibtrain.data.replies import read_reply
from calibtrain.engines import Completion, Draws, SamplingEngine
from calibtrain.errors import EngineFailure, UserError
from calibtrain.records import Record, unit_hash
from calibtrain.tasks.matching import normalize
from calibtrain.tasks.task import Reading
from calibtrain.training.own_sampling import OwnSampling
from calibtrain.training.samples import Sample
from calibtrain.training.served_sampling import ServedSampling
from calibtrain.training.weight_proof import PROBES

logger = logging.getLogger(__name__)


def room_of_questions(config: RunConfig) -> int:
    """Most tokens of a question whose answers are sampled. Raises UserError where none are left."""
    room = config.data.max_length - config.evaluation.max_new_tokens
    if room < 1:
        raise UserError(
            f"evaluation.max_new_tokens: {config.evaluation.max_new_tokens} leaves no room for a question in "
            f"data.max_length: {config.data.max_length}"
        )
    return room


class Sampling:
    """Asks the policy the training questions; what it draws is a function of (seed, step, stream) and the weights alone.

    `engine`: who draws, in the place of the config's. Raises UserError where a question has no room, or the engine is not at
    hand.
    """

    def __init__(
        self,
        config: RunConfig,
        answerer: Answerer,
        questions: Sequence[Record],
        engine: SamplingEngine | None = None,
    ) -> None:
        self.config, self.answerer, self.questions = config, answerer, questions
        room = room_of_questions(config)
        self.prompts = [tuple(fit_prompt(one, answerer.template, room)[0]) for one in self.questions]
        self.engine = self._engine() if engine is None else engine
        self._following: tuple[list[int], list[str], int] | None = None  # what is drawn ahead: questions, streams, step

    def __call__(self, asked: Sequence[int], step: int, streams: Sequence[str]) -> list[Sample]:
        """A group of graded samples for each of this rank's questions at `asked`, in their order. Collective.

        `streams` name what is drawn for each of them, so that it does not depend on which rank asks it beside which others.
        """
        groups = self.engine.sample(self._draws(asked, streams, step), step)
        self._following = None
        read = [self._sample(i, one) for i, group in zip(asked, groups, strict=True) for one in group]
        records = [self.questions[sample.question] for sample, _ in read]
        grades = self.answerer.template.task.grades([reading for _, reading in read], records)
        self._settle()
        return [
            # A verdict that cannot be read is no reward; of a question without answers nobody knows.
            replace(one, correct=float(bool(grade.correct)) if self._gradable(record) else math.nan)
            for (one, _), grade, record in zip(read, grades, records, strict=True)
        ]

    def draw_ahead(self, asked: Sequence[int], streams: Sequence[str], step: int, *, version: int) -> None:
        """Begin to draw what `step` will ask for, by the weights of this version, while they are trained on. Collective."""
        self._following = list(asked), list(streams), step
        self.engine.push(version)
        self.engine.start(self._draws(*self._following))

    def _settle(self) -> None:
        """Raise EngineFailure, on every rank, where a grade is missing: a reward that is missing is none. Collective."""
        try:
            self.answerer.settle()
        except UserError as error:
            raise EngineFailure(str(error)) from None

    def _gradable(self, record: Record) -> bool:
        return self.answerer.template.task.gradable(record)

    @property
    def metrics(self) -> dict[str, float]:
        """Of the engine, in the last round; empty where the training processes sample themselves."""
        return self.engine.metrics

    def state_dict(self) -> dict[str, Any]:
        """JSON values of what is drawn ahead, which is waited for: a resume trains on the very same answers. Local."""
        started, told = self.engine.started(), {"metrics": self.metrics} if self.metrics else {}
        if started is None or self._following is None:
            return told
        groups = [[asdict(one) for one in group] for group in started[1]]
        asked, streams, step = self._following
        return told | {"asked": asked, "streams": streams, "step": step, "version": started[0], "groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint holds of answers drawn ahead."""
        self.engine.metrics |= state.get("metrics", {})
        if "asked" not in state:
            return
        self._following = state["asked"], state["streams"], state["step"]
        groups = [[Completion(**{**one, **_tuples(one)}) for one in group] for group in state["groups"]]
        self.engine.restore(self._draws(*self._following), state["version"], groups)

    def close(self) -> None:
        """End what the engine has started. Local."""
        self.engine.close()

    def _engine(self) -> SamplingEngine:
        if self.config.rollouts.engine.kind == "own":
            return OwnSampling(self.answerer)
        if self.config.rollouts.engine.overlap and self.answerer.world.is_main:
            logger.info("rollouts: each round but the first is sampled by the weights of the round before (overlap)")
        encode, longest = self.answerer.template.tokenizer.encode, self.config.data.max_length - 1
        texts = [
            (*prompt, *encode(one.accepted[0] if one.accepted else "", add_special_tokens=False))[:longest]
            for prompt, one in zip(self.prompts[:PROBES], self.questions, strict=False)
        ]
        return ServedSampling(self.config, self.answerer, texts, self.prompts[:PROBES])

    def _draws(self, asked: Sequence[int], streams: Sequence[str], step: int) -> Draws:
        template, seed = self.answerer.template, self.config.seed
        return Draws(
            prompts=[self.prompts[i] for i in asked],
            seeds=[int(unit_hash("rollouts", seed, step, stream) * 2**31) for stream in streams],
            samples=self.config.rollouts.group_size,
            stop_ids=template.stop_ids,
            max_new_tokens=self.config.evaluation.max_new_tokens,
            goes_on=template.goes_on,
        )

    def _sample(self, index: int, generation: Completion) -> tuple[Sample, Reading]:
        """A sample that is not graded yet, and what it is graded by."""
        template, rollouts, record = self.answerer.template, self.config.rollouts, self.questions[index]
        task, reply = template.task, read_reply(template, generation.tokens, record)
        reading, (start, stop) = reply.reading, reply.span
        confidence = math.exp(min(0.0, math.fsum(generation.logprobs[i] for i in reply.read)))
        stated: tuple[bool, ...] = ()
        whole = reply.text
        if rollouts.confidence == "stated":
            found = read_stated_reply(template, generation.tokens, record, finished=generation.finished)
            whole, reading, (start, stop), stated = found.text, found.reading, found.span, found.stated
            confidence = math.nan if found.confidence is None else found.confidence
        said = task.key(reading.text, record)
        sample = Sample(
            question=index,
            tokens=generation.tokens,
            correct=math.nan,
            confidence=confidence,
            abstained=rollouts.reward == "ternary"
            and any(
                said == task.key(one, record) or normalize(whole) == normalize(one) for one in rollouts.abstentions
            ),
            answer_start=start,
            answer_stop=None if stop == len(generation.tokens) else stop,
            finished=generation.finished,
            sampled_logprobs=generation.logprobs,
            stated=stated,
            version=generation.version,
        )
        return sample, reading


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Of JSON values those that are lists, as tuples."""
    return {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
