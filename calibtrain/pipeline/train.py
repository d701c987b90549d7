"""Training: from a config to an exported model, on every rank of whatever launched it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from calibtrain.confidence.answering import Answerer
from calibtrain.confidence.features import default_layers, depth_of
from calibtrain.confidence.likelihood import sample_answers
from calibtrain.config import RunConfig
from calibtrain.config_file import dump_config, without_answers, without_keys
from calibtrain.data.encode import Encoded
from calibtrain.data.lazy import Lazy
from calibtrain.data.loader import planned_steps
from calibtrain.data.templates import Template, template_of
from calibtrain.distributed import World, all_agree, check_alike, gather_lists, on_main, shard, start_world
from calibtrain.errors import Preempted
from calibtrain.hooks.base import HookList
from calibtrain.hooks.factory import default_hooks
from calibtrain.hooks.records import EndRecord, RunRecord
from calibtrain.models.arithmetic import settled, told, torch_dtype
from calibtrain.models.confidence_head import ConfidenceHead
from calibtrain.models.cost import peak_flops, work_of
from calibtrain.models.export import check_scale_folds
from calibtrain.models.loading import answering_config, load_model, load_tokenizer
from calibtrain.models.loss_model import Call, LossModel
from calibtrain.models.policy import Policy, check_head
from calibtrain.models.reward import RewardLossModel, ValueLossModel, check_classifier
from calibtrain.models.sequence_parallel import begin_sequence_group, check_in_parts, share_attention
from calibtrain.models.sharding import full_shape, let_go, run_sharded
from calibtrain.models.value import OwnValueLossModel, load_value_model
from calibtrain.pipeline.check import Checked, advice, check, check_rollout_engine
from calibtrain.pipeline.examples import training_examples, with_reference
from calibtrain.pipeline.export_run import export_run
from calibtrain.pipeline.own_code import trust
from calibtrain.pipeline.prepare import (
    SAMPLES_PER_QUESTION,
    Prepared,
    add_own_wrong_answers,
    learned_records,
    needs_rejected,
    with_examples,
)
from calibtrain.pipeline.provenance import write_provenance
from calibtrain.pipeline.reward_audit import measure_reward_models
from calibtrain.records import Record
from calibtrain.shared_files import check_shared
from calibtrain.training.answer_stream import AnswerStream
from calibtrain.training.averaging import WeightAverage
from calibtrain.training.best import check_metric
from calibtrain.training.changing_examples import ChangingExamples
from calibtrain.training.checkpoint import Progress, find_checkpoint, load_checkpoint
from calibtrain.training.deepspeed_config import BatchPlan, batch_plan, sharding
from calibtrain.training.engine import Engine, start_engine
from calibtrain.training.head_fit import HeadFit, askable, fresh_questions
from calibtrain.training.held_out import HeldOut, encode_held_out
from calibtrain.training.host_memory import release_freed_memory
from calibtrain.training.losses import build_losses, check_learns, measure_names, term_names
from calibtrain.training.preemption import StopRequests
from calibtrain.training.refusal_examples import RefusalExamples
from calibtrain.training.rollouts import Rollouts
from calibtrain.training.row_layout import row_layout
from calibtrain.training.spectra import build_spectra
from calibtrain.training.throughput import Meter
from calibtrain.training.trainer import Trainer
from calibtrain.training.unpaired_examples import UnpairedExamples
from calibtrain.training.weight_penalty import build_weight_penalties

logger = logging.getLogger(__name__)

HEAD_LAYERS = 4
"""Layers that a confidence head reads unless they are named."""


def run(config: RunConfig, *, last_weights: Path | None = None) -> Path:
    """Train and export. Returns the model directory. Collective: call it on every rank.

    `last_weights` also gets the weights of the last step, as they are before averaging and scale, to compare with.
    """
    _show_messages(main=os.environ.get("RANK", "0") == "0")
    if config.model.dtype == "auto":
        logger.info("%s", told(config))
        config = settled(config)
    # A mistake is told before anything is compiled or loaded, and before the ranks wait for each other.
    checked = check(config, int(os.environ.get("WORLD_SIZE", 1)))
    world = start_world()
    prepared, template = checked.prepared, checked.template
    config = with_examples(config, prepared)
    check_shared(config.output_dir, "output_dir", world)
    target = config.output_dir / "model"
    if on_main(lambda: checked.finished):
        logger.info("%s holds this very run, and it is finished: nothing to train", config.output_dir)
        return target
    check_alike(_what_ranks_share(config, checked), world)
    on_main(lambda: check_rollout_engine(config))
    for line in prepared.lines():
        logger.info("data: %s", line)
    for line in advice(config, checked) if world.is_main else []:
        logger.warning("%s", line)
    if needs_rejected(config, prepared):
        _add_rejected(config, prepared, template, world)
    prepared.splits["train"] = learned_records(config, prepared.splits["train"], prepared.drops)
    torch.manual_seed(config.seed + world.rank)
    engine, layout = begin_engine(config, template, world)
    examples = training_examples(config, prepared, template, engine.module, world)
    if examples:
        check_learns(config, engine.module, examples)
    validation = encode_held_out(prepared.splits["validation"], config, template)
    held_out = with_reference(config, validation, template, engine.module, world) if validation else []
    if world.device.type == "cpu":
        release_freed_memory()  # what flattening the weights left behind would be fragmented by the first steps
    trainer = _trainer(config, prepared, template, engine, world, layout, examples, held_out)
    checkpoint = on_main(lambda: find_checkpoint(config, world, trainer.data_hash))
    if world.is_main:
        write_provenance(config, checked, trainer, world)
    progress = Progress()
    if checkpoint is not None:
        progress = load_checkpoint(
            checkpoint, engine, trainer.stream, trainer.average, trainer.hooks, world, config, trainer.rollouts
        )
    elif isinstance(trainer.rollouts, Rollouts):
        held_out_questions = [*prepared.splits["calibration"], *prepared.splits["validation"]]
        measure_reward_models(trainer.rollouts, held_out_questions, config.output_dir)
    shared, artifacts = _what_hooks_share(config)
    record = RunRecord(shared, config.output_dir, trainer.total_steps, progress.step, world.rank, world.size)
    trainer.hooks.dispatch("on_start", record)
    error: str | None = None
    preempted = False
    try:
        with StopRequests(world) as stop:
            progress = trainer.fit(progress, stop)
        if last_weights is not None:
            export_run(config, engine, template, last_weights, 1.0, world)
        trainer.take_best(progress)
        head = trainer.finish(progress.step)
        export_run(config, engine, template, target, engine.module.policy.scale, world, head)
        on_main(lambda: trust(config, config.output_dir))  # whoever trains a config trusts the code that it names
    except Preempted as caught:
        progress, error, preempted = Progress(caught.step), str(caught), True
        raise
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"
        raise
    finally:
        if trainer.rollouts is not None:
            trainer.rollouts.close()
        trainer.hooks.dispatch(
            "on_end", EndRecord(progress.step, error, {"steps": progress.step}, artifacts, preempted)
        )
    return target


def _show_messages(*, main: bool) -> None:
    """Print calibtrain's own messages: all of rank 0's, warnings of the others."""
    root = logging.getLogger("calibtrain")
    root.setLevel(logging.INFO if main else logging.WARNING)
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
        root.propagate = False


def _what_ranks_share(config: RunConfig, checked: Checked) -> dict[str, str]:
    """Hashes of what every rank has read for itself and all must have alike."""
    text = json.dumps(config.resolved(), sort_keys=True)
    return {
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "data set": checked.records_hash,
        "chat template or tokenizer": checked.template.hash,
    }


def _what_hooks_share(config: RunConfig) -> tuple[dict[str, Any], list[Path]]:
    """The resolved config as a tracker may have it, and files of the run: without keys, and without examples' answers."""
    shared = without_keys(config) if config.tracking.log_answers else without_answers(config)
    written = config.output_dir / "config.yaml"
    if shared != config:
        written = config.output_dir / "shared" / "config.yaml"
        on_main(lambda: dump_config(shared, written))
    return shared.resolved(), [written, config.output_dir / "deepspeed.json"]


