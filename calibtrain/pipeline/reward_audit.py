"""A reward model measured before it is used: what its margins are worth as probabilities, and whether it likes big words."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibtrain.calibration.intervals import wilson
from calibtrain.calibration.metrics import ece, ece_debiased
from calibtrain.calibration.state import CalibrationState, state_of
from calibtrain.confidence.stated import read_statement
from calibtrain.config_rewards import ModelSource
from calibtrain.distributed import World, gather_lists, shard
from calibtrain.errors import UserError
from calibtrain.losses.reward_model import fit_pair_scale, folded_pairs
from calibtrain.records import Record
from calibtrain.training.own_sampling import OwnSampling
from calibtrain.training.reward_rounds import score_auroc
from calibtrain.training.reward_sources import ModelReader, Reply
from calibtrain.training.rollouts import Rollouts
from calibtrain.training.sampling import Sampling

logger = logging.getLogger(__name__)

FILE = "reward_model.json"
HIGH, LOW = "{} (confidence: 90%)", "{} (confidence: 10%)"
NUMBERS = ("ranked_low", "ranked_high", "scale", "ece_debiased", "auroc", "prefers_high_right", "prefers_high_wrong")
SHOWN: dict[str, Any] = {
    **{"path": str, "reads": str, "findings": list, "doubts": list, "pairs": int, "ranked_right": int},
    **dict.fromkeys(NUMBERS, (int, float, type(None))),
}
"""What the report reads of each model, and of what kind it is."""
FOLDS = 10
LEAST_PAIRS = 20
"""With fewer pairs no calibration error is told."""
LIKES_HIGH = 0.75
"""Share of answers, right ones and wrong ones alike, above which high confidence is preferred whatever the answer ..."""
LIFT = 0.1
"""... where it also gains more than so many standard deviations of the scores."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A right and a wrong answer to one question."""

    record: Record
    right: str
    wrong: str


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer of the policy's with its grade."""

    record: Record
    text: str
    correct: float


def measure_reward_models(rollouts: Rollouts, questions: Sequence[Record], output_dir: Path) -> None:
    """Measure every reward model of the run on held-out questions, write OUT/reward_model.json, and log it. Collective.

    Pairs are the data's where a question has both answers, else the policy's own right and wrong one. Questions without
    answers serve as far as the data have pairs.
    """
    config, world = rollouts.config, rollouts.answerer.world
    models = {
        name: (source, reader)
        for name, source, reader in zip(
            [one for one, source in zip(rollouts.rewards.names, config.rollouts.paid_by, strict=True) if source.ASKED],
            [source for source in config.rollouts.paid_by if source.ASKED],
            rollouts.rewards.sources,
            strict=True,
        )
        if isinstance(reader, ModelReader)
    }
    wanted = config.rollouts.measure_reward_model
    if not models or not wanted or not questions:
        return
    task = rollouts.answerer.template.task
    kept = [one for one in questions if task.gradable(one) or (one.chosen and one.rejected)][:wanted]
    answers = _answers(rollouts, [one for one in kept if task.gradable(one)])
    pairs = pairs_of(kept, answers)
    found = []
    for name, (source, reader) in models.items():
        assert isinstance(source, ModelSource)
        numbers = audited(pairs, answers, lambda replies, reader=reader: _scores(reader, replies, world))  # type: ignore[misc]
        found.append({"name": name, "path": source.path, "reads": reader.text.form, **numbers})
    if not world.is_main:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"models": found}, indent=2, ensure_ascii=False, allow_nan=False)
    (output_dir / FILE).write_text(text, encoding="utf-8")
    for one in found:
        for level, lines in ((logging.INFO, one["findings"]), (logging.WARNING, one["doubts"])):
            for line in lines:
                logger.log(level, "reward model %s: %s", one["path"], line)


