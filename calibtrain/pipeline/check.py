"""What a run would do and what keeps it from running, found from its data, its tokenizer and its config.

`calibtrain train` asks this before it launches a process, every rank before it joins the others (DeepSpeed compiles then),
and `--dry-run` prints it. No weights are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from calibtrain.abstention.certificate import minimum_answers
from calibtrain.config import RunConfig
from calibtrain.config_rewards import ModelSource
from calibtrain.data.collate import collate, row_tokens
from calibtrain.data.drops import DropReport
from calibtrain.data.encode import Encoded, encode_records
from calibtrain.data.loader import planned_steps, rank_micro_batches, step_indices
from calibtrain.data.templates import Template, template_of
from calibtrain.data.unpaired import mismatched
from calibtrain.distributed import World
from calibtrain.engines import VLLMServer, interpreter
from calibtrain.errors import Unreachable, UserError
from calibtrain.models.adapters import add_lora
from calibtrain.models.loading import check_positions, check_weights, described_model, load_settings, load_tokenizer
from calibtrain.models.reward import padding_token
from calibtrain.models.sequence_parallel import check_sharing
from calibtrain.models.value import check_value_source
from calibtrain.pipeline.prepare import (
    Prepared,
    check_rejected,
    learned_records,
    needs_rejected,
    prepare,
    with_examples,
)
from calibtrain.records import Record
from calibtrain.training.best import OF_ANSWERS, check_metric
from calibtrain.training.checkpoint import find_checkpoint
from calibtrain.training.deepspeed_config import BatchPlan, batch_plan, deepspeed_dict
from calibtrain.training.eight_bit import require_eight_bit
from calibtrain.training.losses import term_names
from calibtrain.training.matrices import trained_layers
from calibtrain.training.output_directory import check_output_dir, check_same_data
from calibtrain.training.reward_sources import check_sources
from calibtrain.training.rollout_rewards import check_graded, check_rewards
from calibtrain.training.sampling import room_of_questions
from calibtrain.training.spectra import spectra_layers
from calibtrain.training.weight_penalty import penalised_layers

READ_WHOLE = 2000
"""So many training records are encoded to look at them; of a larger set, which is in random order, its first ones."""
PENDING = "a wrong answer"
"""Stands for rejected answers that are still to be sampled, where only their number matters."""
STEPS_LAID_OUT = 32
"""Of so many steps the rows are laid out, to count their padding."""


@dataclass(frozen=True, slots=True)
class Checked:
    """The data of a run that may start, and its template."""

    prepared: Prepared
    template: Template
    plan: BatchPlan
    examples: list[tuple[Encoded, ...]]
    """Of the first READ_WHOLE training records, without rejected answers that are still to be found; empty where the
    model answers the questions itself."""
    drops: DropReport
    """Of these records."""
    learned: Sequence[Record]
    """The records that `examples` were made of; their `record_id` is its index."""
    records: int
    """How many training records there are, as the objective learns from them, those in `drops` among them."""
    records_hash: str
    """Of all splits, as they were read."""
    finished: bool = False
    """This very run has already come to its end in output_dir."""

    @property
    def whole(self) -> bool:
        """Whether `examples` are all there is."""
        return len(self.prepared.splits["train"]) <= READ_WHOLE


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the steps that were laid out pass through the model."""

    steps: int
    held: int
    """Tokens of sequences."""
    passed: int
    """With the padding of their rows."""


