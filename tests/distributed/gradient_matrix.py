"""Every loss that there is, with full weights and LoRA, tied and untied heads, at each ZeRO stage: three steps by name."""

from __future__ import annotations

from typing import Any, get_args

from calibtrain.config_losses import Objective, OwnAnswersConfig, Penalty, WeightPenaltyConfig
from tests.distributed.gradient_cases import LORA, Case
from tests.distributed.jobs import SHARDED

ANSWERING = {"refresh_every": 1, "answers_per_step": 5}
SCORED = {"name": "answer_score", "moves": "all", **ANSWERING}
"""Beside every objective that can bear it, so that the model answers between the steps."""
MINE = "tests.distributed.own_loss:Mine"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "label_smoothing": {"tokens": ["is", "it", "of"]},
    "custom": {"loss": MINE},
    "refusal": {"relabel_every": 1},
    "reward_model": {"confidence_statements": "none"},
    "correctness_query": {"choices": ["In", "of"]},
    "tokenized_brier": {"levels": ["is", "it", "of"]},
    "answer_score": {"moves": "all"},
}
SAMPLED = {"group_size": 2, "reward": "accuracy", "epochs": 2}
ROLLOUTS: dict[str, dict[str, Any]] = {"rloo": {"epochs": 1}}
"""Ratios of whole answers grow, behind steps as large as these, to gradients of 45,000 with their rounding."""
MORE_OBJECTIVES = {"ppo_own": {"objective": {"name": "ppo", "value_model": "own"}, "rollouts": SAMPLED}}


def named(union: Any) -> dict[str, Any]:
    """The sections of a discriminated union by the name in YAML."""
    return {section.model_fields["name"].default: section for section in get_args(get_args(union)[0])}


def with_objective(name: str, section: Any) -> dict[str, Any]:
    """Sections of a run that trains on it, and answers between the steps where something reads its answers."""
    objective = {"name": name, **ARGUMENTS.get(name, {})}
    needs = section.model_validate(objective).needs
    found: dict[str, Any] = {"objective": objective}
    if needs.data == "rollouts":
        found["rollouts"] = {**SAMPLED, **ROLLOUTS.get(name, {})}
    if needs.module != "reward head":
        found["penalties"] = [SCORED]
    return found


def with_penalty(name: str, section: Any) -> dict[str, Any]:
    """Sections of an SFT run with it."""
    more = ANSWERING if issubclass(section, OwnAnswersConfig) else {}
    return {"objective": {"name": "sft"}, "penalties": [{"name": name, **ARGUMENTS.get(name, {}), **more}]}


def with_weight_penalty(name: str) -> dict[str, Any]:
    """Sections of an SFT run whose weights it holds, all of them and exactly."""
    held = {"name": name, "layer_fraction": 1.0, "probes": None}
    return {"objective": {"name": "sft"}, "penalties": [SCORED], "weight_penalties": [held]}


HEAD = {"objective": {"name": "sft"}, "confidence_head": {**ANSWERING, "learning_rate": 3e-3, "trains_backbone": True}}
LOSSES: dict[str, dict[str, dict[str, Any]]] = {
    "objectives": {**{name: with_objective(name, one) for name, one in named(Objective).items()}, **MORE_OBJECTIVES},
    "penalties": {
        **{f"with_{name}": with_penalty(name, one) for name, one in named(Penalty).items()},
        "with_head": HEAD,
    },
    "weight penalties": {
        f"held_{name}": with_weight_penalty(name)
        for name in get_args(WeightPenaltyConfig.model_fields["name"].annotation)
    },
}
MODELS = {
    f"{weights}_{head}": {
        "model": LORA if weights == "lora" else {},
        "checkpoint": "model" if head == "tied" else "untied",
    }
    for weights in ("full", "lora")
    for head in ("tied", "untied")
}
STAGES: dict[str, dict[str, Any]] = {
    "stage0": {"training": {"zero_stage": 0}},
    "stage1": {"training": {"zero_stage": 1}},
    "stage2": {"training": {"zero_stage": 2}},
    "stage3": {"training": {"zero_stage": 3}, "zero": SHARDED},
    "offload_stage3": {
        "training": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        "zero": SHARDED,
    },
}
REFERENCE = "stage0"
KINDS: dict[str, list[str]] = {
    kind: [f"{loss}_{model}" for loss in losses for model in MODELS] for kind, losses in LOSSES.items()
}
"""Families of what must come out the same, by what they are for."""
MATRIX = {
    f"{loss}_{model}_{stage}": Case(
        f"{loss}_{model}",
        losses=sections,
        **of_model,
        training={"max_steps": 3, **of_stage["training"]},
        zero=of_stage.get("zero", {}),
    )
    for losses in LOSSES.values()
    for loss, sections in losses.items()
    for model, of_model in MODELS.items()
    for stage, of_stage in STAGES.items()
}
