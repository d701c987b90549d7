"""What sections of the config cannot be combined, by what each needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibtrain.config import RunConfig

SHARED_ATTENTION = ("sdpa", "flash_attention_2")
"""Attention whose heads may lie on several ranks."""


def unfit_answers(config: RunConfig) -> str | None:
    """What penalties on own answers, and a confidence head, cannot do without."""
    if problem := unfit_for_head(config):
        return problem
    answering = config.penalties_on_answers
    if answering and config.data.splits.calibration == 0:
        where = "" if answering[0].name == "confidence_head" else "penalties."
        return f"{where}{answering[0].name} needs questions: set data.splits.calibration to 128..512"
    for key in ("refresh_every", "questions_per_refresh", "answers_per_step"):
        values = {penalty.name: getattr(penalty, key) for penalty in answering}
        if len(set(values.values())) > 1:
            return f"penalties share one stream of answers, so {key} must be the same in each, got {values}"
    return None


def unfit_for_head(config: RunConfig) -> str | None:
    """What a confidence head cannot do without, and what cannot do without it."""
    head, needs, rollouts = config.confidence_head, config.objective.needs, config.trains_on_rollouts
    if head is None:
        if rollouts and config.rollouts.confidence == "head":
            return "rollouts.confidence: head needs the head: add a section confidence_head: {}"
        return None
    if needs.module == "reward head":
        return f"objective.name: {config.objective.name} answers no questions: leave out confidence_head"
    if rollouts and config.rollouts.confidence == "head":
        if config.rollouts.reward not in ("brier", "log"):
            return f"rollouts.confidence: head is scored by reward: brier or log, not {config.rollouts.reward}"
        for key, theirs in (("score", "reward"), ("weight", "score_weight")):
            value = getattr(config.rollouts, theirs)
            # A run's written config names every key, so what is not the default was asked for.
            if getattr(head, key) not in (value, type(head).model_fields[key].default):
                return (
                    f"confidence_head.{key}: rollouts.confidence: head takes rollouts.{theirs} ({value}); leave it out"
                )
    alone = rollouts and config.rollouts.rewards_nothing and not (head.trains_backbone or config.penalties_in_loss)
    if alone:
        return (
            "rollouts.accuracy_weight: 0 with confidence: head would train the head alone, whose score does not reach the "
            "model: leave it out"
        )
    if head.trains_backbone and not rollouts:
        return (
            "confidence_head.trains_backbone: the model would learn the grades of the calibration questions by heart "
            "(docs/calibration-term.md): it fits grpo, rloo and ppo, whose questions are new at every step"
        )
    return None


def unfit_for_objective(config: RunConfig) -> str | None:
    """What an objective cannot be combined with, by what it needs."""
    name, needs, training = config.objective.name, config.objective.needs, config.training
    anchored = [penalty.name for penalty in config.penalties if penalty.needs.reference == "log-probs"]
    if needs.data == "relabelled" and anchored:
        return f"penalties.{anchored[0]} needs training data that stays, and objective.name: {name} labels its anew"
    if config.data.streams and (needs.data not in ("records", "pairs") or needs.statements != "none"):
        return f"data.source.streaming: objective.name: {name} makes its training data of the whole set; leave it out"
    if config.data.streams and config.needs_reference_logprobs:
        return "data.source.streaming: a loss asks for the starting model's log-probs of the whole set; leave it out"
    if needs.module == "reward head":
        for key, value in (
            ("penalties", config.penalties),
            ("training.evaluate_every", training.evaluate_every),
            ("training.average_last", training.average_last),
        ):
            if value:
                return f"objective.name: {name} trains a scalar head and answers no questions: leave out {key}"
    if needs.data == "rollouts":
        in_loss = {penalty.name for penalty in config.penalties if getattr(penalty, "moves", "all") == "all"}
        if others := sorted(in_loss - {"answer_score"}):
            return f"objective.name: {name} trains on its own answers: of penalties, answer_score fits, not {others[0]}"
        if in_loss and config.rollouts.confidence == "stated":
            return "penalties.answer_score, moves: all, scores a likelihood: set rollouts.confidence to it, or leave it out"
        if config.rollouts.confidence == "stated" and config.rollouts.reward in ("accuracy", "ternary"):
            return (
                "rollouts.confidence: stated is scored by reward: brier, log or ppo_c, or read by a reward model, not by "
                f"{config.rollouts.reward}"
            )
        if config.rollouts.splits_credit and not needs.word_credit:
            return f"rollouts.decoupled needs credit for each word, which {name} has not: set it to false"
        return _unfit_rounds(config)
    return None


def _unfit_rounds(config: RunConfig) -> str | None:
    """What of a round of sampled answers an objective cannot learn from."""
    name, needs, rollouts = config.objective.name, config.objective.needs, config.rollouts
    valued = needs.credit == "values"
    if rollouts.truncated == "bootstrapped" and not valued:
        return (
            f"rollouts.truncated: bootstrapped needs a value of each state, which {name} has not: left_out, or graded"
        )
    if rollouts.truncated == "masked" and valued:
        return (
            f"rollouts.truncated: masked counts in a group's baseline, and {name} has none: left_out, or bootstrapped"
        )
    if rollouts.dynamic_sampling and valued:
        return (
            f"rollouts.dynamic_sampling: {name} learns from groups alike as well, its baseline is a value: set it to 0"
        )
    if rollouts.dynamic_sampling and (config.score_teaches or rollouts.score_in_loss):
        return "rollouts.dynamic_sampling: a score in the loss learns from groups alike as well: set it to 0"
    if rollouts.correction.startswith("token") and needs.whole_answers:
        return f"rollouts.correction: {name} weighs whole answers: sequence_truncate or sequence_mask"
    return None


def unfit_for_shared_rows(config: RunConfig) -> str | None:
    """What training.sequence_parallel_size cannot be combined with: what reads hidden states beside attention and head."""
    size, model = config.training.sequence_parallel_size, config.model
    if size == 1:
        return None
    here = f"training.sequence_parallel_size: {size}"
    if (module := config.objective.needs.module) != "plain":
        return (
            f"{here}: objective.name: {config.objective.name} trains a {module}, which reads whole rows; objectives of the "
            "language model alone share them: sft, orpo, dpo, kto, refusal, grpo, rloo and their like"
        )
    if config.trains_head:
        return f"{here}: a confidence_head reads the states of whole answers: set its weight to 0, or leave it out"
    if model.attention not in SHARED_ATTENTION:
        return f"{here}: model.attention: {model.attention} is not shared: take {' or '.join(SHARED_ATTENTION)}"
    if model.compile:
        return f"{here}: model.compile knows no exchange between ranks in the middle of a layer: set it to false"
    return None
