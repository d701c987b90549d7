"""The whole run in one strict tree: what a YAML file may say, with defaults, units and cross-checks.

Only pydantic is imported here, so that `calibtrain --help` stays fast. Reading YAML, overrides and error messages with
nearest-name hints live in `calibtrain.config_file`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from calibtrain.attention_names import told_by_length
from calibtrain.config_abstention import AbstentionConfig, CalibrationConfig
from calibtrain.config_base import BelowOne, Count, Positive, Section
from calibtrain.config_checks import unfit_answers, unfit_for_objective, unfit_for_shared_rows
from calibtrain.config_data import DataConfig, FileSource, GeographySource, HubSource, MixtureSource, SplitSizes
from calibtrain.config_head import ConfidenceHeadConfig
from calibtrain.config_losses import (
    AnswerScoreConfig,
    NLLScope,
    Objective,
    ORPOConfig,
    OwnAnswersConfig,
    Penalty,
    RefusalConfig,
    RewardModelConfig,
    SFTConfig,
    WeightPenaltyConfig,
)
from calibtrain.config_rollouts import GRPOConfig, PolicyGradientConfig, PPOConfig, RLOOConfig, RolloutsConfig
from calibtrain.config_tasks import ShortAnswerTask, TaskConfig
from calibtrain.config_tracking import TrackingConfig
from calibtrain.config_training import TrainingConfig, unfit_best

__all__ = [
    "AnswerScoreConfig",
    "ConfidenceHeadConfig",
    "FileSource",
    "GRPOConfig",
    "GeographySource",
    "HubSource",
    "MixtureSource",
    "ORPOConfig",
    "OwnAnswersConfig",
    "PPOConfig",
    "PolicyGradientConfig",
    "RLOOConfig",
    "RefusalConfig",
    "RewardModelConfig",
    "RolloutsConfig",
    "RunConfig",
    "SFTConfig",
    "SplitSizes",
    "TrackingConfig",
    "TrainingConfig",
    "WeightPenaltyConfig",
]


class LoRAConfig(Section):
    """Low-rank adapters through PEFT (Hu et al. 2021, arXiv 2106.09685); merged into the exported model."""

    r: Count = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """The adapter's output is scaled by alpha / r."""
    dropout: BelowOne = 0.0
    """On the adapter's input."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers to adapt, or all of them but the head."""
    rank_stabilized: bool = False
    """The adapter's output is scaled by alpha / sqrt(r), so that a higher rank learns more (arXiv 2312.03732)."""
    dora: bool = False
    """Train the length of each row of the adapted weight apart from its direction (DoRA, arXiv 2402.09353); needs weights
    that are whole in a layer's forward, so zero_stage 0, 1 or 2."""
    load_in_4bit: bool = False
    """Hold the frozen linear layers in four bits (QLoRA, arXiv 2305.14314): NF4 with double quantisation, through
    bitsandbytes. The exported model is of the unpacked layers."""


class OFTConfig(Section):
    """Orthogonal fine-tuning through PEFT (Qiu et al. 2023, arXiv 2306.07280): W = W0 R, R block-diagonal and orthogonal."""

    kind: Literal["oft"]
    block_size: Annotated[int, Field(ge=2)] = 32
    """Inputs that one block of R turns; must divide the layers' input sizes."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers to adapt, or all of them but the head."""


class SharedRotationConfig(Section):
    """One rotation of both singular bases and one scale of all singular values per matrix (docs/forgetting.md)."""

    kind: Literal["shared_rotation"]
    rank: Annotated[int, Field(ge=2)] = 64
    """Largest singular directions that turn among themselves; as many as the matrix has reach every shared rotation."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers to adapt, or all of them but the head."""


Adapter = Annotated[OFTConfig | SharedRotationConfig, Field(discriminator="kind")]


class ModelConfig(Section):
    """Which model to start from and how to hold it."""

    source: str = "embedded:smollm2-135m-instruct"
    """`embedded:smollm2-135m-instruct`, a local Hugging Face directory (./ counts from the YAML file) or a hub name."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model: only for authors you trust."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the weights in the forward and backward pass; `auto`: bf16 where the machine has instructions for it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers; flash_attention_2 packs, and shares no prompts."""
    compile: bool = False
    """Compile the layers with torch.compile for training: the first step takes a minute longer, the others are faster."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters only; null trains every weight."""
    adapter: Adapter | None = None
    """Train rotations of the weights only; merged into the exported model."""

    @model_validator(mode="after")
    def _one_adapter(self) -> ModelConfig:
        if self.lora is not None and self.adapter is not None:
            raise ValueError("lora and adapter exclude each other; set one of them to null")
        return self


