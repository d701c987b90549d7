"""A finished run at work: questions in, answers with their calibrated probability and word out, or abstentions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibtrain.abstention.certificate import Certificate
from calibtrain.abstention.words import Scale, percent, phrase, scale_of, word_for
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.scorer import Scorer, before_answering
from calibtrain.confidence.source import Cost
from calibtrain.config_file import load_config
from calibtrain.data.values import unreadable
from calibtrain.errors import UserError
from calibtrain.pipeline.calibration_file import LIKELIHOOD, Calibrated, read_calibration, weights_hash
from calibtrain.pipeline.confidence import asker_of
from calibtrain.pipeline.engine import load_served
from calibtrain.pipeline.evaluate import Answering, Loaded
from calibtrain.pipeline.promise import Level, Promises
from calibtrain.pipeline.scope import at_most, plain
from calibtrain.pipeline.source import check_calibrated, load_scorer
from calibtrain.records import Message, Record

REFUSAL = "I do not know."


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of an answer's text and the probability the model gave it, in [0, 1]. The end of the answer is ""."""

    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. `text` is the model's best guess also where it abstains; show it then only as such."""

    question: str
    text: str
    probability: float  # calibrated chance that `text` is right
    word: str
    sentence: str  # word and number in the first person
    promise: str  # what is certified and of which questions: say it first
    limit: str  # what is not
    abstained: bool
    reason: str  # why it answered or abstained
    threshold: float | None  # None: no certificate
    risk: float | None  # certified share of wrong answers among the given ones
    certified: bool
    certificate: Certificate | None
    tokens: tuple[Token, ...]
    finished: bool  # False: cut at max_new_tokens
    prompt_tokens: int
    reservation: str = ""  # end of the sentence: the group that it is known not to hold for
    group: str | None = None  # of the question, where it was named
    source: str = LIKELIHOOD  # of the confidence
    forward_passes: float = 0.0  # that the confidence cost beside the answer's own
    tokens_read: float = 0.0  # by those passes
    prediction_set: tuple[str, ...] | None = (
        None  # options of which one is right, but for a certified share of questions
    )

    @property
    def spoken(self) -> str:
        """What to show a person: the answer, or that it is not known."""
        return REFUSAL if self.abstained else self.text

    def told(self) -> str:
        """The reply for a terminal: what is promised, the answer or that it is not known, and what is not promised."""
        if not self.abstained:
            line = f"{plain(self.text, 2000)}  ({self.word}, {percent(self.probability)}{self.reservation})"
        elif self.threshold is None:
            line = self.spoken
        else:
            chance, threshold = percent(self.probability), percent(self.threshold)
            line = f"{self.spoken} (best guess at {chance}, below the threshold {threshold})"
        return f"{self.promise}\n{line}\n{self.limit}"