def read_audit(path: Path) -> list[dict[str, Any]]:
    """The models of a reward_model.json; [] where there is none. Raises UserError for another file of that name."""
    if not path.is_file():
        return []
    try:
        models = json.loads(path.read_text(encoding="utf-8"))["models"]
        if not all(isinstance(one[key], kind) for one in models for key, kind in SHOWN.items()):
            raise TypeError("a number that is none")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a measurement of reward models ({type(error).__name__}: {error})") from None
    return list(models)


def pairs_of(records: Sequence[Record], answers: Sequence[Answered]) -> list[Pair]:
    """One pair of each question that has a right and a wrong answer, of the data or of `answers`."""
    own: dict[str, dict[bool, str]] = {}
    for one in answers:
        if one.text.strip():
            own.setdefault(one.record.id, {}).setdefault(one.correct > 0.5, read_statement(one.text).answer)
    pairs = []
    for record in records:
        said = own.get(record.id, {})
        right = record.chosen or said.get(True) or next(iter(record.accepted), None)
        wrong = record.rejected or said.get(False)
        if right and wrong:
            pairs.append(Pair(record, right, wrong))
    return pairs


def audited(pairs: Sequence[Pair], answers: Sequence[Answered], scores_of: Any) -> dict[str, Any]:
    """Numbers of one reward model, JSON values, with what they say in `findings`. `scores_of`: replies -> scores (n,)."""
    replies = [Reply(one.record, text, text) for one in pairs for text in (one.right, one.wrong)]
    stated = [
        Reply(one.record, form.format(text.rstrip()), form.format(text.rstrip()))
        for one in pairs
        for text in (one.right, one.wrong)
        for form in (HIGH, LOW)
    ]
    own = [Reply(one.record, one.text, one.text) for one in answers]
    scores = scores_of([*replies, *stated, *own])
    pair, said, given = scores.split([len(replies), len(stated), len(own)])
    numbers: dict[str, Any] = {"pairs": len(pairs), "answers": len(answers), **_pair_numbers(pair.view(-1, 2))}
    grades = torch.tensor([one.correct for one in answers], dtype=torch.float64)
    numbers["auroc"] = _plain(score_auroc(given, grades))
    spread = float(pair.std(unbiased=False)) if len(pairs) else 0.0
    lift = (said.view(-1, 2, 2)[:, :, 0] - said.view(-1, 2, 2)[:, :, 1]) if len(pairs) else scores.new_zeros(0, 2)
    for index, kind in enumerate(("right", "wrong")):
        column = lift[:, index]
        numbers[f"prefers_high_{kind}"] = _plain(float((column > 0).double().mean()))
        numbers[f"lift_of_high_{kind}"] = _plain(float(column.mean()) / spread if spread else math.nan)
    return {**numbers, **_findings(numbers)}


def _pair_numbers(scores: Tensor) -> dict[str, Any]:
    """Of (P, 2) scores of right and wrong answers: share ranked right, fitted scale, calibration error of its probability.

    Each tenth of the pairs has the scale that fits the others.
    """
    gap = scores[:, 0] - scores[:, 1]
    right = int((gap > 0).sum())
    low, high = wilson(right, len(gap))
    found: dict[str, Any] = {"ranked_right": right, "ranked_low": low, "ranked_high": high}
    found |= {"scale": _scale(gap), "ece_debiased": None, "ece": None, "unscaled_ece_debiased": None}
    if len(gap) < LEAST_PAIRS:
        return found
    fold = torch.arange(len(gap)) % FOLDS
    parts = [gap[fold == one] for one in range(FOLDS)]
    found["unscaled_ece_debiased"] = _plain(ece_debiased(_folded(parts, [1.0] * FOLDS)))
    scales = [one for one in (_scale(gap[fold != part]) for part in range(FOLDS)) if one is not None]
    if len(scales) == FOLDS:
        fitted = _folded(parts, scales)
        found |= {"ece": _plain(ece(fitted)), "ece_debiased": _plain(ece_debiased(fitted))}
    return found


