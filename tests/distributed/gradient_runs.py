"""Run by test_gradients on several ranks: full gradients and weights of a few steps of each case.

Usage: gradient_runs.py FOLDER CASE_NAMES (comma-separated). Rank 0 writes FOLDER/<case>.pt.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from calibtrain.confidence.answering import Answerer
from calibtrain.config import RunConfig
from calibtrain.data.drops import DropReport
from calibtrain.data.encode import Encoded, encode_records
from calibtrain.data.templates import Template
from calibtrain.data.unpaired import mismatched
from calibtrain.distributed import World, barrier, gather_lists, leave_world, start_world
from calibtrain.hooks.base import HookList
from calibtrain.models.export import gathered_weights
from calibtrain.models.loading import load_model, load_tokenizer
from calibtrain.models.loss_model import Call, LossModel
from calibtrain.models.policy import Policy
from calibtrain.models.reward import RewardLossModel, ValueLossModel
from calibtrain.models.sequence_parallel import begin_sequence_group, check_in_parts, share_attention
from calibtrain.models.sharding import is_sharded
from calibtrain.models.value import OwnValueLossModel, load_value_model
from calibtrain.pipeline.prepare import learned_records
from calibtrain.pipeline.train import with_confidence_head
from calibtrain.records import Message, Record
from calibtrain.tasks import short_answer
from calibtrain.training import engine as engine_module
from calibtrain.training.answer_stream import AnswerStream
from calibtrain.training.checkpoint import Progress
from calibtrain.training.deepspeed_config import batch_plan
from calibtrain.training.engine import Engine, start_engine
from calibtrain.training.engine_state import holders
from calibtrain.training.losses import build_losses
from calibtrain.training.refusal_examples import RefusalExamples
from calibtrain.training.rollouts import Rollouts
from calibtrain.training.samples import Sample
from calibtrain.training.sampling import Sampling
from calibtrain.training.trainer import Trainer
from calibtrain.training.unpaired_examples import UnpairedExamples
from calibtrain.training.weight_penalty import build_weight_penalties
from tests.distributed.gradient_cases import CASES, EIGHT_BIT_CASES, FOUR_BIT_CASES, Case
from tests.distributed.gradient_matrix import MATRIX
from tests.distributed.jobs import SHARDED

STEPS, RECORDS, ANSWERS = 2, 12, 5


def records() -> list[Record]:
    """Pairs of very different lengths, so that no two micro-batches hold as many tokens."""
    return [
        Record(
            prompt=(Message("user", f"What is number {i}{' and what comes then' * (i % 4)}?"),),
            chosen=f"It is {i}" + " and more" * (i * 7 % 5),
            rejected=f"no {i + 1}" + " or so" * (i * 3 % 4),
            accepted=(f"It is {i}",),
            origin=f"r{i}",
        )
        for i in range(RECORDS)
    ]


@dataclass(frozen=True)
class Told:
    """A graded answer, as far as a penalty on its confidence goes."""

    confidence: float


class FixedAnswers(AnswerStream):
    """The same graded answers in every round, whatever the model says: it is asked all the same, between the steps."""

    def _ask(self, round_number: int) -> Any:
        if self.answerer is not None:
            self.answerer(self.questions[:ANSWERS])
        self.asked = list(range(ANSWERS))
        self.texts = [f"It is {i} I think" + " perhaps" * i for i in self.asked]
        self.correct = [i % 2 == 0 for i in self.asked]
        if self.answerer is not None:
            self._fit([Told(0.3 + 0.1 * i) for i in self.asked])


class FixedSampling(Sampling):
    """The same samples in every round, whatever the policy would say."""

    def __call__(self, asked: Sequence[int], step: int, streams: Sequence[str]) -> list[Sample]:
        """Two to each question."""
        samples = fixed_samples(self.answerer.template)
        return [one for i in asked for one in samples[2 * i : 2 * i + 2]]


def fixed_samples(template: Template) -> list[Sample]:
    """Two answers to each question, of different lengths, graded alike to every third one."""
    return [
        Sample(
            question=i,
            tokens=tuple(template.completion_ids(f"It is {i + k}" + " perhaps" * (i % 3 + k))),
            correct=float((i + k) % 2 == 0 or i % 3 == 0),
            confidence=0.5,
            finished=(i + k) % 4 != 1,
        )
        for i in range(RECORDS)
        for k in range(2)
    ]


def trained_parameters(module: LossModel) -> list[tuple[str, torch.nn.Parameter]]:
    """All of a module's, those of the policy by their names in it."""
    return [(name.removeprefix("policy."), one) for name, one in module.named_parameters()]


class Recording(Engine):
    """Keeps full gradients, unclipped, of each parameter at each step."""

    def step(self) -> tuple[bool, float | None]:
        """Record, then step."""
        found = {
            name: gradient.cpu().float().clone()
            for name, parameter in trained_parameters(self.module)
            if parameter.requires_grad and (gradient := safe_get_full_grad(parameter)) is not None
        }
        self.gradients.append(found)  # type: ignore[attr-defined]
        skipped, norm = super().step()
        assert not skipped
        self.norms.append(norm)  # type: ignore[attr-defined]
        return skipped, norm