class Answerer:
    """The model and calibration of a finished run; `scorer` where the confidence is not the answer's likelihood.

    loaded: the run's model, or the server of one (without `scorer`, which reads hidden states).
    uncertified: without a certificate answer everything instead of nothing; whoever runs the model decides that.
    """

    def __init__(
        self, loaded: Answering, calibrated: Calibrated, scorer: Scorer | None = None, *, uncertified: bool = False
    ) -> None:
        self.loaded = loaded
        self.calibrated = calibrated
        self.scorer = scorer
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
        self, question: str, *, risk: float | None = None, group: str | None = None, options: Sequence[str] = ()
    ) -> Reply:
        """Reply to one question: `answers` of one, with its group where that is known, and the options it brings."""
        level = self.level(risk, group)
        return self.decide(self.guess([question], options=[options])[0], level)

    def answers(
        self,
        questions: Sequence[str],
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
        differ by rounding from the one that the question gets alone. Raises UserError for an empty question, a risk that
        is not certified, and groups where none are.
        """
        named = [None] * len(questions) if groups is None else list(groups)
        if len(named) != len(questions):
            raise UserError(f"groups: {len(named)} for {len(questions)} questions; give one each, None where not known")
        levels = [self.level(risk, group) for group in named]
        guesses = self.guess(questions, options=options)
        return [self.decide(reply, level) for reply, level in zip(guesses, levels, strict=True)]

    def decide(self, reply: Reply, level: Level) -> Reply:
        """The same guess under another level: whether it is given and why, and what is promised of it."""
        abstained = not reply.probability >= level.threshold  # so that a NaN abstains
        return replace(
            reply,
            sentence=phrase(reply.probability, self.scale) + level.reservation,
            reservation=level.reservation,
            promise=level.promise,
            limit=level.limit,
            abstained=abstained,
            reason=_reason(reply.probability, level, abstained),
            threshold=None if level.certificate is None else level.threshold,
            risk=level.risk,
            certified=level.certificate is not None,
            certificate=level.certificate,
            group=level.group,
        )

    def prompt_tokens(self, question: str, *, options: Sequence[str] = ()) -> int:
        """Tokens of the prompt that a question makes. Raises UserError for a question that `guess` would refuse."""
        return len(self.loaded.template.prompt_ids(self._record(question, options)))

    def guess(self, questions: Sequence[str], *, options: Sequence[Sequence[str]] | None = None) -> list[Reply]:
        """Best guesses for `decide` to judge: as they come they are withheld. `options` as in `answers`."""
        given = [()] * len(questions) if options is None else list(options)
        if len(given) != len(questions):
            raise UserError(f"options: {len(given)} for {len(questions)} questions; give those of each, () where none")
        records = [self._record(question, some) for question, some in zip(questions, given, strict=True)]
        if not records:
            return []
        answers, scores, cost = self._scored(records)
        probabilities = self.calibrated.calibrator.apply(scores).tolist()
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
                source=self.source,
                forward_passes=float(passes),
                tokens_read=float(tokens),
                prediction_set=self._set(answer, record),
            )
            for record, answer, probability, passes, tokens in zip(
                records, answers, probabilities, cost.forward_passes, cost.tokens, strict=True
            )
        ]

    def foresee(self, questions: Sequence[str]) -> list[float]:
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

    def _scored(self, records: Sequence[Record]) -> tuple[list[Answer], Any, Cost]:
        """Answers, what their calibrator reads, and what that cost beside them."""
        if self.scorer is None:
            measurement = self.loaded.measure(records)
            scores = measurement.scores(self.loaded.config.calibration.domain)
            return measurement.answers, scores, Cost.none(len(records))
        loaded = self._own()
        answered = loaded.answer(records)
        found = self.scorer.score(asker_of(loaded), records, answered)
        return answered.answers, found.values, found.cost

    def _own(self) -> Loaded:
        """The run's model in this process, which alone has hidden states."""
        assert isinstance(self.loaded, Loaded)
        return self.loaded

    def _record(self, question: str, options: Sequence[str] = ()) -> Record:
        question, given = question.strip(), tuple(one.strip() for one in options)
        for what, text in [("question", question), *(("option", one) for one in given)]:
            if not text:
                raise UserError(f"the {what} is empty")
            if half := unreadable(text):
                raise UserError(f"the {what} holds {half}, half of a character, which no tokenizer can read")
            for token in self.control_tokens:
                if token in text:
                    raise UserError(
                        f"the {what} contains {token!r}, which the model reads as a control token; leave it out"
                    )
        return self.loaded.template.task.asked(Record(prompt=(Message("user", question),), options=given))


def load(
    output_dir: str | Path,
    source: str = LIKELIHOOD,
    *,
    uncertified: bool = False,
    engine: str | None = None,
    engine_model: str | None = None,
) -> Answerer:
    """Load a finished run. Raises UserError when it lacks a model or a calibration that fits it.

    source: where its confidence comes from; others than the likelihood need `calibtrain calibrate OUT --source ...`.
    uncertified: without a certificate answer everything instead of nothing. engine: address of an OpenAI-compatible server
    that answers in the run's place, under the certificate of `calibtrain calibrate OUT --engine ...`; engine_model: the
    model's id there.
    """
    folder = Path(output_dir)
    if engine is not None:
        if source != LIKELIHOOD:
            raise UserError(f"--source {source}: a server returns log-probs alone; leave it out with --engine")
        served, calibrated = load_served(folder, engine, engine_model)
        return Answerer(served, calibrated, uncertified=uncertified)
    config = load_config(folder / "config.yaml")
    if not (folder / "model" / "config.json").is_file():
        raise UserError(f"{folder}: no exported model (model/config.json); train first")
    check_calibrated(folder, source)  # before the model is loaded
    loaded = Loaded(config, folder / "model")
    scorer = None
    if source != LIKELIHOOD:
        scorer = load_scorer(folder, source, Fingerprint(weights_hash(folder / "model"), loaded.template.hash))
    calibrated = read_calibration(folder, template_hash=loaded.template.hash, source=source)
    return Answerer(loaded, calibrated, scorer, uncertified=uncertified)


def _tokens(answer: Answer) -> tuple[Token, ...]:
    pieces = zip(answer.tokens, answer.token_logprobs, strict=True)
    return tuple(Token(text, math.exp(min(0.0, logprob))) for text, logprob in pieces)


def _reason(probability: float, level: Level, abstained: bool) -> str:
    if not level.answers:
        return "Nothing is certified here, so I do not answer."
    chance = f"My best guess has a {percent(probability)} chance of being right"
    if level.certificate is None or level.risk is None:
        return f"{chance}. No threshold is certified, so I answer whatever the chance."
    mine = "my answers" if level.group is None else f"my answers about {plain(level.group)}"
    rule = f"I answer from {percent(level.threshold)} on, so that at most {at_most(level.risk)} of {mine} are wrong"
    return f"{chance}; {rule}." if abstained else f"{rule}."