def _folded(parts: Sequence[Tensor], scales: Sequence[float]) -> CalibrationState:
    """Pair probabilities of margins, each part with its scale; ties, which are neither right nor wrong, left out."""
    found = [folded_pairs(one[one != 0], scale) for one, scale in zip(parts, scales, strict=True)]
    confidence, correct = (torch.cat(column).double() for column in zip(*found, strict=True))
    return state_of(confidence, correct > 0.5)


def _findings(numbers: dict[str, Any]) -> dict[str, list[str]]:
    """What the numbers say, in sentences: `findings`, and `doubts`, which speak against using the model as it is."""
    pairs = numbers["pairs"]
    if not pairs:
        unknown = "no held-out question has a right and a wrong answer, so that nothing is known of it"
        return {"findings": [], "doubts": [unknown]}
    ranked = (
        f"ranks the right answer above the wrong one in {numbers['ranked_right']} of {pairs} held-out pairs "
        f"({numbers['ranked_low']:.0%} to {numbers['ranked_high']:.0%})"
    )
    poor = numbers["ranked_low"] <= 0.5
    said = [] if poor else [ranked]
    doubts = [f"{ranked}: not clearly better than chance"] if poor else []
    if numbers["auroc"] is not None:
        said.append(
            f"tells right from wrong among {numbers['answers']} of the policy's answers with an AUROC of "
            f"{numbers['auroc']:.2f}"
        )
    if numbers["ece_debiased"] is not None:
        said.append(
            f"gives its margins as probabilities, sigmoid({numbers['scale']:.3g} * margin), that are off by "
            f"{numbers['ece_debiased']:.1%} beyond chance; without that scale by {numbers['unscaled_ece_debiased']:.1%}"
        )
    likes = [(numbers[f"prefers_high_{kind}"], numbers[f"lift_of_high_{kind}"]) for kind in ("right", "wrong")]
    if all(share is not None and lift is not None and share > LIKES_HIGH and lift > LIFT for share, lift in likes):
        (right, right_lift), (wrong, wrong_lift) = likes
        doubts.append(
            f"prefers a stated confidence of 90% to 10% whatever the answer: in {right:.0%} of right ones, by "
            f"{right_lift:.2f} standard deviations of its scores, and in {wrong:.0%} of wrong ones, by {wrong_lift:.2f}. A "
            "policy whose statement it reads learns to be sure: train it with objective.confidence_statements: added, or "
            "let rollouts.reward: ppo_c take the statement out"
        )
    return {"findings": said, "doubts": doubts}


def _answers(rollouts: Rollouts, questions: Sequence[Record]) -> list[Answered]:
    """A group of the policy's answers to each question, of all ranks, graded; as many questions on each rank. Collective."""
    answerer = rollouts.answerer
    questions = list(questions)[: len(questions) // answerer.world.size * answerer.world.size]
    if not questions:
        return []
    model = answerer.module
    was_training, scale = model.training, model.policy.scale
    model.eval()
    model.policy.scale = 1.0
    try:
        mine = shard(range(len(questions)), answerer.world)
        sampling = Sampling(rollouts.config, answerer, questions, engine=OwnSampling(answerer))
        sampled = sampling(mine, -1, [f"reward model {place}" for place in mine])
    finally:
        model.train(was_training)
        model.policy.scale = scale
    return [
        Answered(
            questions[one.question],
            rollouts.rewards.reply(questions[one.question], answerer.template.decode_answer(one.tokens)).answer,
            one.correct,
        )
        for one in gather_lists(sampled)
    ]


def _scores(reader: ModelReader, replies: Sequence[Reply], world: World) -> Tensor:
    """Scores of all replies on every rank, each of which asks of its share, (n,) float64. Collective."""
    mine = reader(shard(replies, world))
    if problems := gather_lists([one for one in (reader.problem(),) if one is not None]):
        raise UserError(problems[0])
    return torch.tensor(gather_lists(mine), dtype=torch.float64)


def _scale(gap: Tensor) -> float | None:
    try:
        return fit_pair_scale(gap)
    except UserError:  # none, or all ranked right: no scale is too large
        return None


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
