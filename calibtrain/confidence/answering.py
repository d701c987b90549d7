"""The model answers questions during training, each rank its share, and every rank gets all the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibtrain.calibration.metrics import summary_of
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.answered import Answered, OptionFeatures, ReplyTokens
from calibtrain.confidence.likelihood import answer_questions
from calibtrain.config import EvaluationConfig
from calibtrain.data.templates import Template
from calibtrain.distributed import World, all_agree, gather_lists, gather_rows, shard
from calibtrain.errors import UserError
from calibtrain.models.loss_model import AnswerFeatures
from calibtrain.records import Record

BATCHES_AT_ONCE = 64
"""Batches of a rank whose hidden states are in memory together where answers alone are asked for."""


@dataclass(frozen=True, slots=True)
class Answerer:
    """What answering needs beside the questions. `lockstep`: all ranks run the same forward passes, as ZeRO-3 must."""

    module: Any  # the LossModel that DeepSpeed wraps
    template: Template
    settings: EvaluationConfig
    world: World
    lockstep: bool = False

    def __call__(
        self,
        records: Sequence[Record],
        *,
        shots: Sequence[Record] = (),
        layers: tuple[int, ...] = (),
        on_batch: Callable[[int], None] = lambda questions_done: None,
    ) -> Answered:
        """Answers of all ranks to `records`, in their order, with all their hidden states, on every rank. Collective.

        For few questions: `share` and `answers` gather no states. layers: those of a confidence head, whose inputs then come
        with the answers.
        """
        return gather_answered(self.share(records, shots=shots, layers=layers, on_batch=on_batch), self.world)

    def answers(self, records: Sequence[Record]) -> list[Answer]:
        """The same answers alone, of however many questions: states are dropped as the answers are made. Collective."""
        return [answer for own in self._parts(records) for answer in gather_lists(own.answers)]

    def replies(self, records: Sequence[Record]) -> tuple[list[Answer], list[ReplyTokens]]:
        """The same, and what was generated for each; nothing where answers are chosen among options. Collective."""
        answers: list[Answer] = []
        replies: list[ReplyTokens] = []
        for own in self._parts(records):
            answers += gather_lists(own.answers)
            replies += gather_lists(list(own.replies or ()))
        return answers, replies

    def _parts(self, records: Sequence[Record]) -> Iterator[Answered]:
        """This rank's share of one part of the records after the other."""
        size = BATCHES_AT_ONCE * self.settings.batch_size * self.world.size
        for start in range(0, len(records), size):
            yield self.share(records[start : start + size])

    def share(
        self,
        records: Sequence[Record],
        *,
        shots: Sequence[Record] = (),
        layers: tuple[int, ...] = (),
        on_batch: Callable[[int], None] = lambda questions_done: None,
    ) -> Answered:
        """This rank's answers, with their states, to its `shard` of `records`. Collective."""
        mine = shard(records, self.world)
        asked = list(mine)
        if records and (not mine or (self.lockstep and len(mine) < -(-len(records) // self.world.size))):
            # A question more than its share, dropped below: ZeRO-3 needs as many batches on each rank, and without any
            # answer this rank would not know the shape of the hidden states that it gathers.
            asked.append(records[0])
        was_training = self.module.training
        self.module.eval()
        try:
            answered = answer_questions(
                self.module,
                self.template,
                asked,
                self.settings,
                shots=shots,
                device=self.world.device,
                all_done=self.all_done if self.lockstep else bool,
                share_prefix=not self.lockstep,
                layers=layers,
                on_batch=on_batch,
            )
        finally:
            self.module.train(was_training)
        self.settle()
        return take(answered, len(mine))

    def settle(self) -> None:
        """Raise UserError on every rank where a grade is missing on one. Collective."""
        problems: list[str] = []
        try:
            self.template.task.settle()
        except UserError as error:
            problems.append(str(error))
        if problems := gather_lists(problems):
            raise UserError(problems[0])

    def all_done(self, done: bool) -> bool:
        """Whether every rank is done. Collective."""
        return all_agree(done, self.world.device)


def answer_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """Calibration of graded answers' own confidence: the metrics of `calibtrain.calibration.metrics.summary_of`."""
    logprob = [min(0.0, answer.logprob) for answer in answers]
    return summary_of([answer.confidence for answer in answers], [bool(answer.correct) for answer in answers], logprob)


def take(answered: Answered, count: int) -> Answered:
    """The first `count` answers."""
    return answered.select(torch.arange(count))


def gather_answered(answered: Answered, world: World) -> Answered:
    """All ranks' answers, in rank order. Collective."""
    if world.size == 1:
        return answered
    answers: list[Answer] = gather_lists(answered.answers)
    options = answered.options
    if options is not None:
        owner = _gather_owners(options.owner, len(answered.answers), world)
        options = OptionFeatures(_gather_features(options.features, world), owner, options.mean)
    states, readings = (
        one if one is None else gather_rows(one, world.device) for one in (answered.states, answered.readings)
    )
    return Answered(answers, _gather_features(answered.features, world), options, None, states, readings)


def _gather_features(features: AnswerFeatures, world: World) -> AnswerFeatures:
    """All ranks' sequences, in rank order. Collective."""
    return AnswerFeatures(
        hidden=gather_rows(features.hidden, world.device),
        targets=gather_rows(features.targets, world.device),
        sequence_ids=_gather_owners(features.sequence_ids, features.correct.shape[0], world),
        correct=gather_rows(features.correct, world.device),
    )


def _gather_owners(owner: Tensor, count: int, world: World) -> Tensor:
    """Which of all ranks' owners each row belongs to, given which of this rank's `count`. Collective."""
    lengths = gather_rows(torch.bincount(owner, minlength=count), world.device)
    return torch.repeat_interleave(torch.arange(lengths.shape[0]), lengths)
