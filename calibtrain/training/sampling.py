"""How the answers of a round come about: the policy is asked, its replies are read and graded."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from calibtrain.confidence.answering import Answerer
from calibtrain.confidence.stated import read_statement, statement_tokens
from calibtrain.config import RunConfig
from calibtrain.data.encode import fit_prompt
from calibtrain.data.replies import read_reply
from calibtrain.distributed import gather_lists
from calibtrain.engines import Completion, Draws, SamplingEngine
from calibtrain.errors import UserError
from calibtrain.records import Record, unit_hash
from calibtrain.tasks.matching import normalize
from calibtrain.tasks.task import Reading
from calibtrain.training.own_sampling import OwnSampling
from calibtrain.training.samples import Sample
from calibtrain.training.served_sampling import ServedSampling
from calibtrain.training.weight_proof import PROBES

logger = logging.getLogger(__name__)


class Sampling:
    """Asks the policy the training questions.

    What is drawn is a pure function of (seed, step, place in the round) and the weights, however questions are divided into
    ranks. Raises UserError where a question has no room, or the engine is not at hand.
    """

    def __init__(self, config: RunConfig, answerer: Answerer, questions: Sequence[Record]) -> None:
        self.config, self.answerer, self.questions = config, answerer, questions
        room = config.data.max_length - config.evaluation.max_new_tokens
        if room < 1:
            raise UserError(
                f"evaluation.max_new_tokens: {config.evaluation.max_new_tokens} leaves no room for a question in "
                f"data.max_length: {config.data.max_length}"
            )
        self.prompts = [tuple(fit_prompt(one, answerer.template, room)[0]) for one in self.questions]
        self.engine = self._engine()
        self._following: tuple[list[int], int] | None = None  # questions that are drawn ahead, and their step

    def __call__(self, asked: Sequence[int], step: int) -> list[Sample]:
        """A group of graded samples for each of this rank's questions at `asked`, in their order. Collective."""
        groups = self.engine.sample(self._draws(asked, step), step)
        self._following = None
        read = [self._sample(i, one) for i, group in zip(asked, groups, strict=True) for one in group]
        records = [self.questions[sample.question] for sample, _ in read]
        grades = self.answerer.template.task.grades([reading for _, reading in read], records)
        self.answerer.settle()  # a reward that is missing is none
        return [replace(one, correct=float(bool(grade.correct))) for (one, _), grade in zip(read, grades, strict=True)]

    def draw_ahead(self, asked: Sequence[int], following: int, step: int) -> None:
        """Begin to draw this rank's share of the round at step `following`, by the weights of `step`, while others train on
        what was drawn. As the last thing of a round's sampling. Collective.
        """
        self._following = list(asked), following
        self.engine.push(step)
        self.engine.start(self._draws(asked, following))

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
        return told | {"asked": self._following[0], "step": self._following[1], "version": started[0], "groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint holds of answers drawn ahead. Collective."""
        # Of every rank, or the places of the others' questions are not known.
        draws = self._draws(state.get("asked", []), state.get("step", 0))
        self.engine.metrics |= state.get("metrics", {})
        if "asked" not in state:
            return
        self._following = state["asked"], state["step"]
        groups = [[Completion(**{**one, **_tuples(one)}) for one in group] for group in state["groups"]]
        self.engine.restore(draws, state["version"], groups)

    def close(self) -> None:
        """End what the engine has started. Local."""
        self.engine.close()

    def _engine(self) -> SamplingEngine:
        if self.config.rollouts.engine.kind == "own":
            return OwnSampling(
                self.answerer, max(1, self.config.evaluation.batch_size // self.config.rollouts.group_size)
            )
        if self.config.rollouts.engine.overlap and self.answerer.world.is_main:
            logger.info("rollouts: each round but the first is sampled by the weights of the round before (overlap)")
        encode, longest = self.answerer.template.tokenizer.encode, self.config.data.max_length - 1
        texts = [
            (*prompt, *encode(one.accepted[0] if one.accepted else "", add_special_tokens=False))[:longest]
            for prompt, one in zip(self.prompts[:PROBES], self.questions, strict=False)
        ]
        return ServedSampling(self.config, self.answerer, texts, self.prompts[:PROBES])

    def _draws(self, asked: Sequence[int], step: int) -> Draws:
        """What this rank asks for. Collective: the place of a question in the round counts those of the ranks before."""
        shares, template = gather_lists([len(asked)]), self.answerer.template
        first, seed = sum(shares[: self.answerer.world.rank]), self.config.seed
        return Draws(
            prompts=[self.prompts[i] for i in asked],
            seeds=[int(unit_hash("rollouts", seed, step, first + place) * 2**31) for place in range(len(asked))],
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
            statement = read_statement(reply.text)
            whole = statement.answer
            reading = task.read(whole, record)
            confidence = math.nan if statement.confidence is None else statement.confidence
            stated = statement_tokens(generation.tokens, template.decode_answer)
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