def begin_engine(config: RunConfig, template: Template, world: World) -> tuple[Engine, dict[str, Any]]:
    """The engine of a run and how its rows are laid out (`row_layout`). Collective.

    Raises UserError as `build_model`, and when the model's head is not supported.
    """
    model = build_model(config, template, world.device, sharding(config, world.size))
    engine = start_engine(model, config, world)  # first: what reads weights in parts runs within its forward alone
    engine.module(Call(lambda module: check_head(module.policy)))
    if (shared := begin_sequence_group(config.training.sequence_parallel_size)) is not None:
        share_attention(model.policy.model, shared)
        engine.module(Call(lambda module: check_in_parts(module.policy, shared)))
        model.shared_by = shared
    return engine, engine.module(Call(lambda module: row_layout(config, module.policy)))


def build_model(
    config: RunConfig,
    template: Template | None = None,
    device: torch.device | str = "cpu",
    zero: dict[str, Any] | None = None,
) -> LossModel:
    """The module that DeepSpeed wraps; a token that its losses need is added to the model and the template's tokenizer.

    It goes to `device` at once where each rank holds it whole. `zero` (of `sharding`): its weights lie in parts from the
    start, which is collective. Raises UserError when a loss cannot be built.
    """
    policy = Policy(load_model(config.model, zero))
    if config.training.zero_stage < 3:
        policy.to(device)
    # A penalty that moves only the logit scale is solved by the answer stream, outside the gradient.
    if any(getattr(penalty, "moves", None) == "scale" for penalty in config.penalties):
        check_scale_folds(policy.causal_model)
    if template is None:
        template = template_of(config, load_tokenizer(config.model))
    objective, penalties = build_losses(config, template, policy.causal_model)
    module = config.objective.needs.module
    if module == "reward head":
        check_classifier(policy.causal_model)
        return RewardLossModel(policy, objective, config.seed)
    if module == "value head":
        model: LossModel = ValueLossModel(policy, objective, penalties, config.seed)
    elif module == "value model":
        value = load_value_model(config, zero)
        if config.training.zero_stage < 3:
            value.to(device)
        model = OwnValueLossModel(policy, value, objective, penalties)
    else:
        model = LossModel(policy, objective, penalties)
    return with_confidence_head(model, config)