def check(config: RunConfig, world_size: int, *, replace: bool = False) -> Checked:
    """Read the data and the tokenizer and try what can be tried without the model. Raises UserError as the run would.

    `replace`: whatever output_dir holds makes way for the run.
    """
    deepspeed_dict(config, world_size)
    require_eight_bit(config.training)
    term_names(config)
    best = config.training.best
    if best is not None and best.metric.startswith(OF_ANSWERS):
        check_metric(best, ())  # of a loss the terms are known with the model alone
    if config.trains_on_rollouts:
        check_rewards(config)
        room_of_questions(config)
    finished = not replace and check_output_dir(config)
    if not finished and not replace:
        find_checkpoint(config, World(0, world_size, 0, torch.device("cpu")), None)
    prepared = prepare(config)
    config = with_examples(config, prepared)
    records_hash = prepared.data_hash
    if finished:
        check_same_data(config.output_dir, records_hash)
    train = prepared.splits["train"]
    if not train:
        raise UserError("; ".join(["data.splits.train: 0 records to train on", *prepared.drops.lines()]))
    check_weights(config.model)
    tokenizer = load_tokenizer(config.model)
    template = template_of(config, tokenizer)
    if config.trains_on_rollouts:
        check_graded(config, template.task, train)
        check_sources(config, train)
    check_positions(config.model, config.data.max_length)
    settings, group = load_settings(config.model), config.training.sequence_parallel_size
    check_sharing(settings, group, config.data.max_length, config.model.attention)
    _check_layers(config)
    if config.objective.needs.module == "reward head":
        padding_token(tokenizer, template.end_id)
    if config.objective.needs.module == "value model":
        check_value_source(config, tokenizer)
    if wanting := needs_rejected(config, prepared):
        check_rejected(config, prepared)
        if config.objective.needs.module == "reward head" and prepared.splits["validation"]:
            raise UserError(
                "data.splits.validation: a reward's loss is measured on pairs, which the data has not; set 0"
            )
    drops = DropReport(strict=config.data.strict)
    examples: list[tuple[Encoded, ...]] = []
    # Of the rows to learn from, encoding leaves out the few that a template refuses.
    few = 0.0 if config.data.strict or config.objective.needs.answers_itself else config.data.max_dropped
    _ask(template, train[:READ_WHOLE], most=few)
    # A pair that is still to be found has its chosen answer.
    learned = train[:READ_WHOLE] if wanting else learned_records(config, train[:READ_WHOLE], drops)
    if not config.objective.needs.answers_itself:
        examples = encode_records(
            learned,
            template,
            config.data.max_length,
            config.trains_on_pairs and not wanting,
            drops,
            unpaired=config.trains_unpaired,
            every_turn=config.data.every_turn,
        )
        if config.trains_unpaired and len(train) <= READ_WHOLE:
            mismatched([one for (one,) in examples], config.data.max_length, tokenizer.bos_token_id)
    if config.confidence_head is not None:
        _check_head(config, template, prepared.splits["calibration"][:1] or train[:1])
    for split in ("validation", "calibration", "temperature", "certification", "test"):
        _ask(template, prepared.splits[split][:READ_WHOLE], prepared.shots)
    found = [dataclasses.replace(record, rejected=PENDING) for record in train] if wanting else train
    left_out = DropReport()
    records = len(learned_records(config, found, left_out)) + left_out.total
    plan = batch_plan(config.training, world_size)
    return Checked(prepared, template, plan, examples, drops, learned, records, records_hash, finished)


def _check_head(config: RunConfig, template: Template, some: Sequence[Record]) -> None:
    """Raise UserError where a confidence head could not read what the model says, or names layers that it lacks."""
    if any(template.task.options(record) for record in some):
        raise UserError(
            "confidence_head: reads answers that are generated, and these are chosen among options by their likelihood: set "
            "task.answer_by: generation, or leave it out"
        )
    depth = int(described_model(config.model).config.get_text_config().num_hidden_layers)
    layers = config.confidence_head.layers if config.confidence_head is not None else None
    if layers is not None and (max(layers) > depth or len(set(layers)) < len(layers)):
        raise UserError(f"confidence_head.layers: {list(layers)}: take each once, from 0 (embeddings) to {depth}")


def _check_layers(config: RunConfig) -> None:
    """Raise UserError where weight penalties or spectra name layers that are not trained."""
    if not config.weight_penalties and not config.tracking.spectra_every:
        return
    described = add_lora(described_model(config.model), config.model)
    layers = trained_layers(described.get_base_model() if config.model.lora is not None else described)
    for penalty in config.weight_penalties:
        penalised_layers(layers, penalty)
    if config.tracking.spectra_every:
        spectra_layers(layers, config.tracking.spectra_modules)