def trained(module: LossModel) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters of the policy by their names in it, and a head's."""
    head = [] if module.confidence_head is None else module.confidence_head.named_parameters(prefix="confidence_head")
    return [*module.policy.named_parameters(), *head]


def with_reference(one: Encoded) -> Encoded:
    """The sequence with log-probs of a reference that is less likely to say it than a tiny model is."""
    return replace(one, reference_logprobs=tuple(-6.2 - 0.1 * (k % 5) for k in range(one.completion_length)))


def examples_of(config: RunConfig, template: Template) -> list[tuple[Encoded, ...]]:
    """`records()` as sequences; for unpaired answers, each with its mismatched one."""
    length, unpaired = config.data.max_length, config.trains_unpaired
    learned = learned_records(config, records(), DropReport())
    examples = encode_records(learned, template, length, config.trains_on_pairs, DropReport(), unpaired=unpaired)
    if unpaired:
        labelled = [one for (one,) in examples]
        examples = list(zip(labelled, mismatched(labelled, length, None), strict=True))
    return [tuple(with_reference(one) for one in group) for group in examples]


def config_of(case: Case, model: Path) -> RunConfig:
    """The run of a case: 8 records a step; a smooth optimiser, so that rounding is not blown up by sign(g)."""
    training = {
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "adam_epsilon": 1e-2,
        "max_grad_norm": 1.0,
        "max_steps": STEPS,
        **case.training,
    }
    name = {"ppo_own": "ppo", "sampled": "grpo", "chosen": "grpo"}.get(case.objective, case.objective)
    losses: dict[str, Any] = {
        "objective": {"name": name, **({"nll_scope": "full"} if case.objective in ("orpo", "sft") else {})},
        "penalties": [{"name": "answer_score", "moves": "all", "refresh_every": 1, "answers_per_step": ANSWERS}],
    }
    if case.objective == "grpo":
        rollouts = {"group_size": 2, "reward": "log", "accuracy_weight": 2.0, "score_weight": 0.5}
        losses = {"objective": {"name": "grpo"}, "rollouts": rollouts}
    if case.objective == "sampled":
        rollouts = {"group_size": 4, "reward": "log", "epochs": 2, "correction": "token_truncate"}
        losses = {"objective": {"name": "grpo"}, "rollouts": rollouts}
    if case.objective == "chosen":
        losses = {
            "objective": {"name": "grpo"},
            "rollouts": {"group_size": 3, "reward": "accuracy", "epochs": 2, "dynamic_sampling": 3},
        }
    if name == "ppo":
        objective = {"name": "ppo", "value_model": "own" if case.objective == "ppo_own" else "shared"}
        losses = {"objective": objective, "rollouts": {"group_size": 2, "reward": "accuracy", "epochs": 2}}
    losses = case.losses or losses
    return RunConfig.model_validate(
        {
            "model": {"source": str(model), "dtype": "fp32", **case.model},
            "data": {"max_length": 96, **case.data},
            **losses,
            "confidence_head": None
            if case.head is None
            else {"refresh_every": 1, "answers_per_step": ANSWERS, "learning_rate": 3e-3, **case.head},
            "training": training,
            "evaluation": {"batch_size": 4, "max_new_tokens": 3},
        }
    )


def build(config: RunConfig, zero: dict[str, Any] | None = None) -> LossModel:
    """The module of a run; LoRA's adapters are made different from zero, so that both halves learn, and so are biases."""
    torch.manual_seed(1)
    model = load_model(config.model, zero)
    if zero is not None:
        assert is_sharded(next(model.parameters()))
    unlike_zero(model)
    policy = Policy(model)
    objective, penalties = build_losses(config, Template("plain", load_tokenizer(config.model)), model)
    module = config.objective.needs.module
    if module == "reward head":
        return RewardLossModel(policy, objective, seed=5)
    if module == "value head":
        return ValueLossModel(policy, objective, penalties, seed=5)
    if module == "value model":
        value = load_value_model(config, zero)
        unlike_zero(value)
        return OwnValueLossModel(policy, value, objective, penalties)
    found = with_confidence_head(LossModel(policy, objective, penalties), config)
    with torch.no_grad():
        for parameter in found.confidence_head.parameters() if found.confidence_head else ():
            parameter += 0.3 * torch.randn(parameter.shape)
    return found


def unlike_zero(model: torch.nn.Module) -> None:
    """Draw what starts at zero, and would keep others from a gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith(".bias"):
                if is_sharded(parameter):
                    import deepspeed

                    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                        parameter.normal_(std=0.1)
                else:
                    parameter.normal_(std=0.1)


def layout_of(engine: Engine) -> list[dict[str, Any]]:
    """Of all ranks' holders: the parts in each of their flat tensors, and the bits that its moments take. Collective."""
    found = []
    for one in holders(engine):
        parts = [(part.name.removeprefix("policy."), part.start, part.offset, part.size) for part in one.parts]
        bits = 8 * one.state.get("state1", one.master).element_size()
        found.append({"parts": parts, "size": one.flat.numel(), "bits": bits, "keys": sorted(one.state)})
    return gather_lists(found)


