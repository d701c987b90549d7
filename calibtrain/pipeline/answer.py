"""A finished run at work: questions in, answers with their calibrated probability and word out, or abstentions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibtrain.abstention.words import Scale, percent, phrase, scale_of, word_for
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.outside import Outside
from calibtrain.confidence.scorer import Scorer, before_answering
from calibtrain.confidence.source import Cost
from calibtrain.errors import UserError
from calibtrain.pipeline.answer_parts import part_probabilities
from calibtrain.pipeline.calibration_file import (
    LIKELIHOOD,
    Calibrated,
    read_calibration,
    served_source,
    weights_hash,
)
from calibtrain.pipeline.confidence import asker_of
from calibtrain.pipeline.engine import load_served
from calibtrain.pipeline.evaluate import Answering, Loaded
from calibtrain.pipeline.outside import read as read_outside
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.pipeline.promise import UNLIKE, Level, Promises
from calibtrain.pipeline.question import Asked, Question, check_text, question_of, record_of
from calibtrain.pipeline.reply import Reply, ReplyPart, Token
from calibtrain.pipeline.scope import at_least, at_most, plain
from calibtrain.pipeline.source import check_calibrated, load_scorer
from calibtrain.records import Message, Record


class Answerer:
    """The model and calibration of a finished run; `scorer` where the confidence is not the answer's likelihood.

    loaded: the run's model, or the server of one (without `scorer` and `outside`, which read hidden states). outside: what
    tells questions unlike the graded ones.
    uncertified: without a certificate answer everything instead of nothing; whoever runs the model decides that.
    """

    def __init__(
        self,
        loaded: Answering,
        calibrated: Calibrated,
        scorer: Scorer | None = None,
        *,
        outside: Outside | None = None,
        uncertified: bool = False,
    ) -> None:
        self.loaded = loaded
        self.calibrated = calibrated
        loaded.graded = False
        self.scorer = scorer
        self.outside = outside
        self.uncertified = uncertified
        self.shapes = calibrated.shapes
        self.source = LIKELIHOOD if scorer is None else scorer.name
        self.promises = Promises(calibrated, uncertified=uncertified)
        self.default = self.promises.default
        self.control_tokens = loaded.template.control_tokens
        self.max_new_tokens: int = loaded.config.evaluation.max_new_tokens
        self.scale: Scale = scale_of(loaded.config.abstention.words)

    def levels(self) -> list[Level]:
        """Promises to choose from, ascending in risk; the default one is among them."""
        return self.promises.levels()

    def level(self, risk: float | None = None, group: str | None = None) -> Level:
        """The level of a certified risk or of a group of questions: see `Promises.level`."""
        return self.promises.level(risk, group)

    def answer(
        self, question: Asked, *, risk: float | None = None, group: str | None = None, options: Sequence[str] = ()
    ) -> Reply:
        """Reply to one question, as text or messages: `answers` of one, with its group where known, and its options."""
        level = self.level(risk, group)
        return self.decide(self.guess([question_of(question, options)])[0], level)

    def answers(
        self,
        questions: Sequence[Asked],
        *,
        risk: float | None = None,
        groups: Sequence[str | None] | None = None,
        options: Sequence[Sequence[str]] | None = None,
    ) -> list[Reply]:
        """Replies in the order of the questions, which go through the model together.

        risk: one of `levels()`; by default the run's own certificate. groups: of each question, the value of the stratum
        that `certify --by` named, None where it is not known; a group is answered by its own certificate or not at all.
        options: of each question, those to choose from, where the run's task is to choose.
        Without a certificate it abstains from everything, unless loaded with uncertified=True. In bf16 a probability may
        differ by rounding from the one that the question gets alone. A question unlike the graded ones, or of a shape that
        none of them had, is told so, and nothing is promised of it. Raises UserError for an empty question, a risk that is
        not certified, and groups where none are.
        """
        named = [None] * len(questions) if groups is None else list(groups)
        if len(named) != len(questions):
            raise UserError(f"groups: {len(named)} for {len(questions)} questions; give one each, None where not known")
        levels = [self.level(risk, group) for group in named]
        given = [()] * len(questions) if options is None else list(options)
        if len(given) != len(questions):
            raise UserError(f"options: {len(given)} for {len(questions)} questions; give those of each, () where none")
        guesses = self.guess([question_of(one, some) for one, some in zip(questions, given, strict=True)])
        return [self.decide(reply, level) for reply, level in zip(guesses, levels, strict=True)]

    def decide(self, reply: Reply, level: Level) -> Reply:
        """The same guess under another level: whether it is given and why, and what is promised of it."""
        if reply.uncovered:
            level = self.promises.silent(level, reply.uncovered, answers=False)
        elif reply.unlike:
            tells = self.loaded.config.abstention.outside != "abstain"
            level = self.promises.silent(level, UNLIKE, answers=tells)
        abstained = not (reply.found and reply.probability >= level.threshold)  # so that a NaN abstains
        kept = [not abstained] * len(reply.parts)
        if level.claims is not None:
            kept = [part.probability >= level.threshold for part in reply.parts]
            abstained = not (reply.found and any(kept))
        parts = tuple(replace(part, kept=stays) for part, stays in zip(reply.parts, kept, strict=True))
        return replace(
            reply,
            sentence=phrase(reply.probability, self.scale) + level.reservation,
            reservation=level.reservation,
            promise=level.promise,
            limit=level.limit,
            abstained=abstained,
            reason=_reason(reply.probability, level, abstained, kept) if reply.found else "My reply holds no answer.",
            threshold=level.threshold if level.certified or (level.silent and 0 < level.threshold < math.inf) else None,
            risk=level.risk,
            certified=level.certified,
            certificate=level.certificate,
            group=level.group,
            parts=parts,
            claims=level.claims,
            prediction_set=None if level.silent else reply.prediction_set,  # it is certified of such questions alone
            silence="" if not level.silent else reply.uncovered or UNLIKE,
        )

    def uncovered(self, question: Asked) -> str:
        """Why no certificate covers a question of this shape, as a sentence; "" where one does."""
        return self.shapes.uncovered(self._completed(question))

    @property
    def takes_options(self) -> bool:
        """Whether graded questions had options to choose from."""
        return self.shapes.options

    def prompt_tokens(self, question: Asked) -> int:
        """Tokens of the prompt that a question makes. Raises UserError for a question that `guess` would refuse."""
        return len(self.loaded.template.prompt_ids(self._record(question)))

    @cached_property
    def own_tokens(self) -> int:
        """Tokens of a prompt that are the run's own, whatever is asked: its system text, its examples, its template."""
        return max(0, len(self.loaded.template.prompt_ids(Record(prompt=(Message("user", "a"),)))) - 1)

    def guess(self, questions: Sequence[Asked]) -> list[Reply]:
        """Best guesses for `decide` to judge: as they come they are withheld."""
        records = [self._record(question) for question in questions]
        if not records:
            return []
        answers, scores, cost, outside, sources = self._scored(records)
        chances = self.calibrated.calibrator.apply(scores).tolist()
        # A reply that holds no answer is graded as wrong, however likely it was.
        probabilities = [chance if one.found else 0.0 for one, chance in zip(answers, chances, strict=True)]
        parts = self._parts(answers)
        return [
            Reply(
                question=answer.question,
                text=self.loaded.template.task.says(answer.text, record),
                probability=probability,
                word=word_for(probability, self.scale).name,
                sentence=phrase(probability, self.scale),
                promise="",
                limit="",
                abstained=True,
                reason="",
                threshold=None,
                risk=None,
                certified=False,
                certificate=None,
                tokens=_tokens(answer),
                finished=answer.finished,
                prompt_tokens=len(self.loaded.template.prompt_ids(record)),
                source=source,
                forward_passes=float(passes),
                tokens_read=float(tokens),
                prediction_set=self._set(answer, record),
                parts=pieces,
                outside=p_value,
                uncovered=self.uncovered(question),
                found=answer.found,
                said=answer.reply,
            )
            for question, record, answer, probability, passes, tokens, pieces, p_value, source in zip(
                questions,
                records,
                answers,
                probabilities,
                cost.forward_passes,
                cost.tokens,
                parts,
                outside,
                sources,
                strict=True,
            )
        ]

    def foresee(self, questions: Sequence[Asked]) -> list[float]:
        """P(IK): calibrated chances that it will answer rightly, one pass over each question, before any answer is made.

        Raises UserError unless the run was loaded with source="p_ik".
        """
        if self.scorer is None or self.source != "p_ik":
            raise UserError('chances before answering need calibtrain.load(out, source="p_ik")')
        records = [self._record(question) for question in questions]
        if not records:
            return []
        found = before_answering(asker_of(self._own()), records, self.scorer.probes["p_ik"], self.scorer.fingerprint)
        return [float(one) for one in self.calibrated.calibrator.apply(found.values)]

    def _set(self, answer: Answer, record: Record) -> tuple[str, ...] | None:
        """The prediction set, where one was calibrated and the answer was chosen among options."""
        sets, task = self.calibrated.prediction_sets, self.loaded.template.task
        if sets is None or not answer.option_logprobs:
            return None
        return tuple(task.says(one, record) for one in sets.of(answer.options, answer.option_logprobs))

    def _parts(self, answers: Sequence[Answer]) -> list[tuple[ReplyPart, ...]]:
        """The answers' parts with their chances, withheld as they come; () without calibrators for them."""
        calibrators = self.calibrated.parts
        if calibrators is None:
            return [()] * len(answers)
        return [
            tuple(
                ReplyPart(
                    part.name, part.text, part.start, part.stop, chance, word_for(chance, self.scale).name, kept=False
                )
                for part, chance in zip(answer.parts, chances.tolist(), strict=True)
            )
            for answer, chances in zip(answers, part_probabilities(calibrators, answers), strict=True)
        ]

    def _scored(
        self, records: Sequence[Record]
    ) -> tuple[list[Answer], Any, Cost, Sequence[float | None], Sequence[str]]:
        """Answers, what their calibrator reads, what that cost beside them, their questions' p-values, and the sources."""
        if self.scorer is None:
            measurement = self.loaded.measure(records)
            scores = measurement.scores(self.loaded.config.calibration.domain)
            return (
                measurement.answers,
                scores,
                Cost.none(len(records)),
                self._p_values(measurement.states, len(records)),
                [self.source] * len(records),
            )
        loaded = self._own()
        answered = loaded.answer(records, layers=self.scorer.layers)
        found = self.scorer.score(asker_of(loaded), records, answered)
        states = None if answered.asked is None else answered.asked.numpy()
        left = found.by_likelihood if found.by_likelihood is not None else np.zeros(len(records), dtype=bool)
        sources = [LIKELIHOOD if one else self.source for one in left.tolist()]
        return answered.answers, found.values, found.cost, self._p_values(states, len(records)), sources

    def _p_values(self, states: NDArray[np.float32] | None, n: int) -> Sequence[float | None]:
        if self.outside is None or states is None:
            return [None] * n
        return [float(one) for one in self.outside.p_values(states)]

    def _own(self) -> Loaded:
        """The run's model in this process, which alone has hidden states."""
        assert isinstance(self.loaded, Loaded)
        return self.loaded

    def _completed(self, question: Asked) -> Question:
        """As the graded questions were asked: under their system prompt, where they had one."""
        asked = self.shapes.completed(question_of(question))
        # The run's own system text stands before every question anyway (data.system).
        return Question(asked.turns, asked.options) if asked.system == self.loaded.config.data.system else asked

    def _record(self, question: Asked) -> Record:
        completed = self._completed(question)
        check_text(completed, self.control_tokens)
        return record_of(completed, self.loaded.template.task)