def check_rollout_engine(config: RunConfig) -> None:
    """Raise UserError where the engine that is to sample rollouts is not at hand: no server answers, or there is no vLLM."""
    engine = config.rollouts.engine
    if not config.trains_on_rollouts or engine.kind == "own":
        return
    if engine.launch:
        interpreter(engine.python)
        return
    try:
        VLLMServer(str(engine.address)).connect()
    except Unreachable as error:
        raise UserError(
            f"rollouts.engine.address: {error}: `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL`, where vLLM is installed (pip "
            "install vllm; without a GPU `make engines`), or let the run start it: rollouts.engine.launch (docs/engines.md)"
        ) from None


def expected_steps(config: RunConfig, checked: Checked) -> int:
    """Optimiser steps of the run; exact where every record was encoded, else as if no further one were dropped."""
    n = checked.records - checked.drops.total
    return planned_steps(config.training, n, checked.plan.global_batch_size, config.passes)


def count_tokens(config: RunConfig, checked: Checked) -> Tokens:
    """Lay out the first steps of the run as the trainer does: the same records, micro-batches and rows on all ranks."""
    examples, plan = checked.examples, checked.plan
    steps = min(STEPS_LAID_OUT, expected_steps(config, checked)) if examples else 0
    shared, packing = config.shares_prompts, config.packing_tokens
    held = passed = 0
    for step in range(steps):
        indices = step_indices(step, plan.global_batch_size, len(examples), config.seed)
        lengths = [row_tokens(examples[index], packing, shared) for index in indices]
        ranks = rank_micro_batches(indices, lengths, plan.groups, plan.micro_batch_size, packed=packing is not None)
        for micro_batch in (one for rank in ranks for one in rank):
            sequences = [sequence for index in micro_batch for sequence in examples[index]]
            batch = collate(sequences, 0, config.nll_scope, packing, shared_prefix=shared)
            held += int((batch.segment_ids > 0).sum())
            passed += batch.segment_ids.numel()
    return Tokens(steps, held, passed)


def longest(checked: Checked, count: int = 3) -> list[tuple[int, str]]:
    """(tokens before any cut, place) of the longest training records that were encoded."""
    by_length = sorted(checked.examples, key=lambda group: -max(len(one.ids) for one in group))
    found = []
    for group in by_length[: 4 * count]:  # all that are cut are equally long, so that a few more are looked at
        record = checked.learned[group[0].record_id]
        asked = len(checked.template.prompt_ids(record)) if record.prompt else 0
        whole = asked + max(one.answer_length for one in group)
        found.append((whole, record.origin or record.question))
    return sorted(found, reverse=True)[:count]


def advice(config: RunConfig, checked: Checked) -> list[str]:
    """Numbers that can be trained with and are hardly meant, each with what comes of it."""
    training, splits, plan = config.training, checked.prepared.splits, checked.plan
    n, total = checked.records - checked.drops.total, plan.global_batch_size
    found = []
    if n < total:
        found.append(
            f"training.global_batch_size: {total} records a step, but there are {n}: a step takes each more than once"
        )
    elif training.max_steps is None and n * training.epochs < total:
        found.append(
            f"training.epochs: {training.epochs:g} of {n} records is less than one step of {total}: one is taken"
        )
    rollouts = config.rollouts
    steps = expected_steps(config, checked)
    if config.trains_on_rollouts and rollouts.steps_on_a_round > steps:
        found.append(
            f"rollouts.steps_per_round: a round is for {rollouts.steps_on_a_round} steps and asks "
            f"{rollouts.steps_per_round * total} questions, but the run has {steps} steps: what is left is sampled in vain"
        )
    scored = rollouts.score_in_loss and rollouts.confidence == "likelihood"
    if config.trains_on_rollouts and scored and rollouts.reward_of_right:
        found.append(
            f"rollouts.accuracy_weight: {rollouts.reward_of_right:g} rewards being sure beside the score of a likelihood, "
            "which then ends above the truth (docs/rewards.md); leave it out to end there"
        )
    if config.trains_on_rollouts and rollouts.reward == "ppo_c" and rollouts.ppo_c.form != "proper":
        found.append(
            f"rollouts.ppo_c.form: {rollouts.ppo_c.form}, as published, is linear in the confidence: training ends at "
            "stating 0% or 100% (docs/rewards.md); `proper` ends at the truth"
        )
    held_out = len(splits["calibration"]) + len(splits["validation"])
    judged = config.trains_on_rollouts and any(isinstance(one, ModelSource) for one in rollouts.paid_by)
    if judged and getattr(config.objective, "beta", None) == 0.0:
        found.append(
            "objective.beta: 0 leaves nothing between the policy and what the reward model mistakes for good; 1 pays a nat "
            "of distance from the starting model for a nat of reward (docs/rlhf.md)"
        )
    if judged and not held_out:
        found.append(
            "data.splits: calibration and validation 0: nobody knows what the reward model is worth before it is used; 64 "
            "questions with answers, or pairs, would tell"
        )
    if config.trains_on_rollouts and rollouts.engine.overlap and rollouts.correction == "none":
        level = "sequence" if config.objective.needs.whole_answers else "token"
        found.append(
            "rollouts.engine.overlap: answers are drawn by weights of the round before; rollouts.correction: "
            f"{level}_truncate weighs them by the trainer's own log-probs"
        )
    if training.warmup_ratio == 1:
        found.append("training.warmup_ratio: 1: the learning rate reaches its peak at the last step")
    asked = len(splits["calibration"])
    if training.evaluate_every and training.evaluate_questions > asked:
        found.append(f"training.evaluate_questions: {training.evaluate_questions}, the calibration split holds {asked}")
    if 0 < len(checked.prepared.shots) < config.data.few_shot_raw:
        shots = len(checked.prepared.shots)
        found.append(f"data.few_shot_raw: {config.data.few_shot_raw}, the training split gives {shots}")
    kinds = {record.chosen is None for record in checked.learned}
    if config.trains_unpaired and len(kinds) == 1 and not needs_rejected(config, checked.prepared):
        kind = "undesirable" if kinds.pop() else "desirable"
        found.append(f"data.source: every answer is {kind}: none shows what the other kind is")
    return found + _certificate_advice(config, len(splits["temperature"]), len(splits["certification"]))