def run_case(case: Case, model: Path, world: World) -> dict[str, Any]:
    """Gradients, norms and weights of STEPS steps."""
    config = config_of(case, model)
    plain, passes = engine_module.deepspeed_dict, engine_module.leave_out_passes

    def with_more(*args: Any, **options: Any) -> dict[str, Any]:
        settings = plain(*args, **options)
        return {**settings, "zero_optimization": {**settings["zero_optimization"], **case.zero}}

    engine_module.deepspeed_dict = with_more
    if not case.own_passes:
        engine_module.leave_out_passes = lambda *_: None
    try:
        zero = None if case.whole_load or config.training.zero_stage < 3 else with_more(config, world.size)
        started = start_engine(build(config, zero), config, world)
    finally:
        engine_module.deepspeed_dict, engine_module.leave_out_passes = plain, passes
    if case.zero is SHARDED:
        assert not any(one.numel() for one in started.module.parameters())
    shared = begin_sequence_group(config.training.sequence_parallel_size)
    if shared is not None:
        share_attention(started.module.policy.model, shared)
        started.module(Call(lambda module: check_in_parts(module.policy, shared)))
        started.module.shared_by = shared
    engine = Recording(started.deepspeed, started.stage, started.full_gradients)
    engine.gradients, engine.norms = [], []  # type: ignore[attr-defined]
    template = Template("plain", load_tokenizer(config.model))
    trainer = make_trainer(config, engine, template, world)
    trainer.fit(Progress())
    layout = layout_of(engine)
    weights = gathered_weights(engine.module.policy, keep=world.is_main)
    if engine.module.confidence_head is not None:
        weights |= gathered_weights(engine.module.confidence_head, keep=world.is_main)
    engine.deepspeed.destroy()
    said = [list(one.tokens) for one in trainer.rollouts.samples] if config.trains_on_rollouts else []
    if isinstance(trainer.rollouts, RefusalExamples):
        said = trainer.rollouts.state_dict()["texts"]
    if config.rollouts.dynamic_sampling:
        assert trainer.rollouts.metrics["thrown_away"] > 0
        assert trainer.rollouts.metrics["without_signal"] < 1
    told = {"gradients": engine.gradients, "norms": engine.norms}  # type: ignore[attr-defined]
    return {**told, "weights": weights, "said": said, "layout": layout}


def make_trainer(config: RunConfig, engine: Engine, template: Template, world: World) -> Trainer:
    """Trainer over `records()` with fixed graded answers."""
    answerer = Answerer(engine.module, template, config.evaluation, world, lockstep=engine.stage == 3)
    plan = batch_plan(config.training, world.size)
    examples: Any
    stream = changing = None
    if config.trains_on_rollouts:
        examples = changing = Rollouts(config, answerer, records(), plan)
        if config.rollouts.group_size == 2:
            changing.sampling = FixedSampling(config, answerer, records())
    else:
        examples = examples_of(config, template)
        if config.penalties_on_answers:
            stream = FixedAnswers(config.penalties_on_answers, answerer, records(), 0, config.data.max_length)
    if config.objective.needs.data == "relabelled":
        examples = changing = RefusalExamples(config.objective, answerer, records(), config.data.max_length)
    if config.trains_unpaired:
        examples = changing = UnpairedExamples(examples, answerer, plan, config.seed)
    return Trainer(
        config=config,
        engine=engine,
        examples=examples,
        origins=[one.origin for one in learned_records(config, records(), DropReport())],
        plan=plan,
        total_steps=config.training.max_steps or STEPS,
        world=world,
        answerer=answerer,
        hooks=HookList([]),
        output_dir=Path(),
        data_hash="",
        stream=stream,
        weight_penalties=build_weight_penalties(config, engine, world),
        packing_tokens=config.packing_tokens,
        shared_prefix=config.shares_prompts,
        rollouts=changing,
    )


def third_right(text: str, accepted: Sequence[str], method: str) -> bool:
    """A grade that a random model gets right a third of the time."""
    return len(text) % 3 == 0


if __name__ == "__main__":
    short_answer.grade = third_right  # of what a policy samples by itself; fixed answers bring their grades
    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    world = start_world()
    for name in names:
        case = {**CASES, **FOUR_BIT_CASES, **EIGHT_BIT_CASES, **MATRIX}[name]
        os.environ["CALIBTRAIN_OPS"] = case.ops
        result = run_case(case, folder / case.checkpoint, world)
        if world.is_main:
            assert all(math.isfinite(norm) for norm in result["norms"])
            torch.save(result, folder / f"{name}-{world.size}.pt")
        barrier()
    leave_world()