def load(
    output_dir: str | Path,
    source: str | None = None,
    *,
    uncertified: bool = False,
    engine: str | None = None,
    engine_model: str | None = None,
) -> Answerer:
    """Load a finished run. Raises UserError when it lacks a model or a calibration that fits it.

    source: where its confidence comes from, by default what `calibtrain calibrate OUT` chose: the run's confidence head or
    the likelihood; others need `calibtrain calibrate OUT --source ...`.
    uncertified: without a certificate answer everything instead of nothing. engine: address of an OpenAI-compatible server
    that answers in the run's place, under the certificate of `calibtrain calibrate OUT --engine ...`; engine_model: the
    model's id there.
    """
    folder = Path(output_dir)
    if engine is not None:
        if source not in (None, LIKELIHOOD):
            raise UserError(f"--source {source}: a server returns log-probs alone; leave it out with --engine")
        served, calibrated = load_served(folder, engine, engine_model)
        return Answerer(served, calibrated, uncertified=uncertified)
    config = config_of_run(folder)
    if not (folder / "model" / "config.json").is_file():
        raise UserError(f"{folder}: no exported model (model/config.json); train first")
    source = served_source(folder) if source is None else source
    check_calibrated(folder, source)  # before the model is loaded
    loaded = Loaded(config, folder / "model")
    fingerprint = Fingerprint(weights_hash(folder / "model"), loaded.template.hash)
    scorer = None if source == LIKELIHOOD else load_scorer(folder, source, fingerprint)
    calibrated = read_calibration(folder, template_hash=loaded.template.hash, source=source)
    watched = config.abstention.outside != "ignore"
    detector = read_outside(folder, calibrated.outside, fingerprint) if watched else None
    return Answerer(loaded, calibrated, scorer, outside=detector, uncertified=uncertified)