def with_confidence_head(model: LossModel, config: RunConfig) -> LossModel:
    """The model with the confidence head that is to learn along the run, on the device and in the dtype of its weights."""
    section = config.confidence_head
    if section is not None and config.trains_head:
        weight = model.policy.causal_model.get_input_embeddings().weight
        score, share = config.head_score
        model.confidence_head = ConfidenceHead(
            head_layers(config, model),
            full_shape(weight)[1],
            score=score,
            weight=share,
            trains_backbone=section.trains_backbone,
        ).to(weight.device, weight.dtype)
    return model


def head_layers(config: RunConfig, model: LossModel) -> tuple[int, ...]:
    """Layers whose states a confidence head reads; none without one."""
    section = config.confidence_head
    return () if section is None else section.layers or default_layers(depth_of(model), HEAD_LAYERS)


def _trainer(
    config: RunConfig,
    prepared: Prepared,
    template: Template,
    engine: Engine,
    world: World,
    layout: dict[str, Any],
    examples: Sequence[tuple[Encoded, ...]],
    validation: Sequence[tuple[Encoded, ...]] = (),
) -> Trainer:
    train = prepared.splits["train"]
    plan = batch_plan(config.training, world.size)
    answerer = Answerer(engine.module, template, config.evaluation, world, lockstep=engine.stage == 3)
    changing = _changing_examples(config, train, answerer, plan, examples)
    examples = examples if changing is None else changing
    for line in prepared.drops.lines() if world.is_main else []:
        logger.warning("data: %s", line)
    steps = planned_steps(config.training, len(examples), plan.global_batch_size, config.passes)
    questions = prepared.splits["calibration"]
    stream = None
    if config.penalties_on_answers:
        stream = AnswerStream(config.penalties_on_answers, answerer, questions, config.seed, config.data.max_length)
    average = None
    if config.training.average_last:
        average = WeightAverage(engine.module.policy, config.training.average_last, steps, world.rank, world.size)
    head_fit = None
    if config.confidence_head is not None:
        fresh = fresh_questions(config, train, steps, plan.global_batch_size)
        fresh = fresh if len(examples) == len(train) else []  # else a step's index is not that of a record
        able = askable((*questions, *fresh, *prepared.drops.spare), template, config.confidence_head.fit_questions)
        head_fit = HeadFit(engine, answerer, able, head_layers(config, engine.module), config.seed, world)
    measured = HeldOut(config, validation, template.pad_id, world, **layout) if validation else None
    if config.training.best is not None:
        check_metric(config.training.best, [] if measured is None else measured.keys(engine.module))
    return Trainer(
        config=config,
        engine=engine,
        examples=examples,
        origins=Lazy(len(train), lambda place: train[place].origin or train[place].question),
        plan=plan,
        total_steps=steps,
        world=world,
        answerer=answerer,
        hooks=HookList(default_hooks(config, world.rank, term_names(config), measure_names(config))),
        output_dir=config.output_dir,
        data_hash=prepared.data_hash,
        stream=stream,
        average=average,
        weight_penalties=build_weight_penalties(config, engine, world),
        spectra=build_spectra(config, engine, world),
        **layout,
        evaluation_questions=questions,
        held_out=measured,
        rollouts=changing,
        head_fit=head_fit,
        meter=_meter(config, engine, world),
    )