class EvaluationConfig(Section):
    """How questions are answered."""

    batch_size: Count = 64
    """Questions answered at once on one rank."""
    max_new_tokens: Count = 12
    """A reply not finished after so many tokens is cut, and counts as it stands; by default what `task.kind` needs."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a reply and are no part of it, e.g. `["\\nQ:"]`; none may end in a space."""


class RunConfig(Section):
    """One run, from the raw model to the certified artefact."""

    name: str = "run"
    """Shown in W&B and in the report."""
    output_dir: Path = Path("out")
    """Everything the run makes, and of no other run; relative to the working directory."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of data order, sampling and dropout."""
    model: ModelConfig = ModelConfig()
    """The model."""
    data: DataConfig = DataConfig()
    """The data."""
    task: TaskConfig = ShortAnswerTask()
    """What an answer is, and when it is right."""
    objective: Objective = ORPOConfig()
    """What training minimises."""
    rollouts: RolloutsConfig = RolloutsConfig()
    """Sampling and reward of the objectives grpo, rloo and ppo."""
    penalties: tuple[Penalty, ...] = ()
    """Added to the objective with their weights."""
    confidence_head: ConfidenceHeadConfig | None = None
    """Learns beside the model when its answers are right; null trains none."""
    weight_penalties: tuple[WeightPenaltyConfig, ...] = ()
    """Hold the weights near those that training started from."""
    training: TrainingConfig = TrainingConfig()
    """The optimiser and the engine."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Answering."""
    calibration: CalibrationConfig = CalibrationConfig()
    """What confidence means."""
    abstention: AbstentionConfig = AbstentionConfig()
    """When to say nothing."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the numbers go."""

    @model_validator(mode="before")
    @classmethod
    def _where_grading_was(cls, values: Any) -> Any:
        """Runs of earlier versions say how to grade under `evaluation`."""
        evaluation = values.get("evaluation") if isinstance(values, dict) else None
        if not isinstance(evaluation, dict) or "grading" not in evaluation or "task" in values:
            return values
        kept = {key: value for key, value in evaluation.items() if key != "grading"}
        return {**values, "evaluation": kept, "task": {"kind": "short_answer", "match": evaluation["grading"]}}

    @model_validator(mode="after")
    def _tokens_of_the_task(self) -> RunConfig:
        if (
            "max_new_tokens" not in self.evaluation.model_fields_set
            and self.evaluation.max_new_tokens != self.task.TOKENS
        ):
            # Only here, while the tree is built: afterwards nothing changes.
            self.__dict__["evaluation"] = self.evaluation.model_copy(update={"max_new_tokens": self.task.TOKENS})
        return self

    @model_validator(mode="after")
    def _cross_checks(self) -> RunConfig:
        if self.model.dtype == "bf16" and self.training.zero_stage == 0:
            raise ValueError(
                "training.zero_stage: 0 with model.dtype: bf16 leaves the other stages' trajectory in DeepSpeed 0.19; "
                "take zero_stage: 1, which on one process is the same without the error, or dtype: fp32"
            )
        if self.model.compile and self.training.zero_stage == 3:
            raise ValueError("model.compile needs weights that are whole in a layer's forward: zero_stage 0, 1 or 2")
        if problem := unfit_for_objective(self) or unfit_for_shared_rows(self):
            raise ValueError(problem)
        names = [getattr(penalty, "loss", penalty.name) for penalty in self.penalties]
        if len(set(names)) != len(names):
            raise ValueError(f"penalties: each may appear once, got {names}")
        held = [penalty.name for penalty in self.weight_penalties]
        if len(set(held)) != len(held):
            raise ValueError(f"weight_penalties: each may appear once, got {held}")
        if self.model.lora is not None and self.model.lora.dora:
            if self.training.zero_stage == 3:
                raise ValueError("model.lora.dora reads whole weights beside their layers: take zero_stage 0, 1 or 2")
            if held or self.tracking.spectra_every:
                raise ValueError(
                    "weight_penalties and tracking.spectra_every do not know the lengths of model.lora.dora"
                )
        if self.model.lora is not None and self.model.lora.load_in_4bit:
            if held or self.tracking.spectra_every:
                raise ValueError(
                    "weight_penalties and tracking.spectra_every cannot read weights that model.lora.load_in_4bit packs"
                )
            if self.model.compile:
                raise ValueError(
                    "model.compile: false is needed by model.lora.load_in_4bit, whose layers unpack weights"
                )
        if held and self.model.adapter is not None:
            raise ValueError("weight_penalties act on weights or LoRA; model.adapter is a constraint already")
        if self.tracking.spectra_every and self.model.adapter is not None:
            raise ValueError("tracking.spectra_every reads trained weights or LoRA, not model.adapter; set it to 0")
        if self.model.lora is not None and any(penalty.scale == "free" for penalty in self.weight_penalties):
            raise ValueError("weight_penalties: scale: free has no closed form under model.lora; take scale: fixed")
        if problem := unfit_answers(self) or unfit_best(self):
            raise ValueError(problem)
        if self.training.evaluate_every and self.data.splits.calibration == 0:
            raise ValueError("training.evaluate_every needs questions: set data.splits.calibration to 128..512")
        if self.training.evaluate_loss_every and self.data.splits.validation == 0:
            raise ValueError("training.evaluate_loss_every needs records: set data.splits.validation to 100 or so")
        return self

    @property
    def trains_on_pairs(self) -> bool:
        """Whether the objective compares a chosen with a rejected answer."""
        return self.objective.needs.data == "pairs"

    @property
    def trains_unpaired(self) -> bool:
        """Whether the objective learns from answers that are each desirable or not."""
        return self.objective.needs.data == "unpaired"

    @property
    def nll_scope(self) -> NLLScope:
        """Whether prompt tokens are targets as well."""
        return getattr(self.objective, "nll_scope", "completion")

    @property
    def penalties_in_loss(self) -> list[Penalty]:
        """The penalties whose gradient trains the weights, with the score of a likelihood that `rollouts` ask for."""
        found = [penalty for penalty in self.penalties if getattr(penalty, "moves", "all") == "all"]
        likelihood = self.trains_on_rollouts and self.rollouts.confidence == "likelihood"
        if likelihood and not found and (score := self.rollouts.score_in_loss):
            found.append(AnswerScoreConfig(moves="all", score=score, weight=self.rollouts.score_weight))
        return found

    @property
    def penalties_on_answers(self) -> list[OwnAnswersConfig]:
        """The penalties, and the head, for which the model answers questions of the calibration split while it trains."""
        sections = (*self.penalties, *([self.confidence_head] if self.trains_head else []))
        answering = [section for section in sections if isinstance(section, OwnAnswersConfig)]
        # Rollouts are graded answers already: what is in the loss reads those.
        return [one for one in answering if not self.trains_on_rollouts or getattr(one, "moves", "all") == "scale"]

    @property
    def head_score(self) -> tuple[Literal["log", "brier"], float]:
        """Proper score of the confidence head in the loss, and its weight. Only where there is a head."""
        assert self.confidence_head is not None
        if self.trains_on_rollouts and self.rollouts.confidence == "head" and (score := self.rollouts.score_in_loss):
            return score, self.rollouts.score_weight
        return self.confidence_head.score, self.confidence_head.weight

    @property
    def trains_head(self) -> bool:
        """Whether a confidence head learns along the run; else it is solved for at the end alone, where there is one."""
        return self.confidence_head is not None and self.head_score[1] > 0

    @property
    def score_teaches(self) -> bool:
        """Whether a score in the loss moves the model, whatever its sampled answers earn."""
        through = self.confidence_head is not None and self.confidence_head.trains_backbone
        return through or bool(self.penalties_in_loss)

    @property
    def sequences_per_record(self) -> int:
        """Sequences that a training record puts into a micro-batch."""
        if self.trains_on_rollouts:
            return self.rollouts.group_size
        return 2 if self.trains_on_pairs else 1

    @property
    def trains_on_rollouts(self) -> bool:
        """Whether the objective learns from answers that the policy samples while it trains."""
        return self.objective.needs.data == "rollouts"

    @property
    def truncated(self) -> str:
        """`rollouts.truncated` with its default: where each state has a value, a cut answer ends with that of its last."""
        return self.rollouts.truncated or ("bootstrapped" if self.objective.needs.credit == "values" else "graded")

    @property
    def passes(self) -> int:
        """Optimiser steps that learn from each training record in one epoch: passes over a round of sampled answers."""
        return self.rollouts.epochs if self.trains_on_rollouts else 1

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt is passed once for all its answers, where the model's attention allows it."""
        allowed = self.data.shared_prefix and not told_by_length(self.model.attention)
        return allowed and self.objective.needs.shares_prompts

    @property
    def packing_tokens(self) -> int | None:
        """Tokens of a packed row, where the model's attention allows it; None: one sequence a row."""
        if self.data.packing_tokens is None and told_by_length(self.model.attention):
            return self.data.max_length
        return self.data.packing_tokens

    @property
    def needs_reference_logprobs(self) -> bool:
        """Whether any loss compares the training data with the starting model's log-probs."""
        return any(loss.needs.reference == "log-probs" for loss in (self.objective, *self.penalties))

    def resolved(self) -> dict[str, Any]:
        """Plain dict of every value, as written to config.yaml."""
        return self.model_dump(mode="json")