def _certificate_advice(config: RunConfig, temperature: int, certification: int) -> list[str]:
    """What keeps the run from a certificate. A reward model asks for none."""
    wanted = config.abstention
    if config.objective.needs.module == "reward head":
        return []
    least = minimum_answers(wanted.target_risk, wanted.delta)
    if temperature == 0 or certification == 0:
        empty = " and ".join(
            name for name, size in (("temperature", temperature), ("certification", certification)) if not size
        )
        return [f"data.splits: {empty} 0: the model can be trained, but `calibtrain calibrate` needs questions there"]
    if certification < least:
        return [
            f"data.splits.certification: {certification}: no certificate can come out of it, since abstention.target_risk "
            f"{wanted.target_risk:g} at delta {wanted.delta:g} needs at least {least} answers, all right"
        ]
    return []


def _ask(template: Template, records: Sequence[Record], shots: Sequence[Record] = (), most: float = 0.0) -> None:
    """Try the template on questions, the first also behind the examples.

    Raises the UserError of the first one that it refuses, where it refuses more than the share `most`.
    """
    refused: list[UserError] = []
    for index, record in enumerate(record for record in records if record.prompt):
        try:
            template.prompt_text(record, shots if index == 0 else ())
        except UserError as error:
            refused.append(error)
        if len(refused) > most * len(records):
            raise refused[0]


def evaluations(config: RunConfig, steps: int, questions: int) -> list[str]:
    """How many questions are asked while training, and when."""
    training, lines = config.training, []
    if held_out := config.data.splits.validation:
        times = math.ceil(steps / training.evaluate_loss_every) if training.evaluate_loss_every else 1
        lines.append(f"the loss on {held_out} held-out records, {times} times: training.evaluate_loss_every")
    if training.evaluate_every:
        times = math.ceil(steps / training.evaluate_every)
        lines.append(f"{min(training.evaluate_questions, questions)} questions, {times} times: training.evaluate_every")
    for penalty in config.penalties_on_answers[:1]:
        times = math.ceil(steps / penalty.refresh_every)
        asked = min(penalty.questions_per_refresh, questions)
        where = "" if penalty.name == "confidence_head" else "penalties."
        lines.append(f"{asked} questions, {times} times and after the last step: {where}{penalty.name}")
    if config.confidence_head is not None:
        most = config.confidence_head.fit_questions
        lines.append(
            f"at most {most} questions that nothing was learnt from, at the end: confidence_head.fit_questions"
        )
    return lines