def _tokens(answer: Answer) -> tuple[Token, ...]:
    pieces = zip(answer.tokens, answer.token_logprobs, strict=True)
    return tuple(Token(text, math.exp(min(0.0, logprob))) for text, logprob in pieces)


def _reason(probability: float, level: Level, abstained: bool, kept: Sequence[bool]) -> str:
    if not level.answers:
        return "Nothing is certified here, so I do not answer."
    if level.claims is not None and level.silent:
        return (
            f"I give {sum(kept)} of my {len(kept)} claims; how often such a reply holds a wrong one is not known here."
        )
    if level.claims is not None:
        return (
            f"I give {sum(kept)} of my {len(kept)} claims: those from {percent(min(level.threshold, 1.0))} on, so that at "
            f"least {at_least(1 - level.claims.target_risk)} of my replies hold no wrong claim."
        )
    chance = f"My best guess has a {percent(probability)} chance of being right"
    if level.silent:
        rule = f"I answer from {percent(level.threshold)} on" if level.threshold else "I answer whatever the chance"
        return f"{chance}{level.reservation}; {rule}, but how often that is wrong here is not known."
    if level.certificate is None or level.risk is None:
        return f"{chance}. No threshold is certified, so I answer whatever the chance."
    mine = "my answers" if level.group is None else f"my answers about {plain(level.group)}"
    rule = f"I answer from {percent(level.threshold)} on, so that at most {at_most(level.risk)} of {mine} are wrong"
    return f"{chance}; {rule}." if abstained else f"{rule}."
