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
from calibtrain.data.records import Message, Record
from calibtrain.errors import UserError
from calibtrain.pipeline.calibrate import Calibrated, read_calibration, weights_hash
from calibtrain.pipeline.confidence import asker_of
from calibtrain.pipeline.evaluate import Loaded
from calibtrain.pipeline.source import check_calibrated, load_scorer

REFUSAL = "I do not know."


@dataclass(frozen=True, slots=True)
class Level:
    """One promise that can be chosen: answering from `threshold` on, at most `risk` of the answers are wrong.

    Without a certificate everything is answered and nothing promised: threshold 0, risk None.
    """

    threshold: float
    risk: float | None
    coverage: float  # share of the certification questions that it answers
    certificate: Certificate | None


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
    abstained: bool
    reason: str  # why it answered or abstained
    threshold: float | None  # None: no certificate
    risk: float | None  # certified share of wrong answers among the given ones
    certified: bool
    certificate: Certificate | None
    tokens: tuple[Token, ...]
    finished: bool  # False: cut at max_new_tokens
    prompt_tokens: int
    source: str = "likelihood"  # of the confidence
    forward_passes: float = 0.0  # that the confidence cost beside the answer's own
    tokens_read: float = 0.0  # by those passes

    @property
    def spoken(self) -> str:
        """What to show a person: the answer, or that it is not known."""
        return REFUSAL if self.abstained else self.text


class Answerer:
    """The model and calibration of a finished run; `scorer` where the confidence is not the answer's likelihood."""

    def __init__(self, loaded: Loaded, calibrated: Calibrated, scorer: Scorer | None = None) -> None:
        self.loaded = loaded
        self.calibrated = calibrated
        self.scorer = scorer
        self.source = "likelihood" if scorer is None else scorer.name
        self.default = level_of(calibrated.certification.certificate)
        self.control_tokens = loaded.template.control_tokens
        self.max_new_tokens: int = loaded.config.evaluation.max_new_tokens
        self.scale: Scale = scale_of(loaded.config.abstention.words)

    def levels(self) -> list[Level]:
        """Promises to choose from, ascending in risk, and last to answer everything. The default one is among them."""
        curve = [found.certificate for found in self.calibrated.curve.values()]
        default = self.calibrated.certification.certificate
        kept = [one for one in curve if one and (default is None or one.target_risk != default.target_risk)]
        certificates = sorted([*kept, *([default] if default else [])], key=lambda one: one.target_risk)
        return [*map(level_of, certificates), level_of(None)]

    def answer(self, question: str, *, risk: float | None = None) -> Reply:
        """Reply to one question: `answers` of one."""
        return self.answers([question], risk=risk)[0]

    def answers(self, questions: Sequence[str], *, risk: float | None = None) -> list[Reply]:
        """Replies in the order of the questions, which go through the model together.

        risk: one of `levels()`; by default the run's own certificate. Without one it never abstains and says so in
        `certified`. In bf16 a probability may differ by rounding from the one that the question gets alone. Raises
        UserError for an empty question or a risk that is not certified.
        """
        level = self.default if risk is None else self.level(risk)
        return [self.decide(reply, level) for reply in self.guess(questions)]

    def level(self, risk: float) -> Level:
        """The certified level of this risk; UserError naming those there are."""
        certified = [one for one in self.levels() if one.risk is not None]
        for one in certified:
            if one.certificate and math.isclose(one.certificate.target_risk, risk):
                return one
        known = ", ".join(f"{one.certificate.target_risk:g}" for one in certified if one.certificate) or "none"
        raise UserError(f"risk {risk:g} is not certified; certified are: {known}")

    def decide(self, reply: Reply, level: Level) -> Reply:
        """The same guess under another level: only whether it is given, and why, can change."""
        abstained = reply.probability < level.threshold
        return replace(
            reply,
            abstained=abstained,
            reason=_reason(reply.probability, level, abstained),
            threshold=None if level.certificate is None else level.threshold,
            risk=level.risk,
            certified=level.certificate is not None,
            certificate=level.certificate,
        )

    def prompt_tokens(self, question: str) -> int:
        """Tokens of the prompt that a question makes. Raises UserError for a question that `guess` would refuse."""
        return len(self.loaded.template.prompt_ids(self._record(question)))

    def guess(self, questions: Sequence[str]) -> list[Reply]:
        """Replies under the level that answers everything, for `decide` to judge."""
        records = [self._record(question) for question in questions]
        if not records:
            return []
        answers, scores, cost = self._scored(records)
        probabilities = self.calibrated.calibrator.apply(scores).tolist()
        return [
            Reply(
                question=answer.question,
                text=answer.text,
                probability=probability,
                word=word_for(probability, self.scale).name,
                sentence=phrase(probability, self.scale),
                abstained=False,
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
        found = before_answering(asker_of(self.loaded), records, self.scorer.probes["p_ik"], self.scorer.fingerprint)
        return [float(one) for one in self.calibrated.calibrator.apply(found.values)]

    def _scored(self, records: Sequence[Record]) -> tuple[list[Answer], Any, Cost]:
        """Answers, what their calibrator reads, and what that cost beside them."""
        if self.scorer is None:
            measurement = self.loaded.measure(records)
            scores = measurement.scores(self.loaded.config.calibration.domain)
            return measurement.answers, scores, Cost.none(len(records))
        answered = self.loaded.answer(records)
        found = self.scorer.score(asker_of(self.loaded), records, answered)
        return answered.answers, found.values, found.cost

    def _record(self, question: str) -> Record:
        question = question.strip()
        if not question:
            raise UserError("the question is empty")
        for token in self.control_tokens:
            if token in question:
                raise UserError(
                    f"the question contains {token!r}, which the model reads as a control token; leave it out"
                )
        return Record(prompt=(Message("user", question),))


def level_of(certificate: Certificate | None) -> Level:
    """What a certificate lets the model answer; everything without one."""
    if certificate is None:
        return Level(0.0, None, 1.0, None)
    return Level(certificate.threshold, certificate.risk_bound, certificate.coverage, certificate)


def load(output_dir: str | Path, source: str = "likelihood") -> Answerer:
    """Load a finished run. Raises UserError when it lacks a model or a calibration that fits it.

    source: where its confidence comes from; others than the likelihood need `calibtrain calibrate OUT --source ...`.
    """
    folder = Path(output_dir)
    config = load_config(folder / "config.yaml")
    if not (folder / "model" / "config.json").is_file():
        raise UserError(f"{folder}: no exported model (model/config.json); train first")
    check_calibrated(folder, source)  # before the model is loaded
    loaded = Loaded(config, folder / "model")
    scorer = None
    if source != "likelihood":
        scorer = load_scorer(folder, source, Fingerprint(weights_hash(folder / "model"), loaded.template.hash))
    return Answerer(loaded, read_calibration(folder, template_hash=loaded.template.hash, source=source), scorer)


def _tokens(answer: Answer) -> tuple[Token, ...]:
    pieces = zip(answer.tokens, answer.token_logprobs, strict=True)
    return tuple(Token(text, math.exp(min(0.0, logprob))) for text, logprob in pieces)


def _reason(probability: float, level: Level, abstained: bool) -> str:
    chance = f"My best guess has a {percent(probability)} chance of being right"
    if level.certificate is None or level.risk is None:
        return f"{chance}. No threshold is certified, so I answer whatever the chance."
    rule = f"I answer from {percent(level.threshold)} on, so that at most {level.risk:.0%} of my answers are wrong"
    return f"{chance}; {rule}." if abstained else f"{rule}."
