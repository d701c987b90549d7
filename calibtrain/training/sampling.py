"""How the answers of a round come about: the policy is asked, its replies are read and graded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from calibtrain.confidence.answering import Answerer
from calibtrain.confidence.generation import Generation, generate, keep_none
from calibtrain.confidence.stated import read_stated_reply
from calibtrain.config import RunConfig
from calibtrain.data.encode import fit_prompt
from calibtrain.data.replies import read_reply
from calibtrain.errors import UserError
from calibtrain.records import Record, unit_hash
from calibtrain.tasks.matching import normalize
from calibtrain.tasks.task import Reading
from calibtrain.training.samples import Sample


class Sampling:
    """Asks the policy the training questions; what a rank draws is a pure function of (seed, step, rank) and the weights."""

    def __init__(self, config: RunConfig, answerer: Answerer, questions: Sequence[Record]) -> None:
        self.config, self.answerer, self.questions = config, answerer, questions
        room = config.data.max_length - config.evaluation.max_new_tokens
        if room < 1:
            raise UserError(
                f"evaluation.max_new_tokens: {config.evaluation.max_new_tokens} leaves no room for a question in "
                f"data.max_length: {config.data.max_length}"
            )
        self.prompts = [tuple(fit_prompt(one, answerer.template, room)[0]) for one in self.questions]

    def __call__(self, asked: Sequence[int], step: int) -> list[Sample]:
        """A group of graded samples for each of this rank's questions at `asked`, in their order. Collective."""
        groups = self._replies(asked, step)
        read = [self._sample(i, one) for i, group in zip(asked, groups, strict=True) for one in group]
        records = [self.questions[sample.question] for sample, _ in read]
        grades = self.answerer.template.task.grades([reading for _, reading in read], records)
        self.answerer.settle()  # a reward that is missing is none
        return [replace(one, correct=float(bool(grade.correct))) for (one, _), grade in zip(read, grades, strict=True)]

    def _replies(self, asked: Sequence[int], step: int) -> list[list[Generation]]:
        answerer, evaluation = self.answerer, self.config.evaluation
        lockstep = answerer.lockstep
        return generate(
            answerer.module,
            [self.prompts[i] for i in asked],
            stop_ids=answerer.template.stop_ids,
            goes_on=answerer.template.goes_on,
            pad_id=answerer.template.pad_id,
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=max(1, evaluation.batch_size // self.config.rollouts.group_size),
            samples=self.config.rollouts.group_size,
            seed=int(unit_hash("rollouts", self.config.seed, step, answerer.world.rank) * 2**53),
            device=answerer.world.device,
            all_done=answerer.all_done if lockstep else bool,
            share_prefix=not lockstep,
            keep=keep_none,
        )

    def _sample(self, index: int, generation: Generation) -> tuple[Sample, Reading]:
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
        )
        return sample, reading