def _meter(config: RunConfig, engine: Engine, world: World) -> Meter:
    peak, given = peak_flops(world.device, torch_dtype(settled(config).model)), config.tracking.peak_tflops
    return Meter(world.device, work_of(engine.module.policy.causal_model), given * 1e12 if given else peak)


def _changing_examples(
    config: RunConfig,
    train: Sequence[Record],
    answerer: Answerer,
    plan: BatchPlan,
    examples: Sequence[tuple[Encoded, ...]],
) -> ChangingExamples | None:
    """What stands in the place of the training records as they are, by the data that the objective needs."""
    data = config.objective.needs.data
    if data == "rollouts":
        return _rollouts(config, train, answerer, plan)
    if data == "relabelled":
        return RefusalExamples(config.objective, answerer, train, config.data.max_length)  # type: ignore[arg-type]
    return UnpairedExamples(examples, answerer, plan, config.seed) if data == "unpaired" else None


def _rollouts(config: RunConfig, train: Sequence[Record], answerer: Answerer, plan: BatchPlan) -> Rollouts:
    live = config.objective.needs.reference == "live" and config.model.lora is None
    reference = starting_model(config, answerer.world)[0] if live else None
    return Rollouts(config, answerer, train, plan, reference)


def starting_model(config: RunConfig, world: World) -> tuple[LossModel, Any]:
    """The frozen model that the run starts from, without adapters; under ZeRO-3 in parts, with its engine. Collective."""
    zero = sharding(config, world.size)
    model = LossModel(Policy(load_model(answering_config(config.model), zero))).eval().requires_grad_(False)
    if zero is None:
        return model.to(world.device), None
    engine = run_sharded(model, torch_dtype(config.model), zero["zero_optimization"])
    return engine.module.eval(), engine


def _add_rejected(config: RunConfig, prepared: Prepared, template: Template, world: World) -> None:
    """Sample wrong answers from the starting model, each rank its share."""

    def sample(records: Sequence[Record], shots: Sequence[Record]) -> list[list[str]]:
        lockstep = config.training.zero_stage == 3
        mine = shard(records, world)
        more = [records[0]] if lockstep and len(mine) < -(-len(records) // world.size) else []  # as many on every rank
        model, engine = starting_model(config, world)
        own = sample_answers(
            model,
            template,
            [*mine, *more],
            config.evaluation,
            samples=SAMPLES_PER_QUESTION,
            seed=config.seed + world.rank,
            shots=shots,
            device=world.device,
            all_done=(lambda done: all_agree(done, world.device)) if lockstep else bool,
        )
        if engine is not None:
            let_go(engine)
        return gather_lists(own[: len(mine)])

    add_own_wrong_answers(config, prepared, template, sample)
    if world.device.type == "cpu":
        release_freed_memory()  # the sampled batches' and that model's, which training would otherwise come on top of
